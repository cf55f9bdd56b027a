//! What runs behind a pod: logs, real processes for exec, an echo for attach, small servers for port-forward.

pub(crate) mod host;
mod logs;
mod process;
mod remote;
mod servers;

use crate::body::Response;
use crate::call::Call;
use crate::status::ApiError;
use crate::{spdy, websocket};
use http::StatusCode;
use serde_json::Value;

pub(crate) use process::Output;
pub(crate) use remote::RemoteCommand;

/// The subresources `log`, `exec`, `attach` and `portforward` of a pod that exists.
pub(crate) async fn answer(
    call: Call,
    pod: &Value,
    namespace: &str,
    name: &str,
    subresource: &str,
) -> Result<Response, ApiError> {
    if subresource == "log" {
        return logs::answer(&call, pod, name);
    }
    let websocket = call.asks_upgrade("websocket");
    if !websocket && !call.asks_upgrade("spdy/3.1") {
        return Err(ApiError::bad_request("Upgrade request required"));
    }
    if subresource == "portforward" {
        return match websocket {
            true => websocket::port_forward(call, name),
            false => spdy::port_forward(call, name),
        };
    }
    let command = RemoteCommand::parse(&call, pod, namespace, name, subresource)?;
    if websocket { websocket::remote_command(call, command) } else { spdy::remote_command(call, command) }
}

/// The container a request names, or the only one.
fn container(call: &Call, pod: &Value, name: &str) -> Result<(), ApiError> {
    let wanted = call.query.text("container");
    let containers = pod["spec"]["containers"].as_array().cloned().unwrap_or_default();
    if wanted.is_empty() && containers.len() > 1 {
        return Err(ApiError::bad_request(format!("a container name must be specified for pod {name}")));
    }
    if !wanted.is_empty() && !containers.iter().any(|container| container["name"] == wanted) {
        let message = format!("container {wanted} is not valid for pod {name}");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "BadRequest", message));
    }
    Ok(())
}
