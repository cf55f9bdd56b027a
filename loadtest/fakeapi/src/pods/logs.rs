//! Logs of a container: a few lines, more while followed, and tens of megabytes in the pod `biglog`.

use super::container;
use crate::body::{Response, channel};
use crate::call::Call;
use crate::status::ApiError;
use crate::store::now;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value;
use std::fmt::Write;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::sleep;

const LINES: u64 = 5;
const BIG_LINES: u64 = 200_000;
const CHUNK_BYTES: usize = 64 * 1024;
const FILLER: &str = "the quick brown fox jumps over the lazy dog, again and again and again";

/// `log?follow=&tailLines=&limitBytes=&timestamps=`.
pub(super) fn answer(call: &Call, pod: &Value, name: &str) -> Result<Response, ApiError> {
    container(call, pod, name)?;
    let query = &call.query;
    if query.has("tailLines") && query.number("tailLines").is_none() {
        return Err(ApiError::bad_request("tailLines must be a number that is not negative"));
    }
    if query.flag("previous") {
        return Err(ApiError::bad_request(format!(
            "previous terminated container in pod \"{name}\" not found"
        )));
    }
    let lines = if name == "biglog" { BIG_LINES } else { LINES };
    let (sender, body) = channel(2);
    let log = Log {
        name: name.to_owned(),
        first: lines - query.number("tailLines").unwrap_or(lines).min(lines),
        lines,
        timestamps: query.flag("timestamps"),
        left: query.number("limitBytes").unwrap_or(u64::MAX),
        follow: query.flag("follow").then_some(call.shared.options.log_interval),
        sender,
    };
    let stop = call.shared.stop.clone();
    call.shared.tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            _ = log.write() => {}
        }
    });
    let mut answer = http::Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Ok(answer)
}

struct Log {
    name: String,
    first: u64,
    lines: u64,
    timestamps: bool,
    left: u64,
    follow: Option<Duration>,
    sender: mpsc::Sender<Bytes>,
}

impl Log {
    /// Writes until the client is gone (`None`) or the log is at its end.
    async fn write(mut self) -> Option<()> {
        let mut text = String::new();
        for line in self.first..self.lines {
            self.line(&mut text, line);
            if text.len() > CHUNK_BYTES {
                self.send(std::mem::take(&mut text)).await?;
            }
        }
        self.send(text).await?;
        let pause = self.follow?;
        for line in self.lines.. {
            tokio::select! {
                () = self.sender.closed() => return None,
                () = sleep(pause) => {}
            }
            let mut text = String::new();
            self.line(&mut text, line);
            self.send(text).await?;
        }
        Some(())
    }

    fn line(&self, text: &mut String, line: u64) {
        if self.timestamps {
            text.push_str(&now());
            text.push(' ');
        }
        // Writing to a String cannot fail.
        writeln!(text, "{} line {line:010} {FILLER}", self.name).ok();
    }

    async fn send(&mut self, mut text: String) -> Option<()> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        // The text is ASCII, so any length is a boundary.
        text.truncate(most);
        self.left -= text.len() as u64;
        if !text.is_empty() {
            self.sender.send(Bytes::from(text)).await.ok()?;
        }
        (self.left > 0).then_some(())
    }
}
