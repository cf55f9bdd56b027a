//! What runs behind a pod? Logs, real processes for exec, an echo for attach, small servers for port-forward.

mod logs;
mod process;
mod remote;
mod servers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::StatusCode;
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::body::Response;
use crate::call::Call;
use crate::status::ApiError;
use crate::{spdy, websocket};

pub(crate) use process::Output;
pub(crate) use remote::RemoteCommand;

/// The machine that all pods share: a scratch directory, running processes, two small servers.
pub(crate) struct PodHost {
    scratch: TempDir,
    processes: Arc<AtomicUsize>,
    web: SocketAddr,
    echo: SocketAddr,
}

impl PodHost {
    pub(crate) async fn start(tasks: &TaskTracker, stop: &CancellationToken) -> std::io::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("towline-fake-pods-").tempdir()?;
        let web = servers::web(tasks, stop).await?;
        let echo = servers::echo(tasks, stop).await?;
        Ok(Self { scratch, processes: Arc::default(), web, echo })
    }

    pub(crate) fn processes(&self) -> usize {
        self.processes.load(Ordering::Relaxed)
    }

    /// Where a container port of a pod really is: port 80 is a web server in `web`, port 7 an echo in every pod.
    pub(crate) fn port(&self, pod: &str, port: u16) -> Option<SocketAddr> {
        match (pod, port) {
            ("web", 80) => Some(self.web),
            (_, 7) => Some(self.echo),
            _ => None,
        }
    }

    /// The directory in which a pod's processes run; names were checked when the pod was made.
    fn directory(&self, namespace: &str, pod: &str) -> std::io::Result<PathBuf> {
        let directory = self.scratch.path().join(namespace).join(pod);
        std::fs::create_dir_all(&directory)?;
        Ok(directory)
    }
}

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
