//! Lists: the selected objects, in pages, as JSON or as a Table.

use crate::body::Response;
use crate::call::Call;
use crate::selector::Selector;
use crate::status::{ApiError, json_response};
use crate::table;
use crate::target::Target;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// A GET of a collection. Pages are cut from the objects of today: a version that is gone is only noticed by 410.
pub(crate) fn answer(call: &Call, target: &Target) -> Result<Response, ApiError> {
    let selector = Selector::parse(call.query.text("labelSelector"), call.query.text("fieldSelector"))?;
    let (objects, revision) = call.shared.store.list(target.kind, &target.namespace);
    let mut objects: Vec<Arc<Value>> =
        objects.into_iter().filter(|object| selector.matches(object)).collect();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    let token = call.query.text("continue");
    if !token.is_empty() {
        let (first_revision, after) = read_continue(token)?;
        if call.shared.store.changes(target.kind, first_revision).is_err() {
            let message = "The provided continue parameter is too old to display a consistent list result.";
            return Err(ApiError::expired(message));
        }
        objects.retain(|object| position(object) > after);
        metadata["resourceVersion"] = first_revision.to_string().into();
    } else if revision_asked(call)? > revision {
        return Err(too_large(revision_asked(call)?, revision));
    }
    let limit = call.query.number("limit").unwrap_or(0) as usize;
    if limit > 0 && objects.len() > limit {
        metadata["remainingItemCount"] = (objects.len() - limit).into();
        objects.truncate(limit);
        let after = objects.last().map(|object| position(object)).unwrap_or_default();
        let first = metadata["resourceVersion"].as_str().unwrap_or_default();
        metadata["continue"] = URL_SAFE_NO_PAD.encode(format!("{first}\n{after}")).into();
    }
    let objects: Vec<&Value> = objects.iter().map(AsRef::as_ref).collect();
    let answer = if table::is_asked(call.header("accept")) {
        table::table(target.kind, &objects, metadata, true, call.query.text("includeObject"))
    } else {
        let (kind, api_version) = (format!("{}List", target.kind.kind), target.kind.api_version());
        json!({"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": objects})
    };
    Ok(json_response(StatusCode::OK, &answer))
}

/// The place of an object in the order of a list.
fn position(object: &Value) -> String {
    let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", part("namespace"), part("name"))
}

fn read_continue(token: &str) -> Result<(u64, String), ApiError> {
    let text = URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let parsed = text.as_deref().and_then(|text| text.split_once('\n'));
    let parsed = parsed.and_then(|(revision, after)| Some((revision.parse().ok()?, after.to_owned())));
    parsed.ok_or_else(|| ApiError::bad_request("continue key is not valid"))
}

/// The query's `resourceVersion`; 0 if there is none.
pub(crate) fn revision_asked(call: &Call) -> Result<u64, ApiError> {
    match call.query.text("resourceVersion") {
        "" => Ok(0),
        text => text.parse().map_err(|_| {
            ApiError::bad_request(format!("Invalid value: \"{text}\": unable to parse resourceVersion"))
        }),
    }
}

/// A version from the future.
pub(crate) fn too_large(asked: u64, current: u64) -> ApiError {
    let message = format!("Timeout: Too large resource version: {asked}, current: {current}");
    let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message)
        .with_details(json!({"causes": [cause], "retryAfterSeconds": 1}))
}
