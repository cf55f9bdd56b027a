//! Chooses the session that carries the next stream, and opens the stream.

use super::registration::{Retired, retire};
use super::{Live, Presence, Registry, SessionId};
use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::thread::{self, ThreadId};
use std::time::Duration;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use towline_certs::ClusterUid;
use towline_proto::mux::OpenError;
use towline_proto::tunnel::{Session, Stream, Transport};

/// After this much silence a QUIC session is skipped, if there is another one: an agent on QUIC sends a ping every
/// two seconds.
const SILENT: Duration = Duration::from_secs(3);
/// Load penalty for a session on another thread: it starts at 8 streams, and each of its streams counts double. Cross-thread
/// wake-ups are expensive, so we leave the caller's own session only when it carries most of the load.
pub(super) const ELSEWHERE: u32 = 8;
/// How long opening a stream may take: QUIC may wait until the peer allows another stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireError {
    /// No session, and none connected while waiting.
    NotConnected(Presence),
    /// Every session has reached its stream limit.
    StreamsMax,
    /// The memory for streams is used up.
    Memory,
}

impl Registry {
    /// Like [`Self::open`], without waiting.
    ///
    /// # Errors
    /// Why no stream was opened; nothing has been sent.
    pub async fn open_now(
        &self,
        uid: &ClusterUid,
        except: &[SessionId],
    ) -> Result<(SessionId, Stream), AcquireError> {
        let mut candidates = {
            let clusters = self.lock();
            let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
            let usable = |live: &&Live| !except.contains(&live.id) && live.session.is_open();
            // No more than these: a vector that grows by itself begins with room for four.
            let mut candidates = Vec::with_capacity(sessions.len());
            candidates.extend(sessions.iter().filter(usable).map(Candidate::of));
            candidates
        };
        // The usual case is one session. The sessions' own locks are not taken under the registry's.
        if candidates.len() > 1 {
            candidates.sort_by_cached_key(Rank::of);
        }
        let mut refusal = None;
        for candidate in candidates {
            match open_in_time(&candidate.session).await {
                Ok(stream) => {
                    self.rotate(&candidate);
                    return Ok((candidate.id, stream));
                }
                Err(OpenError::StreamsMax) => refusal = Some(AcquireError::StreamsMax),
                Err(OpenError::Memory) => refusal = Some(AcquireError::Memory),
                // The session ended or began to drain since the lookup: treat it as absent.
                Err(
                    OpenError::NotReady | OpenError::Draining | OpenError::IdsExhausted | OpenError::Closed,
                ) => {}
            }
        }
        Err(refusal.unwrap_or_else(|| AcquireError::NotConnected(self.presence(uid))))
    }

    /// Replaces a session whose stream ids are nearly used up: its agent opens a new one before this one ends.
    fn rotate(&self, candidate: &Candidate) {
        if candidate.session.streams_left().1 < self.spare_ids {
            retire(candidate.id, &candidate.session, &candidate.retiring, Retired::StreamIds);
        }
    }
}

/// A session that may carry the next stream: the part of [`Live`] that this needs, because every request copies it.
struct Candidate {
    id: SessionId,
    session: Session,
    shard: ThreadId,
    retiring: CancellationToken,
}

impl Candidate {
    fn of(live: &Live) -> Self {
        let Live { id, session, shard, retiring, .. } = live;
        Self { id: *id, session: session.clone(), shard: *shard, retiring: retiring.clone() }
    }
}

/// Opens a stream. A session that cannot do so at once has [`OPEN_TIMEOUT`], and is full after that.
async fn open_in_time(session: &Session) -> Result<Stream, OpenError> {
    let mut opening = pin!(session.open());
    match poll_fn(|cx| Poll::Ready(opening.as_mut().poll(cx))).await {
        // The usual case: no clock is read and no timer is created.
        Poll::Ready(opened) => opened,
        Poll::Pending => timeout(OPEN_TIMEOUT, opening).await.unwrap_or(Err(OpenError::StreamsMax)),
    }
}

/// Orders sessions for the next stream; the least one carries it. Sessions that are being replaced come last. Before them come
/// silent ones, because a new stream must not wait until silence turns out to be death. QUIC comes before TCP, then the
/// lightest load, then the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    retiring: bool,
    silent: bool,
    tcp: bool,
    load: u32,
    newest: std::cmp::Reverse<u64>,
}

impl Rank {
    fn of(candidate: &Candidate) -> Self {
        let session = &candidate.session;
        let (tcp, streams) = (session.transport() == Transport::Tcp, session.stats().streams);
        Self {
            retiring: candidate.retiring.is_cancelled(),
            // An idle TCP session may be silent for longer; an agent on QUIC never is.
            silent: !tcp && session.silence() > SILENT,
            tcp,
            load: if candidate.shard == thread::current().id() { streams } else { ELSEWHERE + 2 * streams },
            newest: std::cmp::Reverse(candidate.id.0),
        }
    }
}
