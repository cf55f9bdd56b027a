//! Chooses the session that carries the next stream, and opens the stream.

use super::registration::{Retired, retire};
use super::{Live, Presence, Registry, SessionId};
use std::thread;
use std::time::Duration;
use tokio::time::timeout;
use towline_certs::ClusterUid;
use towline_proto::mux::OpenError;
use towline_proto::tunnel::{Stream, Transport};

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
        let mut candidates: Vec<(Rank, Live)> = {
            let clusters = self.lock();
            let sessions = clusters.by_uid.get(uid).map_or(&[][..], |tunnel| &tunnel.sessions);
            let usable = |live: &&Live| !except.contains(&live.id) && live.session.is_open();
            sessions.iter().filter(usable).map(|live| (Rank::default(), live.clone())).collect()
        };
        // The sessions' own locks are not taken under the registry's.
        for (rank, live) in &mut candidates {
            *rank = Rank::of(live);
        }
        candidates.sort_by_key(|(rank, _)| *rank);
        let mut refusal = None;
        for (_, live) in candidates {
            let opened = timeout(OPEN_TIMEOUT, live.session.open()).await;
            match opened.unwrap_or(Err(OpenError::StreamsMax)) {
                Ok(stream) => {
                    self.rotate(&live);
                    return Ok((live.id, stream));
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
    fn rotate(&self, live: &Live) {
        if live.session.streams_left().1 < self.spare_ids {
            retire(live.id, &live.session, &live.retiring, Retired::StreamIds);
        }
    }
}

/// Orders sessions for the next stream; the least one carries it. Sessions that are being replaced come last. Before them come
/// silent ones, because a new stream must not wait until silence turns out to be death. QUIC comes before TCP, then the
/// lightest load, then the newest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    retiring: bool,
    silent: bool,
    tcp: bool,
    load: u32,
    newest: std::cmp::Reverse<u64>,
}

impl Rank {
    fn of(live: &Live) -> Self {
        let session = &live.session;
        let (tcp, streams) = (session.transport() == Transport::Tcp, session.stats().streams);
        Self {
            retiring: live.retiring.is_cancelled(),
            // An idle TCP session may be silent for longer; an agent on QUIC never is.
            silent: !tcp && session.silence() > SILENT,
            tcp,
            load: if live.shard == thread::current().id() { streams } else { ELSEWHERE + 2 * streams },
            newest: std::cmp::Reverse(live.id.0),
        }
    }
}
