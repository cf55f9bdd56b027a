//! Object requests: path to kind and key, verb to store, store to JSON or Table.

use crate::body::Response;
use crate::call::{Call, decoded};
use crate::kinds::{self, Kind};
use crate::selector::Selector;
use crate::status::{ApiError, json_response};
use crate::store::{Key, Store};
use crate::target::Target;
use crate::{controllers, helpers, list, patch, pods, review, table, watch};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

/// Everything under `/api/v1/` and `/apis/GROUP/VERSION/`.
pub(crate) async fn answer(mut call: Call) -> Result<Response, ApiError> {
    if let Some(answer) = review::answer(&mut call).await? {
        return Ok(answer);
    }
    let target = Target::parse(&call.path)?;
    match (target.kind.kind, target.subresource.as_str()) {
        (_, "") => {}
        ("Pod", "log" | "exec" | "attach" | "portforward") => {
            let key = Key::new(target.kind, &target.namespace, &target.name);
            let pod = call.shared.store.get(&key);
            let pod = pod.ok_or_else(|| ApiError::not_found("", "pods", &target.name))?;
            let (name, namespace, subresource) = (target.name, target.namespace, target.subresource);
            return pods::answer(call, &pod, &namespace, &name, &subresource).await;
        }
        (_, "proxy") => return Ok(helpers::echo(call).await),
        (_, "status") if target.kind.subresources.iter().any(|sub| sub.0 == "status") => {}
        _ => return Err(ApiError::no_such_path()),
    }
    let accept = call.header("accept").to_owned();
    let framed = watch::is_framed(&accept);
    if !accept.is_empty() && !accept.contains("application/json") && !accept.contains("*/*") && !framed {
        return Err(ApiError::new(
            StatusCode::NOT_ACCEPTABLE,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        ));
    }
    let one = !target.name.is_empty();
    match (call.method.clone(), one) {
        (Method::GET | Method::HEAD, false) if call.query.flag("watch") => watch::answer(&call, &target),
        (Method::GET | Method::HEAD, false) => list::answer(&call, &target),
        (Method::GET | Method::HEAD, true) => {
            let object = call.shared.store.get(&key(&target)).ok_or_else(|| missing(&target))?;
            Ok(shown(&call, target.kind, StatusCode::OK, &object))
        }
        (Method::POST, false) => create(call, &target).await,
        (Method::PUT, true) => update(call, &target).await,
        (Method::PATCH, true) => apply_patch(call, &target).await,
        (Method::DELETE, true) => delete(call, &target).await,
        (Method::DELETE, false) => delete_collection(call, &target).await,
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn key(target: &Target) -> Key {
    Key::new(target.kind, &target.namespace, &target.name)
}

fn missing(target: &Target) -> ApiError {
    ApiError::not_found(target.kind.group, target.kind.plural, &target.name)
}

/// One object, as JSON or as a Table.
fn shown(call: &Call, kind: &Kind, code: StatusCode, object: &Value) -> Response {
    if !table::is_asked(call.header("accept")) {
        return json_response(code, object);
    }
    let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
    json_response(code, &table::table(kind, &[object], metadata, true, call.query.text("includeObject")))
}

/// Reads an object and checks it against the path, as admission and decoding would.
async fn read_object(call: &mut Call, target: &Target) -> Result<Value, ApiError> {
    let mut object = decoded(call).await?;
    check(call, target, &mut object)?;
    Ok(object)
}

fn check(call: &Call, target: &Target, object: &mut Value) -> Result<(), ApiError> {
    let kind = target.kind;
    let (found, expected) = (object["kind"].as_str().unwrap_or(""), kind.kind);
    if found != expected || object["apiVersion"] != kind.api_version() {
        return Err(ApiError::bad_request(format!(
            "{found} in version {} cannot be handled as a {expected}",
            object["apiVersion"]
        )));
    }
    let Some(fields) = object.as_object() else { return Err(ApiError::bad_request("not an object")) };
    for field in fields.keys() {
        let known = matches!(field.as_str(), "kind" | "apiVersion" | "metadata");
        if !known && !kind.fields.contains(&field.as_str()) && call.query.text("fieldValidation") == "Strict"
        {
            let message = format!(
                "{expected} in version \"{}\" cannot be handled as a {expected}: strict decoding error: unknown field \"{field}\"",
                kind.version
            );
            return Err(ApiError::bad_request(message));
        }
    }
    for field in ["data", "stringData"] {
        let map = &object[field];
        let strings = map.as_object().is_some_and(|map| map.values().all(Value::is_string));
        if !map.is_null() && !strings {
            return Err(ApiError::bad_request(format!(
                "json: cannot unmarshal {field} into a map of strings"
            )));
        }
    }
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    let name = object["metadata"]["name"].as_str().unwrap_or("").to_owned();
    if !target.name.is_empty() && name != target.name {
        let message =
            format!("the name of the object ({name}) does not match the name on the URL ({})", target.name);
        return Err(ApiError::bad_request(message));
    }
    if kind.namespaced {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or(&target.namespace);
        if namespace != target.namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        object["metadata"]["namespace"] = target.namespace.clone().into();
    }
    Ok(())
}

fn valid_name(name: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    name.len() <= 253
        && edge(name.as_bytes().first())
        && edge(name.as_bytes().last())
        && name.bytes().all(allowed)
}

async fn create(mut call: Call, target: &Target) -> Result<Response, ApiError> {
    let object = read_object(&mut call, target).await?;
    let object = insert(&call, target, object)?;
    Ok(shown(&call, target.kind, StatusCode::CREATED, &object))
}

fn insert(call: &Call, target: &Target, mut object: Value) -> Result<Arc<Value>, ApiError> {
    let kind = target.kind;
    let store: &Store = &call.shared.store;
    if kind.namespaced {
        let namespace = Key::new(kinds::core("namespaces"), "", &target.namespace);
        if store.get(&namespace).is_none() {
            return Err(ApiError::not_found("", "namespaces", &target.namespace));
        }
    }
    let prefix = object["metadata"]["generateName"].as_str().unwrap_or("").to_owned();
    if object["metadata"]["name"].as_str().unwrap_or("").is_empty() && !prefix.is_empty() {
        object["metadata"]["name"] = format!("{prefix}{:05x}", store.revision()).into();
    }
    let name = object["metadata"]["name"].as_str().unwrap_or("").to_owned();
    if !valid_name(&name) {
        let why = format!("Invalid value: \"{name}\": a lowercase RFC 1123 subdomain is required");
        return Err(ApiError::invalid(kind.kind, &name, "metadata.name", &why));
    }
    move_string_data(&mut object);
    controllers::complete(kind, &mut object);
    let key = Key::new(kind, &target.namespace, &name);
    let stored = store.change(&key, call.query.has("dryRun"), |before| match before {
        Some(_) => Err(ApiError::already_exists(kind.group, kind.plural, &name)),
        None => Ok(Some(object)),
    })?;
    if kind.kind == "Namespace" && !call.query.has("dryRun") {
        controllers::publish_ca(store, &name, call.shared.authority.ca_pem());
    }
    Ok(stored)
}

/// A Secret's `stringData` is written into `data`, never stored.
fn move_string_data(object: &mut Value) {
    if object["kind"] != "Secret" {
        return;
    }
    let Some(Value::Object(strings)) = object.as_object_mut().and_then(|fields| fields.remove("stringData"))
    else {
        return;
    };
    for (name, value) in strings {
        let encoded = STANDARD.encode(value.as_str().unwrap_or(""));
        object["data"][name] = encoded.into();
    }
}

async fn update(mut call: Call, target: &Target) -> Result<Response, ApiError> {
    let mut object = read_object(&mut call, target).await?;
    move_string_data(&mut object);
    let stored = call.shared.store.change(&key(target), call.query.has("dryRun"), |before| {
        let before = before.ok_or_else(|| missing(target))?;
        replace(target, before, object).map(Some)
    })?;
    Ok(shown(&call, target.kind, StatusCode::OK, &stored))
}

/// The object that an update stores: never over a newer version, and with the fields that controllers add.
fn replace(target: &Target, before: &Value, mut object: Value) -> Result<Value, ApiError> {
    let version = object["metadata"]["resourceVersion"].as_str().unwrap_or("");
    if !version.is_empty() && object["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"] {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        return Err(ApiError::conflict(target.kind.group, target.kind.plural, &target.name, why));
    }
    if before["immutable"] == true && object["data"] != before["data"] {
        let why = "Forbidden: field is immutable when `immutable` is set";
        return Err(ApiError::invalid(target.kind.kind, &target.name, "data", why));
    }
    if target.kind.kind == "Deployment" && object["spec"] != before["spec"] {
        object["metadata"]["generation"] = before["metadata"]["generation"].clone();
        controllers::complete(target.kind, &mut object);
    }
    Ok(object)
}

async fn apply_patch(mut call: Call, target: &Target) -> Result<Response, ApiError> {
    let media = call.header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
    let known = ["json-patch+json", "merge-patch+json", "strategic-merge-patch+json", "apply-patch+yaml"];
    let Some(style) = media.strip_prefix("application/").filter(|style| known.contains(style)) else {
        return Err(ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: {}; got {media}",
            known.map(|style| format!("application/{style}")).join(", ")
        )));
    };
    let body = call.body.collect().await?;
    let patch: Value = serde_json::from_slice(&body)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    if style == "apply-patch+yaml" && call.shared.store.get(&key(target)).is_none() {
        let mut object = patch;
        check(&call, target, &mut object)?;
        let object = insert(&call, target, object)?;
        return Ok(shown(&call, target.kind, StatusCode::CREATED, &object));
    }
    let stored = call.shared.store.change(&key(target), call.query.has("dryRun"), |before| {
        let before = before.ok_or_else(|| missing(target))?;
        let mut object = before.clone();
        match style {
            "json-patch+json" => patch::json_patch(&mut object, &patch)?,
            "merge-patch+json" => patch::merge(&mut object, &patch),
            _ => patch::strategic_merge(&mut object, &patch),
        }
        check(&call, target, &mut object)?;
        move_string_data(&mut object);
        replace(target, before, object).map(Some)
    })?;
    Ok(shown(&call, target.kind, StatusCode::OK, &stored))
}

