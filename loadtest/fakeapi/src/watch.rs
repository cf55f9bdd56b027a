//! Watches: every change once and in order, bookmarks, initial events, or 410 Gone.

use crate::body::{Response, channel};
use crate::call::Call;
use crate::kinds::Kind;
use crate::list::{revision_asked, too_large};
use crate::selector::Selector;
use crate::shared::Shared;
use crate::status::ApiError;
use crate::store::Change;
use crate::table;
use crate::target::Target;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval_at, sleep_until};

/// How long a watch lasts that did not say (a real server: 30 to 60 minutes).
const WATCH_SECONDS: u64 = 1800;

/// Starts a watch: the answer's head goes out at once, events follow one chunk each.
pub(crate) fn answer(call: &Call, target: &Target) -> Result<Response, ApiError> {
    let query = &call.query;
    let selector = Selector::parse(query.text("labelSelector"), query.text("fieldSelector"))?;
    let asked = revision_asked(call)?;
    let current = call.shared.store.revision();
    let bookmarks = query.flag("allowWatchBookmarks");
    let initial = query.flag("sendInitialEvents");
    if initial && (query.text("resourceVersionMatch") != "NotOlderThan" || !bookmarks) {
        let why = "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan and allowWatchBookmarks";
        return Err(ApiError::invalid("ListOptions", "", "sendInitialEvents", why));
    }
    if asked > current {
        return Err(too_large(asked, current));
    }
    let seconds = query.number("timeoutSeconds").unwrap_or(WATCH_SECONDS);
    let (events, body) = channel(1);
    let encoding = Encoding::asked(call.header("accept"));
    let watch = WatchAnswer {
        encoding,
        shared: Arc::clone(&call.shared),
        kind: target.kind,
        namespace: target.namespace.clone(),
        selector,
        events,
        table: table::is_asked(call.header("accept")),
        include: query.text("includeObject").to_owned(),
        columns_sent: false,
        bookmarks,
    };
    // `sendInitialEvents=false` starts at "now" even without a version.
    let start = match (initial, query.has("sendInitialEvents"), asked) {
        (true, ..) => Start::Listed(true),
        (false, true, 0) => Start::After(current),
        (false, false, 0) => Start::Listed(false),
        _ => Start::After(asked),
    };
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let stop = call.shared.stop.clone();
    call.shared.tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = sleep_until(deadline) => {}
            // The client is gone, or the watch ended itself.
            _ = watch.run(start) => {}
        }
    });
    let mut answer = http::Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(encoding.media()));
    Ok(answer)
}

/// Framing of events. The content is always JSON. These are the frames of a real server's encodings, for tests that request exactly
/// one of them, which no Kubernetes client does.
#[derive(Clone, Copy)]
enum Encoding {
    Lines,
    /// Behind its length, as protobuf is.
    Framed,
    /// As a sequence of CBOR byte strings.
    Cbor,
}

/// Whether a client asks for frames of an encoding that is not this server's own.
pub(crate) fn is_framed(accept: &str) -> bool {
    !matches!(Encoding::asked(accept), Encoding::Lines)
}

impl Encoding {
    fn asked(accept: &str) -> Self {
        let all = [Self::Framed, Self::Cbor];
        all.into_iter().find(|encoding| encoding.media() == accept).unwrap_or(Self::Lines)
    }

    const fn media(self) -> &'static str {
        match self {
            Self::Lines => "application/json",
            Self::Framed => "application/vnd.kubernetes.protobuf;stream=watch",
            Self::Cbor => "application/cbor-seq",
        }
    }

    fn frame(self, event: &str) -> Bytes {
        let length = u32::try_from(event.len()).unwrap_or(u32::MAX).to_be_bytes();
        match self {
            Self::Lines => [event.as_bytes(), b"\n"].concat().into(),
            Self::Framed => [&length[..], event.as_bytes()].concat().into(),
            Self::Cbor => [&[0x5a], &length[..], event.as_bytes()].concat().into(),
        }
    }
}

enum Start {
    /// With the existing objects first, and then optionally a bookmark that marks their end.
    Listed(bool),
    After(u64),
}

struct WatchAnswer {
    encoding: Encoding,
    shared: Arc<Shared>,
    kind: &'static Kind,
    namespace: String,
    selector: Selector,
    events: mpsc::Sender<Bytes>,
    table: bool,
    include: String,
    columns_sent: bool,
    bookmarks: bool,
}

impl WatchAnswer {
    /// Runs until the client is gone (`None`) or the watch has to end.
    async fn run(mut self, start: Start) -> Option<()> {
        let mut news = self.shared.store.subscribe();
        let mut reached = match start {
            Start::After(revision) => revision,
            Start::Listed(mark) => {
                let (objects, revision) = self.shared.store.list(self.kind, &self.namespace);
                for object in &objects {
                    if self.selector.matches(object) {
                        self.send("ADDED", object).await?;
                    }
                }
                if mark {
                    self.bookmark(revision, true).await?;
                }
                revision
            }
        };
        let period = self.shared.options.bookmark_interval;
        let mut bookmark_due = interval_at(Instant::now() + period, period);
        loop {
            news.borrow_and_update();
            match self.shared.store.changes(self.kind, reached) {
                Ok((changes, revision)) => {
                    for change in &changes {
                        self.change(change).await?;
                    }
                    reached = revision;
                }
                Err(too_old) => {
                    let message = format!("too old resource version: {reached} ({})", too_old.oldest);
                    let error = ApiError::expired(message);
                    return self.frame("ERROR", &error.object()).await;
                }
            }
            tokio::select! {
                () = self.events.closed() => return None,
                changed = news.changed() => changed.ok()?,
                _ = bookmark_due.tick(), if self.bookmarks => self.bookmark(reached, false).await?,
            }
        }
    }

    async fn change(&mut self, change: &Change) -> Option<()> {
        if !self.namespace.is_empty() && change.key.namespace != self.namespace {
            return Some(());
        }
        let selected =
            |object: &Option<Arc<Value>>| object.clone().filter(|object| self.selector.matches(object));
        match (selected(&change.before), selected(&change.after)) {
            (None, None) => Some(()),
            (None, Some(after)) => self.send("ADDED", &after).await,
            (Some(_), Some(after)) => self.send("MODIFIED", &after).await,
            (Some(before), None) => {
                // The last state, under the version of its end.
                let mut last = Value::clone(&before);
                last["metadata"]["resourceVersion"] = change.revision.to_string().into();
                self.send("DELETED", &last).await
            }
        }
    }

    async fn send(&mut self, event: &str, object: &Value) -> Option<()> {
        if !self.table {
            return self.frame(event, object).await;
        }
        let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
        let columns = !std::mem::replace(&mut self.columns_sent, true);
        let table = table::table(self.kind, &[object], metadata, columns, &self.include);
        self.frame(event, &table).await
    }

    async fn bookmark(&mut self, revision: u64, initial_end: bool) -> Option<()> {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = if self.table {
            let columns = !std::mem::replace(&mut self.columns_sent, true);
            table::table(self.kind, &[], metadata, columns, &self.include)
        } else {
            json!({"kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata})
        };
        self.frame("BOOKMARK", &object).await
    }

    async fn frame(&self, event: &str, object: &Value) -> Option<()> {
        let event = json!({"type": event, "object": object}).to_string();
        self.events.send(self.encoding.frame(&event)).await.ok()
    }
}
