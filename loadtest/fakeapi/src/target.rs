//! The object or collection that a request's path names: a [`Target`].

use crate::call::decode;
use crate::kinds::{self, Kind};
use crate::status::ApiError;

/// Where a path leads: a kind, perhaps a namespace, a name and a subresource.
pub(crate) struct Target {
    pub(crate) kind: &'static Kind,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) subresource: String,
}

impl Target {
    /// Reads a path under `/api/v1/` or `/apis/GROUP/VERSION/`.
    pub(crate) fn parse(path: &str) -> Result<Self, ApiError> {
        let segments: Vec<String> = path.split('/').skip(1).map(decode).collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let (group, version, rest) = match segments.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(ApiError::no_such_path()),
        };
        let (namespace, plural, rest) = match rest {
            ["namespaces", namespace, plural, rest @ ..] if *plural != "status" => {
                (*namespace, *plural, rest)
            }
            [plural, rest @ ..] => ("", *plural, rest),
            [] => return Err(ApiError::no_such_path()),
        };
        let kind = kinds::find(group, version, plural).ok_or_else(ApiError::no_such_path)?;
        let (name, subresource) = match rest {
            [] | [""] => ("", ""),
            [name] => (*name, ""),
            [name, subresource, ..] => (*name, *subresource),
        };
        let misplaced = kind.namespaced == namespace.is_empty() && (!name.is_empty() || !kind.namespaced);
        if misplaced {
            return Err(ApiError::no_such_path());
        }
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Ok(Self { kind, namespace, name, subresource: subresource.to_owned() })
    }
}
