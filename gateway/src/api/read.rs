//! GET, list and watch of the fleet's API: objects, pages and events, as JSON or as tables.

use super::error::{ApiError, json_response};
use super::feed::{Feed, Version};
use super::kinds::{API_VERSION, Resource};
use super::query::{Included, Options};
use super::selector::Selector;
use super::{Call, table};
use crate::web::body::{AnswerBody, Basis};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, sleep, sleep_until};
use towline_model::random::random;

/// Events that are buffered for a slow client. After that the watch waits for the client, and may fall behind the history.
const EVENTS_WAITING: usize = 16;
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// Default and longest duration of a watch.
const WATCH_SECONDS: u64 = 1800;
const WATCH_SECONDS_MOST: u64 = 3600;

/// One object.
pub(super) fn get(
    call: &Call,
    resource: &'static Resource,
    name: &str,
) -> Result<Response<AnswerBody>, ApiError> {
    let text = call.query.get("resourceVersion");
    if let Some(version @ Version::Future) = asked(call, text)? {
        return Err(gone(version, text));
    }
    let object = call.api.feed.object(resource, name).ok_or_else(|| ApiError::not_found(resource, name))?;
    Ok(shown(call, resource, StatusCode::OK, &object))
}

/// An object, as JSON or as a table.
pub(super) fn shown(
    call: &Call,
    resource: &Resource,
    status: StatusCode,
    object: &Value,
) -> Response<AnswerBody> {
    if !table::is_asked(call.accept()) {
        return json_response(status, object);
    }
    let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
    json_response(status, &table::table(resource, &[object], metadata, true, call.query.include))
}

/// Parses the requested version: none, any, or a specific one.
fn asked(call: &Call, text: &str) -> Result<Option<Version>, ApiError> {
    match text {
        "" | "0" => Ok(None),
        text => match call.api.feed.version(text) {
            None => Err(ApiError::bad_request(format!("resourceVersion {text:?} is malformed"))),
            version => Ok(version),
        },
    }
}

fn gone(version: Version, text: &str) -> ApiError {
    let why = match version {
        Version::Future => "is newer than the current one, or comes from another gateway",
        Version::Past | Version::Known(_) => "is too old, or was issued before the gateway's last start",
    };
    ApiError::expired(format!("resourceVersion {text} {why}: list again"))
}

/// A page of a collection. Pages are taken from the current objects; a forgotten first page is detected.
pub(super) fn list(call: &Call, resource: &'static Resource) -> Result<Response<AnswerBody>, ApiError> {
    let options = Options::read(&call.query, false)?;
    let text = options.version.as_str();
    let (first, after) = if options.from.is_empty() {
        if let Some(version) = asked(call, text)? {
            match version {
                Version::Future => return Err(gone(version, text)),
                _ if options.exact && text != call.api.feed.text(call.api.feed.objects(resource, None).1) => {
                    return Err(gone(Version::Past, text));
                }
                _ => {}
            }
        }
        (None, None)
    } else {
        let (first, after) = read_continue(&options.from)?;
        match call.api.feed.version(&first) {
            Some(Version::Known(_)) => (Some(first), Some(after)),
            _ => return Err(ApiError::expired("the continue token is too old: list again from the start")),
        }
    };
    let (mut objects, version) = call.api.feed.objects(resource, after.as_deref());
    objects.retain(|object| options.selector.matches(object));
    let version = first.unwrap_or_else(|| call.api.feed.text(version));
    let mut metadata = json!({"resourceVersion": version});
    let limit = options.limit;
    if limit > 0 && objects.len() > limit {
        metadata["remainingItemCount"] = (objects.len() - limit).into();
        objects.truncate(limit);
        let last = objects.last().map(|object| object["metadata"]["name"].clone()).unwrap_or_default();
        let next = format!("{version}\n{}", last.as_str().unwrap_or_default());
        metadata["continue"] = URL_SAFE_NO_PAD.encode(next).into();
    }
    let objects: Vec<&Value> = objects.iter().map(AsRef::as_ref).collect();
    let answer = if table::is_asked(call.accept()) {
        table::table(resource, &objects, metadata, true, call.query.include)
    } else {
        let kind = format!("{}List", resource.kind);
        json!({"kind": kind, "apiVersion": API_VERSION, "metadata": metadata, "items": objects})
    };
    Ok(json_response(StatusCode::OK, &answer))
}

fn read_continue(token: &str) -> Result<(String, String), ApiError> {
    let text = URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let parts = text.as_deref().and_then(|text| text.split_once('\n'));
    let parts = parts.map(|(first, after)| (first.to_owned(), after.to_owned()));
    parts.ok_or_else(|| ApiError::bad_request("the continue token is malformed"))
}

/// Where a watch begins.
enum Start {
    /// With the current objects, and then, if true, a bookmark that marks their end.
    Listed(bool),
    After(u64),
}

