//! Memory for unread request bodies over HTTP/2. A body first reserves what may be unread of it: from its connection, from its
//! principal's share and from the process.
//!
//! A client may send as much of each body as the stream's window allows, and of all bodies of a connection as much as the connection's
//! window allows, whether the cluster behind reads it or not. If stalled uploads filled the connection's window, no other body on it would get
//! through, to any cluster. The reservations of a connection stay below its window, so nobody ever waits for the window.

use crate::access::AccessError;
use crate::metrics::Limit;
use crate::shares::{Part, Shares};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use towline_proto::mux::Held;

/// Most bytes of one body that a client may send before they are read: 256 KiB per round trip.
pub(crate) const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for all bodies of one connection: enough for a hundred concurrent uploads. h2 also uses it to limit frames that are smaller
/// than their bookkeeping: each unread frame takes at least 256 bytes of half of this window, so that 60,000
/// one-byte frames may arrive at once.
pub(crate) const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// The part of a connection's window for large bodies; the rest is for waiting and small ones.
const LARGE_MAX: u32 = CONNECTION_WINDOW / 4 * 3;
/// Most bytes of waiting bodies and those with a reservation together; more are refused at once.
const WAITING_MAX: u32 = CONNECTION_WINDOW - 8 * SMALL;
/// A body with at most this declared length is small: it gets a reservation while large ones do not.
const SMALL: u32 = 64 * 1024;
/// How long a body waits for a reservation. Meanwhile its bytes stay unread.
const PATIENCE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(25);

/// The reservations of one connection.
#[derive(Debug, Default)]
pub(crate) struct Unread(AtomicU32);

/// A reservation in a connection, released when it is dropped.
#[derive(Debug)]
struct Reservation(Arc<Unread>, u32);

impl Unread {
    fn take(self: &Arc<Self>, bytes: u32, max: u32) -> Option<Reservation> {
        let admit = |used: u32| used.checked_add(bytes).filter(|&after| after <= max);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).ok()?;
        Some(Reservation(Arc::clone(self), bytes))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.0.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// The reservation of one body.
#[derive(Debug)]
pub(crate) struct Room {
    _reservation: Reservation,
    _held: Held,
    _share: Part<String>,
}

/// Reserves memory for a body of this or of unknown length. Cancel safe.
///
/// # Errors
/// The limit that was reached the whole time.
pub(crate) async fn room(
    uploads: &Arc<Shares<String>>,
    connection: &Arc<Unread>,
    principal: &str,
    length: Option<u64>,
) -> Result<Room, AccessError> {
    let bytes = length
        .and_then(|length| u32::try_from(length).ok())
        .map_or(STREAM_WINDOW, |length| length.min(STREAM_WINDOW));
    let max = if bytes <= SMALL { CONNECTION_WINDOW } else { LARGE_MAX };
    let try_take = || {
        let reservation = connection.take(bytes, max).ok_or(Limit::UploadsPerConnection)?;
        let share = uploads.of(&principal.to_owned());
        match share.budget().hold(bytes as usize) {
            Some(held) => Ok(Room { _reservation: reservation, _held: held, _share: share }),
            None if share.is_full() => Err(Limit::UploadMemoryPerPrincipal),
            None => Err(Limit::UploadMemory),
        }
    };
    let mut refused = match try_take() {
        Ok(room) => return Ok(room),
        Err(limit) => limit,
    };
    // Its sent bytes count while it waits.
    if let Some(_waiting) = connection.take(bytes, WAITING_MAX) {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            tokio::time::sleep(LOOK).await;
            match try_take() {
                Ok(room) => return Ok(room),
                Err(limit) => refused = limit,
            }
        }
    }
    let what = match refused {
        Limit::UploadsPerConnection => "request bodies waiting to be read on this connection",
        Limit::UploadMemoryPerPrincipal => "request bodies of yours waiting to be read",
        _ => "request bodies for the gateway's memory",
    };
    Err(AccessError::Limit(refused, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Goal: FR-03: what is unread in one connection stays below its window, whatever its uploads do, and small bodies get room beside
    /// as many large ones as there may be.
    #[tokio::test(start_paused = true)]
    async fn fr_03_unread_bytes_stay_below_the_window_of_the_connection() {
        let uploads = Shares::new(64 * MIB, 32 * MIB);
        let connection = Arc::<Unread>::default();
        let mut rooms = Vec::new();
        while let Ok(room) = room(&uploads, &connection, "one", None).await {
            rooms.push(room);
        }
        assert_eq!(rooms.len(), (LARGE_MAX / STREAM_WINDOW) as usize);
        let began = Instant::now();
        let refused = room(&uploads, &connection, "one", Some(1 << 30)).await.unwrap_err();
        assert!(matches!(refused, AccessError::Limit(Limit::UploadsPerConnection, _)), "{refused:?}");
        assert!(began.elapsed() >= PATIENCE, "it waits");
        // Those who wait count, and those who find as many waiting do not wait.
        let many = futures_of(&uploads, &connection, 100).await;
        assert!(many.iter().all(Result::is_err));
        for _ in 0..8 {
            rooms.push(room(&uploads, &connection, "one", Some(SMALL.into())).await.unwrap());
        }
        assert!(connection.0.load(Ordering::Relaxed) <= CONNECTION_WINDOW);
        let other = Arc::<Unread>::default();
        assert!(room(&uploads, &other, "one", None).await.is_ok(), "another connection");
        rooms.clear();
        assert!(room(&uploads, &connection, "one", None).await.is_ok());
        assert_eq!((connection.0.load(Ordering::Relaxed), uploads.used()), (0, 0));
    }

    async fn futures_of(
        uploads: &Arc<Shares<String>>,
        connection: &Arc<Unread>,
        count: usize,
    ) -> Vec<Result<Room, AccessError>> {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..count {
            let (uploads, connection) = (Arc::clone(uploads), Arc::clone(connection));
            tasks.spawn(async move { room(&uploads, &connection, "one", None).await });
        }
        tokio::time::sleep(PATIENCE / 2).await;
        let unread = connection.0.load(Ordering::Relaxed);
        assert!(unread <= WAITING_MAX && unread > LARGE_MAX, "{unread}");
        tasks.join_all().await
    }

    /// Goal: FR-03: one principal's uploads leave the others their share, and a released reservation goes to a waiting body.
    #[tokio::test(start_paused = true)]
    async fn fr_03_one_principal_leaves_the_others_room() {
        let uploads = Shares::new(64 * MIB, 4 * MIB);
        let mut rooms = Vec::new();
        for _ in 0..4 {
            let connection = Arc::<Unread>::default();
            for _ in 0..4 {
                rooms.push(room(&uploads, &connection, "greedy", None).await.unwrap());
            }
        }
        let connection = Arc::<Unread>::default();
        let refused = room(&uploads, &connection, "greedy", None).await.unwrap_err();
        assert!(matches!(refused, AccessError::Limit(Limit::UploadMemoryPerPrincipal, _)), "{refused:?}");
        let _other = room(&uploads, &connection, "other", None).await.unwrap();
        let (waited, ()) = tokio::join!(room(&uploads, &connection, "greedy", None), async {
            tokio::time::sleep(PATIENCE / 2).await;
            rooms.pop();
        });
        assert!(waited.is_ok(), "it waits for a moment rather than to be refused");
    }
}
