//! OpenAPI documents with the minimum that kubectl needs, all of it true: which parameters a write accepts.
//!
//! kubectl up to 1.26 reads the version 2 document as protobuf; a kind that is not in it is not validated by the
//! client, so a document without definitions is honest. Later ones look in the version 3 documents for the
//! parameter `fieldValidation`, and leave validation to the server if it is there.

use crate::body::{Response, full};
use crate::call::Call;
use crate::kinds::{KINDS, Kind};
use crate::status::empty;
use crate::status::{ApiError, json_response};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Map, Value, json};

/// Names the version of a document.
const HASH: &str = "FAKE";
const TITLE: &str = "Kubernetes";
const VERSION: &str = "v1.30.0";

/// `/openapi/v2`, `/openapi/v3` and the documents below it.
pub(crate) fn answer(call: &Call) -> Result<Response, ApiError> {
    let accept = call.header("accept");
    let json_wanted = accept.is_empty() || accept.contains("application/json") || accept.contains("*/*");
    match call.path.as_str() {
        "/openapi/v2" if accept.contains("openapi.spec.v2@v1.0+protobuf") => {
            let mut answer = http::Response::new(full(v2_protobuf()));
            // Asked for with `@`, answered with a dot, as a real server does: `@` is no character of a media type.
            let media = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media));
            Ok(answer)
        }
        "/openapi/v2" if json_wanted => Ok(json_response(
            StatusCode::OK,
            &json!({
                "swagger": "2.0", "info": {"title": TITLE, "version": VERSION}, "paths": {}, "definitions": {},
            }),
        )),
        "/openapi/v3" if json_wanted => {
            let mut paths = Map::new();
            for kind in KINDS {
                let path = root(kind);
                let url = format!("/openapi/v3/{path}?hash={HASH}");
                paths.insert(path, json!({"serverRelativeURL": url}));
            }
            Ok(json_response(StatusCode::OK, &json!({"paths": paths})))
        }
        path if json_wanted => {
            let wanted = path.strip_prefix("/openapi/v3/").ok_or_else(ApiError::no_such_path)?;
            let kinds: Vec<&Kind> = KINDS.iter().filter(|kind| root(kind) == wanted).collect();
            if kinds.is_empty() {
                return Err(ApiError::no_such_path());
            }
            // As a real server does for a document that has changed since.
            if call.query.has("hash") && call.query.text("hash") != HASH {
                let to = format!("{path}?hash={HASH}");
                return Ok(empty(StatusCode::MOVED_PERMANENTLY, &[("location", &to)]));
            }
            Ok(json_response(StatusCode::OK, &v3_document(&kinds)))
        }
        _ => Err(ApiError::new(
            StatusCode::NOT_ACCEPTABLE,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        )),
    }
}

fn root(kind: &Kind) -> String {
    if kind.group.is_empty() { "api/v1".to_owned() } else { format!("apis/{}/{}", kind.group, kind.version) }
}

fn v3_document(kinds: &[&Kind]) -> Value {
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for kind in kinds {
        let gvk = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let schema_name = format!("io.k8s.fake.{}.{}", kind.version, kind.kind);
        let reference = json!({"$ref": format!("#/components/schemas/{schema_name}")});
        let parameter = |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string"}});
        let operation = |action: &str| {
            json!({
                "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk,
                "parameters": [parameter("dryRun"), parameter("fieldManager"), parameter("fieldValidation")],
                "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": reference}}}},
            })
        };
        let collection = format!("/{}{scope}/{}", root(kind), kind.plural);
        paths.insert(
            format!("{collection}/{{name}}"),
            json!({"patch": operation("patch"), "put": operation("put")}),
        );
        paths.insert(collection, json!({"post": operation("post")}));
        let mut properties = json!({
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
        });
        for field in kind.fields {
            properties[field] = json!({"x-kubernetes-preserve-unknown-fields": true});
        }
        schemas.insert(
            schema_name,
            json!({"type": "object", "properties": properties, "x-kubernetes-group-version-kind": [gvk]}),
        );
    }
    json!({
        "openapi": "3.0.0", "info": {"title": TITLE, "version": VERSION}, "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// The smallest valid document: `swagger` = 1, `info` = 2 {title = 1, version = 2}, `paths` = 8, all length-delimited.
fn v2_protobuf() -> Vec<u8> {
    let field = |number: u8, content: &[u8]| {
        let mut out = vec![number << 3 | 2, content.len() as u8];
        out.extend_from_slice(content);
        out
    };
    let info = [field(1, TITLE.as_bytes()), field(2, VERSION.as_bytes())].concat();
    [field(1, b"2.0"), field(2, &info), field(8, b"")].concat()
}
