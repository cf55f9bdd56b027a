//! Create, update, patch and delete of the fleet's API. Each decides on the record that lists show, writes only if that record is
//! unchanged, and answers once lists show the result.

use super::Call;
use super::error::{ApiError, json_response};
use super::input::{Input, New, Own, Parsed};
use super::kinds::{GROUP, Resource};
use super::objects;
use super::read::shown;
use crate::fleet::kind;
use crate::fleet::{Object, Shown, WriteError};
use crate::web::answer::warning;
use crate::web::body::AnswerBody;
use http::header::WARNING;
use http::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use towline_model::ANY;
use towline_model::text::printable;

/// Attempts of a write whose record another writer changed meanwhile.
const ATTEMPTS: usize = 8;
/// Most unknown fields that a response names.
const WARNINGS_MAX: usize = 8;

/// Creates an object from the body.
pub(super) async fn create(
    call: &Call,
    resource: &'static Resource,
    body: Value,
) -> Result<Response<AnswerBody>, ApiError> {
    let mut input = Input::read(resource, body)?;
    let warnings = validate_fields(call, resource, &input)?;
    if input.version.is_some() {
        let why = "must not be set on an object that is created";
        return Err(ApiError::invalid(resource, &input.name, "metadata.resourceVersion", why));
    }
    let own = Own {
        addresses: &call.addresses(),
        pins: call.api.context.tunnel_pins(),
        trust_domain: &call.api.context.config.trust_domain,
    };
    let New { parsed, secrets } = input.create(resource, &call.api.fleet, &own)?;
    let warnings = [warnings, told_of_names(call, &input.name, &parsed)].concat();
    let name = input.name.clone();
    let dry = dry_run(call, &DeleteOptions::default())?;
    let fail = |error: WriteError| ApiError::write(resource, &name, &error);
    if call.is_configured(resource, &name) {
        return Err(fail(WriteError::Reserved));
    }
    if dry {
        let kind = resource.stored.unwrap_or(kind::CLUSTER);
        if call.api.fleet.object(kind, &name).is_some() && kind != kind::REVOCATION {
            return Err(fail(WriteError::Exists));
        }
        let (mut object, _) = objects::render(resource, &name, &parsed.object(), None);
        reveal(&mut object, &secrets);
        return Ok(warned(shown(call, resource, StatusCode::CREATED, &object), &warnings));
    }
    let revision = put(call, &name, &parsed, None).await.map_err(fail)?;
    let mut object = written(call, resource, &name, revision).await?;
    reveal(&mut object, &secrets);
    call.audit("create", resource, &name);
    Ok(warned(shown(call, resource, StatusCode::CREATED, &object), &warnings))
}

/// Adds the secrets to the response to a creation.
fn reveal(object: &mut Value, secrets: &Map<String, Value>) {
    for (field, secret) in secrets {
        object["status"][field] = secret.clone();
    }
}

/// Replaces an object by the body.
pub(super) async fn update(
    call: &Call,
    resource: &'static Resource,
    name: &str,
    body: Value,
) -> Result<Response<AnswerBody>, ApiError> {
    change(call, resource, name, "update", |_| Ok(body.clone())).await
}

/// Merges the body into an object (RFC 7386).
pub(super) async fn patch(
    call: &Call,
    resource: &'static Resource,
    name: &str,
    patch: &Value,
) -> Result<Response<AnswerBody>, ApiError> {
    if !patch.is_object() {
        return Err(ApiError::bad_request("the body of a merge patch must be a JSON object"));
    }
    change(call, resource, name, "patch", |before| {
        let mut object = before.clone();
        // A version that the sender has not given is not a precondition.
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("resourceVersion");
        }
        merge(&mut object, patch, 0)?;
        Ok(object)
    })
    .await
}

