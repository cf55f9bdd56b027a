//! Requests for exec and attach: the command, and which of its streams.

use super::container;
use super::process::Work;
use crate::call::Call;
use crate::status::ApiError;
use serde_json::Value;
use std::path::PathBuf;

/// A checked request for exec or attach.
#[derive(Debug)]
pub(crate) struct RemoteCommand {
    pub(crate) work: Work,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

impl RemoteCommand {
    pub(super) fn parse(
        call: &Call,
        pod: &Value,
        namespace: &str,
        name: &str,
        subresource: &str,
    ) -> Result<Self, ApiError> {
        container(call, pod, name)?;
        let query = &call.query;
        let attach = subresource == "attach";
        let tty = query.flag("tty");
        let (stdin, stdout) = (query.flag("stdin"), query.flag("stdout"));
        let stderr = query.flag("stderr") && !tty;
        if !stdin && !stdout && !stderr {
            return Err(ApiError::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
        }
        let work = if attach {
            Work::Echo { pause: call.shared.options.log_interval }
        } else {
            let arguments = query.all("command");
            if arguments.is_empty() {
                return Err(ApiError::bad_request("you must specify at least one command for the container"));
            }
            let directory: PathBuf = call.shared.pods.directory(namespace, name).map_err(|error| {
                ApiError::new(http::StatusCode::INTERNAL_SERVER_ERROR, "InternalError", error.to_string())
            })?;
            Work::Process { arguments, directory, tty, running: call.shared.pods.processes.clone() }
        };
        Ok(Self { work, stdin, stdout, stderr, tty })
    }
}
