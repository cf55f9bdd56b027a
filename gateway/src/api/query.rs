//! Parses the query of an API request, before anything else happens. Repeated parameters, known parameters in other letter case and
//! invalid values are errors, because ignoring them would widen what the caller asked for.

#![warn(clippy::indexing_slicing)] // What peers send is read here (SG17).

use super::error::ApiError;
use super::selector::Selector;
use towline_model::text::percent_decode;

/// The parameters of Kubernetes' verbs. Others are left alone, as the API server leaves them: a newer client may send them.
const KNOWN: [&str; 19] = [
    "allowWatchBookmarks",
    "continue",
    DRY_RUN,
    "fieldManager",
    "fieldSelector",
    "fieldValidation",
    "force",
    "gracePeriodSeconds",
    "includeObject",
    "labelSelector",
    "limit",
    "orphanDependents",
    "pretty",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
/// The one that is a list.
const DRY_RUN: &str = "dryRun";

/// The query, decoded.
#[derive(Debug)]
pub(super) struct Query {
    pairs: Vec<(String, String)>,
    /// What of each object a table carries.
    pub(super) include: Included,
}

/// How much of an object is in a row of a table (`includeObject`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Included {
    Nothing,
    Metadata,
    Object,
}

impl Query {
    /// Takes a query apart.
    ///
    /// # Errors
    /// 400: it is no UTF-8, a parameter is there twice, or is one of Kubernetes' but for the case of its letters; or
    /// `includeObject` is nothing that is known.
    pub(super) fn parse(query: &str) -> Result<Self, ApiError> {
        let decode = |text: &str| {
            String::from_utf8(percent_decode(&text.replace('+', " ")).into_owned())
                .map_err(|_| ApiError::bad_request("the query is not valid UTF-8"))
        };
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            match KNOWN.into_iter().find(|known| known.eq_ignore_ascii_case(&name)) {
                None => continue,
                Some(known) if known != name => {
                    let message = format!("unknown query parameter {name:?}; did you mean {known}?");
                    return Err(ApiError::bad_request(message));
                }
                Some(known) if known != DRY_RUN && pairs.iter().any(|(earlier, _)| *earlier == name) => {
                    return Err(ApiError::bad_request(format!(
                        "the query has the parameter {known} twice; give it once"
                    )));
                }
                Some(_) => pairs.push((name, value)),
            }
        }
        let mut query = Self { pairs, include: Included::Metadata };
        query.include = match query.get("includeObject") {
            "" | "Metadata" => Included::Metadata,
            "None" => Included::Nothing,
            "Object" => Included::Object,
            other => {
                let message = format!("includeObject: {other:?} is not one of None, Metadata, Object");
                return Err(ApiError::bad_request(message));
            }
        };
        Ok(query)
    }

    /// A parameter; nothing if it is not there.
    pub(super) fn get(&self, name: &str) -> &str {
        self.given(name).unwrap_or_default()
    }

    fn given(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that is said and not false, as the API server reads it.
    pub(super) fn flag(&self, name: &str) -> bool {
        self.given(name).is_some_and(|value| !matches!(value.to_ascii_lowercase().as_str(), "false" | "0"))
    }

    /// What `dryRun` says, each time.
    pub(super) fn dry_runs(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().filter(|(key, _)| key == DRY_RUN).map(|(_, value)| value.as_str())
    }
}

/// How a list, a watch or a single object is asked for.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) selector: Selector,
    pub(super) bookmarks: bool,
    /// `sendInitialEvents`, if it is said.
    pub(super) initial: Option<bool>,
    /// As it is written; empty if it is not said.
    pub(super) version: String,
    pub(super) exact: bool,
    pub(super) timeout_seconds: u64,
    /// None is as many as there are.
    pub(super) limit: usize,
    pub(super) from: String,
}

impl Options {
    /// Reads them, by the rules of `ValidateListOptions` of k8s.io/apimachinery.
    ///
    /// # Errors
    /// 400 for what cannot be read, 422 for what does not go together.
    pub(super) fn read(query: &Query, watch: bool) -> Result<Self, ApiError> {
        let number = |name: &str| match query.get(name) {
            "" => Ok(0),
            text => text.parse().map_err(|_| {
                ApiError::bad_request(format!("{name}: {text:?} is not an integer of at least 0"))
            }),
        };
        let options = Self {
            selector: Selector::parse(query.get("labelSelector"), query.get("fieldSelector"))?,
            bookmarks: query.flag("allowWatchBookmarks"),
            initial: query.given("sendInitialEvents").map(|_| query.flag("sendInitialEvents")),
            version: query.get("resourceVersion").to_owned(),
            exact: query.get("resourceVersionMatch") == "Exact",
            timeout_seconds: number("timeoutSeconds")?,
            limit: usize::try_from(number("limit")?).unwrap_or(usize::MAX),
            from: query.get("continue").to_owned(),
        };
        options.check(query.get("resourceVersionMatch"), watch)?;
        Ok(options)
    }