async fn change(
    call: &Call,
    resource: &'static Resource,
    name: &str,
    verb: &'static str,
    next: impl Fn(&Value) -> Result<Value, ApiError>,
) -> Result<Response<AnswerBody>, ApiError> {
    let fail = |error: WriteError| ApiError::write(resource, name, &error);
    let dry = dry_run(call, &DeleteOptions::default())?;
    for _ in 0..ATTEMPTS {
        let Latest { record, before } = latest(call, resource, name).await?;
        let input = Input::read(resource, next(&before)?)?;
        let warnings = validate_fields(call, resource, &input)?;
        if input.name != name {
            let message = format!(
                "the name of the object ({}) does not match the name on the URL ({name})",
                input.name
            );
            return Err(ApiError::bad_request(message));
        }
        if input.version.as_deref().is_some_and(|version| before["metadata"]["resourceVersion"] != version) {
            return Err(fail(WriteError::Conflict));
        }
        if input.uid.as_deref().is_some_and(|uid| before["metadata"]["uid"] != uid) {
            return Err(ApiError::conflict(
                resource,
                name,
                "the uid differs: the object was deleted and another one of that name was created",
            ));
        }
        let parsed = input.update(resource, &record.object)?;
        let warnings = [warnings, told_of_names(call, name, &parsed)].concat();
        let unchanged = same(&parsed, &record.object);
        if unchanged || dry {
            let object =
                if unchanged { Value::clone(&before) } else { preview(resource, name, &parsed, &before) };
            return Ok(warned(shown(call, resource, StatusCode::OK, &object), &warnings));
        }
        match put(call, name, &parsed, Some(record.revision)).await {
            Ok(revision) => {
                let object = written(call, resource, name, revision).await?;
                call.audit(verb, resource, name);
                return Ok(warned(shown(call, resource, StatusCode::OK, &object), &warnings));
            }
            // The next attempt checks whether the sender's version is still current.
            Err(WriteError::Conflict) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    Err(fail(WriteError::Conflict))
}

/// The result of a dry run, with the object's current status.
fn preview(resource: &Resource, name: &str, parsed: &Parsed, before: &Value) -> Value {
    let (mut object, _) = objects::render(resource, name, &parsed.object(), None);
    object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
    if let Some(status) = before.get("status") {
        object["status"] = status.clone();
    }
    object
}

fn same(parsed: &Parsed, before: &Object) -> bool {
    match (parsed, before) {
        (Parsed::Cluster(next), Object::Cluster(before)) => **next == **before,
        (Parsed::JoinToken(next), Object::JoinToken(before)) => *next == **before,
        (Parsed::AccessRule(next), Object::AccessRule(before)) => *next == **before,
        (Parsed::AccessToken(next), Object::AccessToken(before)) => *next == **before,
        _ => false,
    }
}

/// Deletes an object, if it meets the options' preconditions.
pub(super) async fn delete(
    call: &Call,
    resource: &'static Resource,
    name: &str,
    options: &Value,
) -> Result<Response<AnswerBody>, ApiError> {
    let fail = |error: WriteError| ApiError::write(resource, name, &error);
    let options = DeleteOptions::read(options)?;
    let dry = dry_run(call, &options)?;
    let wanted = options.preconditions.unwrap_or_default();
    let wanted = [("uid", wanted.uid), ("resourceVersion", wanted.resource_version)];
    for _ in 0..ATTEMPTS {
        let Latest { record, before } = latest(call, resource, name).await?;
        for (field, wanted) in &wanted {
            if wanted.as_deref().is_some_and(|wanted| before["metadata"][field] != *wanted) {
                let why = format!("the {field} in the preconditions does not match the object's");
                return Err(ApiError::conflict(resource, name, &why));
            }
        }
        let done = match &record.object {
            Object::Cluster(cluster) if cluster.deletion_protection => Err(WriteError::Protected),
            _ if dry => Ok(0),
            _ => call.api.fleet.delete(resource.stored.unwrap_or(kind::CLUSTER), name, record.revision).await,
        };
        match done {
            Ok(revision) => {
                call.api.feed.shows(revision).await.map_err(fail)?;
                if !dry {
                    call.audit("delete", resource, name);
                }
                let details = json!({
                    "name": name, "group": GROUP, "kind": resource.plural, "uid": before["metadata"]["uid"],
                });
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
                });
                return Ok(json_response(StatusCode::OK, &status));
            }
            Err(WriteError::Conflict) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    Err(fail(WriteError::Conflict))
}

/// The state on which a change is decided.
struct Latest {
    record: Shown,
    /// The object as lists show it: of this record, or of a later one.
    before: Arc<Value>,
}

/// Reads the record first, then waits until lists show it. If the list is newer than the record, the store refuses the change;
/// if it were older, the store would accept a change that was decided on another state.
async fn latest(call: &Call, resource: &Resource, name: &str) -> Result<Latest, ApiError> {
    let fail = |error: WriteError| ApiError::write(resource, name, &error);
    if call.is_configured(resource, name) {
        return Err(fail(WriteError::Reserved));
    }
    let not_found = || ApiError::not_found(resource, name);
    let record = resource.stored.and_then(|kind| call.api.fleet.object(kind, name)).ok_or_else(not_found)?;
    call.api.feed.shows(record.revision).await.map_err(fail)?;
    let before = call.api.feed.object(resource, name).ok_or_else(not_found)?;
    Ok(Latest { record, before })
}

async fn put(call: &Call, name: &str, parsed: &Parsed, replaces: Option<u64>) -> Result<u64, WriteError> {
    let fleet = &call.api.fleet;
    match parsed {
        Parsed::Cluster(record) => fleet.put(name, &**record, replaces).await,
        Parsed::JoinToken(record) => fleet.put(name, record, replaces).await,
        Parsed::AccessRule(record) => fleet.put(name, record, replaces).await,
        Parsed::AccessToken(record) => fleet.put(name, record, replaces).await,
        Parsed::Revoke(what, meta) => fleet.revoke(what, meta).await.map(|(_, revision)| revision),
    }
}

/// The object, after lists show what was written.
async fn written(call: &Call, resource: &Resource, name: &str, revision: u64) -> Result<Value, ApiError> {
    call.api.feed.shows(revision).await.map_err(|error| ApiError::write(resource, name, &error))?;
    let object = call.api.feed.object(resource, name);
    object.map(|object| Value::clone(&object)).ok_or_else(|| ApiError::not_found(resource, name))
}

/// Whether it is a dry run. `options` are those of a deletion.
pub(super) fn dry_run(call: &Call, options: &DeleteOptions) -> Result<bool, ApiError> {
    let mut asked =
        options.dry_run.iter().flatten().map(String::as_str).chain(call.query.dry_runs()).peekable();
    let dry = asked.peek().is_some();
    match asked.find(|text| *text != "All") {
        Some(text) => Err(ApiError::bad_request(format!("dryRun: {text:?} is not supported; use All"))),
        None => Ok(dry),
    }
}

/// Kubernetes' `DeleteOptions`. Unknown fields are errors, because one may be meant to keep the object.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct DeleteOptions {
    kind: Option<String>,
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    /// Dependents of an object are always deleted with it, at once.
    #[serde(rename = "gracePeriodSeconds")]
    _grace_period_seconds: Option<i64>,
    #[serde(rename = "orphanDependents")]
    _orphan_dependents: Option<bool>,
    #[serde(rename = "propagationPolicy")]
    _propagation_policy: Option<String>,
    preconditions: Option<Preconditions>,
    dry_run: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Preconditions {
    uid: Option<String>,
    resource_version: Option<String>,
}

impl DeleteOptions {
    /// Reads the body of a deletion, which may be empty.
    fn read(body: &Value) -> Result<Self, ApiError> {
        if body.is_null() {
            return Ok(Self::default());
        }
        let refuse = |why: &str| ApiError::bad_request(format!("the body is not a DeleteOptions: {why}"));
        // serde would read a list as the fields in their order.
        let is_object = |value: &Value| value.is_object() || value.is_null();
        if !is_object(body) || !is_object(&body["preconditions"]) {
            return Err(refuse("it or its preconditions are not an object"));
        }
        let options: Self = Self::deserialize(body).map_err(|error| refuse(&error.to_string()))?;
        match options.kind.as_deref() {
            None | Some("DeleteOptions") => Ok(options),
            Some(other) => Err(refuse(&format!("its kind is {other:?}"))),
        }
    }
}

/// Handles unknown fields as `fieldValidation` says: error, warning or nothing.
fn validate_fields(call: &Call, resource: &Resource, input: &Input) -> Result<Vec<String>, ApiError> {
    let told = |field: &String| format!("unknown field \"{field}\"");
    match call.query.get("fieldValidation") {
        "Strict" if !input.unknown.is_empty() => {
            let fields: Vec<_> = input.unknown.iter().map(told).collect();
            let message = format!(
                "{} in version \"v1alpha1\" cannot be handled as a {}: strict decoding error: {}",
                resource.kind,
                resource.kind,
                fields.join(", ")
            );
            Err(ApiError::bad_request(message))
        }
        "Strict" | "Ignore" => Ok(Vec::new()),
        "" | "Warn" => Ok(input.unknown.iter().take(WARNINGS_MAX).map(told).collect()),
        other => Err(ApiError::bad_request(format!(
            "fieldValidation: {other:?} is not one of Strict, Warn, Ignore"
        ))),
    }
}

/// Warnings about clusters that a rule names and that do not exist, and about rules that name a cluster and do not apply to it.
fn told_of_names(call: &Call, name: &str, parsed: &Parsed) -> Vec<String> {
    let told = match parsed {
        Parsed::AccessRule(rule) => {
            let is_there = |name: &String| {
                call.api.context.live().by_name.contains_key(name)
                    || call.api.fleet.object(kind::CLUSTER, name).is_some()
            };
            let about = |name: &String| {
                if rule.ended.contains(name) {
                    return Some(format!(
                        "the rule was written for a cluster {name:?} that was deleted, so it does not apply to another cluster of that name; to make it apply, remove the name from the rule and add it again"
                    ));
                }
                (name != ANY && !is_there(name)).then(|| {
                    format!("there is no cluster {name:?} yet; the rule will apply to the next cluster that is registered under that name")
                })
            };
            rule.clusters.iter().filter_map(about).collect()
        }
        Parsed::Cluster(_) => {
            let rules = call.api.fleet.rules_of_an_earlier(name);
            let about = |rule: &Arc<str>| {
                format!(
                    "the access rule {rule:?} was written for an earlier cluster {name:?} and does not apply to this one"
                )
            };
            rules.iter().map(about).collect()
        }
        _ => Vec::new(),
    };
    told.into_iter().take(WARNINGS_MAX).collect::<Vec<String>>()
}

fn warned(mut response: Response<AnswerBody>, warnings: &[String]) -> Response<AnswerBody> {
    for text in warnings {
        response.headers_mut().append(WARNING, warning(&printable(text)));
    }
    response
}

/// RFC 7386. The depth is bounded by the reader of the body.
fn merge(target: &mut Value, patch: &Value, depth: usize) -> Result<(), ApiError> {
    if depth > 32 {
        return Err(ApiError::bad_request("the patch is nested too deeply"));
    }
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return Ok(()) };
    for (name, value) in patch {
        if value.is_null() {
            fields.remove(name);
        } else {
            merge(fields.entry(name.clone()).or_insert(Value::Null), value, depth + 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_merge() {
        let mut object = json!({"a": {"b": 1, "c": 2}, "list": [1, 2]});
        merge(&mut object, &json!({"a": {"b": null, "d": {"e": 3}}, "list": [3]}), 0).unwrap();
        assert_eq!(object, json!({"a": {"c": 2, "d": {"e": 3}}, "list": [3]}));
        let deep = (0..100).fold(json!(1), |inner, _| json!({"x": inner}));
        assert!(merge(&mut object, &deep, 0).is_err());
    }
}