/// Starts a watch: the response's head is sent at once, then each event as a line.
pub(super) fn watch(call: &Call, resource: &'static Resource) -> Result<Response<AnswerBody>, ApiError> {
    let Options { selector, bookmarks, initial, version: text, timeout_seconds, .. } =
        Options::read(&call.query, true)?;
    let start = match (initial, asked(call, &text)?) {
        (_, Some(version @ Version::Future)) => return Err(gone(version, &text)),
        // The current state is not older than any earlier one.
        (Some(true), _) => Start::Listed(true),
        (_, Some(version @ Version::Past)) => return Err(gone(version, &text)),
        (_, Some(Version::Known(number))) => Start::After(number),
        (Some(false), None) => Start::After(call.api.feed.objects(resource, None).1),
        (None, None) => Start::Listed(false),
    };
    let seconds = match timeout_seconds {
        0 => {
            let mut part = [0];
            random(&mut part);
            // So that clients do not all return at once.
            WATCH_SECONDS + u64::from(part[0]) * 7
        }
        seconds => seconds,
    };
    let deadline = Instant::now() + Duration::from_secs(seconds.min(WATCH_SECONDS_MOST));
    let (events, body) = mpsc::channel(EVENTS_WAITING);
    let watch = WatchAnswer {
        feed: Arc::clone(&call.api.feed),
        resource,
        selector,
        events,
        table: table::is_asked(call.accept()),
        include: call.query.include,
        columns_sent: false,
        bookmarks,
    };
    let context = Arc::clone(&call.api.context);
    let ended = call.run.ended().clone();
    let basis = Basis::own(ended.clone());
    let mut part = [0];
    random(&mut part);
    let spread = context.config.drain.deadline.mul_f64(0.8 * f64::from(part[0]) / 255.0);
    let (draining, abort) = (context.stages.draining.clone(), context.stages.abort.clone());
    let drained = async move {
        draining.cancelled().await;
        sleep(spread).await;
    };
    context.tasks.front.spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = abort.cancelled() => {}
            () = drained => {}
            // The client left, the time is over, or the history has moved on.
            _ = watch.run(start, deadline) => {}
        }
    });
    let mut response = Response::new(AnswerBody::stream(body, Box::new(call.take_guards()), basis));
    let head = response.headers_mut();
    head.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    head.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

struct WatchAnswer {
    feed: Arc<Feed>,
    resource: &'static Resource,
    selector: Selector,
    events: mpsc::Sender<Bytes>,
    table: bool,
    include: Included,
    columns_sent: bool,
    bookmarks: bool,
}

impl WatchAnswer {
    /// Runs until the client leaves (`None`) or the watch ends.
    async fn run(mut self, start: Start, deadline: Instant) -> Option<()> {
        let mut news = self.feed.news();
        let mut reached = match start {
            Start::After(number) => number,
            Start::Listed(mark) => {
                let (mut objects, number) = self.feed.objects(self.resource, None);
                objects.retain(|object| self.selector.matches(object));
                for object in &objects {
                    self.send("ADDED", object).await?;
                }
                if mark {
                    self.bookmark(number, true).await?;
                }
                number
            }
        };
        let mut bookmark_due = interval_at(Instant::now() + BOOKMARK_INTERVAL, BOOKMARK_INTERVAL);
        loop {
            news.borrow_and_update();
            let Some((events, number)) = self.feed.events(self.resource, reached) else {
                let error = ApiError::expired("the watch has fallen behind: list again");
                return self.frame("ERROR", &error.object()).await;
            };
            for event in events {
                let matches = |object: &Option<Arc<Value>>| {
                    object.as_ref().is_some_and(|object| self.selector.matches(object))
                };
                let what = match (matches(&event.before), matches(&event.after)) {
                    (false, true) => "ADDED",
                    (true, true) => "MODIFIED",
                    (true, false) => "DELETED",
                    (false, false) => continue,
                };
                self.send(what, &event.last).await?;
            }
            reached = number;
            tokio::select! {
                changed = news.changed() => changed.ok()?,
                // Without this, a kind without events would keep the watch of a client that left until its time is over.
                () = self.events.closed() => return None,
                _ = bookmark_due.tick(), if self.bookmarks => self.bookmark(reached, false).await?,
                () = sleep_until(deadline) => {
                    if self.bookmarks {
                        self.bookmark(reached, false).await?;
                    }
                    return Some(());
                }
            }
        }
    }

    async fn send(&mut self, what: &str, object: &Value) -> Option<()> {
        if !self.table {
            return self.frame(what, object).await;
        }
        let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
        let columns = !std::mem::replace(&mut self.columns_sent, true);
        let table = table::table(self.resource, &[object], metadata, columns, self.include);
        self.frame(what, &table).await
    }

    async fn bookmark(&mut self, number: u64, initial_end: bool) -> Option<()> {
        let mut metadata = json!({"resourceVersion": self.feed.text(number)});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        if self.table {
            let columns = !std::mem::replace(&mut self.columns_sent, true);
            let mut table = table::table(self.resource, &[], metadata.clone(), columns, self.include);
            let object = json!({
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            });
            table["rows"] = json!([{"cells": [], "object": object}]);
            return self.frame("BOOKMARK", &table).await;
        }
        let object = json!({"kind": self.resource.kind, "apiVersion": API_VERSION, "metadata": metadata});
        self.frame("BOOKMARK", &object).await
    }

    async fn frame(&self, what: &str, object: &Value) -> Option<()> {
        let line = format!("{}\n", json!({"type": what, "object": object}));
        self.events.send(Bytes::from(line)).await.ok()
    }
}