async fn delete(mut call: Call, target: &Target) -> Result<Response, ApiError> {
    let body = call.body.collect().await?;
    let options: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let kind = target.kind;
    let gone = call.shared.store.change(
        &key(target),
        call.query.has("dryRun") || !options["dryRun"].is_null(),
        |before| {
            let before = before.ok_or_else(|| missing(target))?;
            for field in ["uid", "resourceVersion"] {
                let wanted = &options["preconditions"][field];
                if !wanted.is_null() && *wanted != before["metadata"][field] {
                    let why = format!("the {field} in the precondition does not match");
                    return Err(ApiError::conflict(kind.group, kind.plural, &target.name, &why));
                }
            }
            Ok(None)
        },
    )?;
    if kind.kind == "Namespace" {
        for inside in kinds::KINDS.iter().filter(|kind| kind.namespaced) {
            remove_all(&call.shared.store, inside, &target.name, &Selector::default());
        }
    }
    if matches!(kind.kind, "Pod" | "Namespace") {
        return Ok(shown(&call, kind, StatusCode::OK, &gone));
    }
    let details = json!({
        "name": target.name, "group": kind.group, "kind": kind.plural, "uid": gone["metadata"]["uid"],
    });
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
    });
    Ok(json_response(StatusCode::OK, &status))
}

async fn delete_collection(mut call: Call, target: &Target) -> Result<Response, ApiError> {
    call.body.collect().await?;
    let selector = Selector::parse(call.query.text("labelSelector"), call.query.text("fieldSelector"))?;
    let gone = remove_all(&call.shared.store, target.kind, &target.namespace, &selector);
    let kind = format!("{}List", target.kind.kind);
    let gone: Vec<&Value> = gone.iter().map(AsRef::as_ref).collect();
    let revision = call.shared.store.revision().to_string();
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "kind": kind, "apiVersion": target.kind.api_version(), "metadata": {"resourceVersion": revision}, "items": gone,
        }),
    ))
}

fn remove_all(store: &Store, kind: &'static Kind, namespace: &str, selector: &Selector) -> Vec<Arc<Value>> {
    let (objects, _) = store.list(kind, namespace);
    let mut gone = Vec::new();
    for object in objects.into_iter().filter(|object| selector.matches(object)) {
        let part = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
        let key = Key::new(kind, part("namespace"), part("name"));
        // Another request may have deleted it since the list.
        gone.extend(store.change(&key, false, |_| Ok(None)).ok());
    }
    gone
}