    fn check(&self, matching: &str, watch: bool) -> Result<(), ApiError> {
        const MATCH: &str = "resourceVersionMatch";
        let refuse = |field: &str, why: &str| Err(ApiError::invalid_options(field, why));
        if watch && self.initial.is_some() && matching != "NotOlderThan" {
            return refuse(MATCH, "sendInitialEvents requires resourceVersionMatch to be NotOlderThan");
        }
        if watch && self.initial == Some(true) && !self.bookmarks {
            let why = "sendInitialEvents requires allowWatchBookmarks: a bookmark marks the end of the initial events";
            return refuse("allowWatchBookmarks", why);
        }
        if !watch && self.initial.is_some() {
            return refuse("sendInitialEvents", "is forbidden for a list");
        }
        if !self.from.is_empty() && !matches!(self.version.as_str(), "" | "0") {
            let why = "specifying resource version is not allowed when using continue";
            return Err(ApiError::bad_request(why));
        }
        if matching.is_empty() {
            return Ok(());
        }
        if !matches!(matching, "NotOlderThan" | "Exact") || (watch && self.exact) {
            let supported = if watch { "NotOlderThan" } else { "Exact or NotOlderThan" };
            return refuse(MATCH, &format!("{matching:?} is not supported; use {supported}"));
        }
        if !self.from.is_empty() {
            return refuse(MATCH, "is forbidden when continue is provided");
        }
        if watch && self.initial.is_none() {
            return refuse(MATCH, "is forbidden for a watch without sendInitialEvents");
        }
        if !watch && self.version.is_empty() {
            return refuse(MATCH, "is forbidden unless resourceVersion is provided");
        }
        if self.exact && self.version == "0" {
            return refuse(MATCH, "Exact is forbidden for resourceVersion 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(refused: &ApiError) -> u64 {
        refused.object()["code"].as_u64().unwrap()
    }

    /// Goal: A12: a parameter that would not have its intended effect is refused instead of ignored.
    #[test]
    fn a12_what_a_query_says_is_read_whole_or_refused() {
        let query = Query::parse("labelSelector=a%3Db&limit=5&x=1&x=2&watch&dryRun=All&dryRun=All").unwrap();
        assert_eq!((query.get("labelSelector"), query.get("limit"), query.get("x")), ("a=b", "5", ""));
        assert!(query.flag("watch") && !query.flag("allowWatchBookmarks"));
        assert_eq!(query.dry_runs().collect::<Vec<_>>(), ["All", "All"]);
        assert_eq!(query.include, Included::Metadata);
        assert_eq!(Query::parse("includeObject=None").unwrap().include, Included::Nothing);
        assert_eq!(Query::parse("labelSelector=a+in+(b)").unwrap().get("labelSelector"), "a in (b)");
        for refused in [
            "labelSelector=a&labelSelector=b",
            "labelSelector=a&label%53elector=b",
            "labelselector=a",
            "dryrun=All",
            "DryRun=All",
            "labelSelector=%ff",
            "dryRun=%c3",
            "%ff=1",
            "resourceVersion=1&resourceVersion=2",
            "includeObject=all",
        ] {
            assert_eq!(code(&Query::parse(refused).unwrap_err()), 400, "{refused}");
        }
    }

    /// Goal: A12: the options of a list and of a watch are as the API server takes them.
    #[test]
    fn a12_options_that_do_not_go_together_are_refused() {
        let read = |text: &str, watch| Options::read(&Query::parse(text).unwrap(), watch);
        for (text, watch) in [
            ("", false),
            ("", true),
            ("resourceVersion=0&resourceVersionMatch=NotOlderThan&limit=500", false),
            ("resourceVersion=5&resourceVersionMatch=Exact", false),
            ("continue=x&resourceVersion=0&limit=0", false),
            (
                "sendInitialEvents=true&allowWatchBookmarks=1&resourceVersionMatch=NotOlderThan&resourceVersion=",
                true,
            ),
            ("sendInitialEvents=false&resourceVersionMatch=NotOlderThan&timeoutSeconds=9", true),
        ] {
            assert!(read(text, watch).is_ok(), "{text} {watch}: {:?}", read(text, watch));
        }
        for (text, watch, expected) in [
            ("resourceVersionMatch=Wat&resourceVersion=1", false, 422),
            ("resourceVersionMatch=exact&resourceVersion=1", false, 422),
            ("resourceVersionMatch=Exact", false, 422),
            ("resourceVersionMatch=NotOlderThan", false, 422),
            ("resourceVersionMatch=Exact&resourceVersion=0", false, 422),
            ("resourceVersionMatch=NotOlderThan&resourceVersion=0&continue=x", false, 422),
            ("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", false, 422),
            ("continue=x&resourceVersion=5", false, 400),
            ("limit=-1", false, 400),
            ("limit=many", false, 400),
            ("timeoutSeconds=-1", true, 400),
            ("timeoutSeconds=1s", false, 400),
            ("labelSelector=,,", true, 400),
            ("fieldSelector=spec.mode%3Dx", false, 400),
            ("resourceVersionMatch=NotOlderThan", true, 422),
            ("resourceVersionMatch=Exact&sendInitialEvents=true&allowWatchBookmarks=true", true, 422),
            ("sendInitialEvents=true", true, 422),
            ("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", true, 422),
        ] {
            assert_eq!(code(&read(text, watch).unwrap_err()), expected, "{text} {watch}");
        }
    }
}
