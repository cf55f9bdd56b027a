//! Congestion control for QUIC: keeps in flight what the path has delivered in a round trip, and a little more for its
//! queue.
//!
//! quinn's BBR takes the rate between two acknowledgements for the rate of the path. Acknowledgements arrive in bursts, so BBR
//! estimates many times the real rate, and only the send window limits the data in flight: every queue in front of a slower link
//! overflows, and small requests wait behind it. This file limits BBR's value to what the path delivers: bytes acknowledged over
//! whole round trips, the best of the last few (`docs/performance.md`, T9).

use quinn::congestion::{BbrConfig, Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that may be sent and not yet acknowledged: enough for 1 Gbit/s at 60 ms.
pub(super) const SEND_WINDOW: u64 = 8 << 20;
/// Shortest time over which a rate is measured: a shorter time would measure the scheduling of processes.
const ROUND_MIN: Duration = Duration::from_millis(10);
/// Number of rounds whose best rate is taken as the path's rate.
const ROUNDS: usize = 10;
/// Rounds in which the path was full and brought no quarter more or less, after which the bound holds; as many that were not full end it.
const FLAT: u32 = 3;
/// A path that loses more than this part of what it delivers is full; less may be its nature.
const LOSS: u64 = 16;
/// Data that may wait in the path's queue, as time: this, or a tenth of the round trip. The same surplus detects a faster path.
const QUEUE: Duration = Duration::from_millis(5);
/// How long the lowest round trip is valid, up to twice this time. BBR empties the queue every ten seconds.
const LOWEST_FOR: Duration = Duration::from_secs(10);
/// A round that took so many round trips was a pause.
const PAUSE: u32 = 8;
/// The bound is never lower: four packets of bulk, of any size; or, while there is little to send, a burst of small messages.
const BOUND_MIN: u64 = 16 * 1024;
const BURST: u64 = 256 * 1024;

/// Makes BBR controllers within the bound.
#[derive(Debug, Default)]
pub(super) struct BoundedBbr(Arc<BbrConfig>);

impl ControllerFactory for BoundedBbr {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let bbr = Arc::clone(&self.0).build(now, current_mtu);
        Box::new(Bounded { bbr, delivery: Delivery::default() })
    }
}

struct Bounded {
    bbr: Box<dyn Controller>,
    delivery: Delivery,
}

impl Controller for Bounded {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.bbr.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.delivery.on_ack(now, bytes, rtt.get(), rtt.min());
        self.bbr.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        // quinn treats data held back by the send window as having nothing to send.
        self.delivery.on_end_acks(now, app_limited && in_flight < SEND_WINDOW / 2);
        self.bbr.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.delivery.lost += lost_bytes;
        self.bbr.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.bbr.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.bbr.window().min(self.delivery.bound)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.bbr.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { bbr: self.bbr.clone_box(), delivery: self.delivery.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.bbr.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The measured delivery rate of the path.
#[derive(Clone, Debug)]
struct Delivery {
    /// The current round: its start, its bytes so far, and whether more could have been sent.
    began: Option<Instant>,
    acked: u64,
    lost: u64,
    limited: bool,
    /// Bytes per second in the last rounds, and where the next one goes.
    rates: [u64; ROUNDS],
    next: usize,
    /// The rate that growth is measured from, and the rounds without growth.
    mark: u64,
    flat: u32,
    /// The smoothed round trip, and the shortest there ever was.
    rtt: Duration,
    least: Duration,
    /// The lowest smoothed round trip of this period and of the one before, and when this one began.
    lowest: [Duration; 2],
    period: Option<Instant>,
    /// The rate fell under the bound, as on a path that has become slightly longer.
    is_longer: bool,
    /// Bytes that may be under way.
    bound: u64,
}

impl Default for Delivery {
    fn default() -> Self {
        Self {
            began: None,
            acked: 0,
            lost: 0,
            limited: false,
            rates: [0; ROUNDS],
            next: 0,
            mark: 0,
            flat: 0,
            rtt: Duration::ZERO,
            least: Duration::ZERO,
            lowest: [Duration::MAX; 2],
            period: None,
            is_longer: false,
            bound: u64::MAX,
        }
    }
}

impl Delivery {
    /// Counts acknowledged bytes.
    fn on_ack(&mut self, now: Instant, bytes: u64, rtt: Duration, least: Duration) {
        (self.rtt, self.least) = (rtt, least);
        self.acked += bytes;
        let period = *self.period.get_or_insert(now);
        if now.saturating_duration_since(period) > LOWEST_FOR {
            self.lowest = [Duration::MAX, self.lowest[0]];
            self.period = Some(now);
        }
        self.lowest[0] = self.lowest[0].min(rtt);
    }

    /// Ends the round if it is over. `limited`: there was little to send.
    #[expect(clippy::indexing_slicing, reason = "`next` is a remainder")]
    fn on_end_acks(&mut self, now: Instant, limited: bool) {
        self.limited |= limited;
        // While a new path is validated, only packets of the old path are acknowledged, which are not counted.
        if self.acked == 0 {
            return;
        }
        let elapsed = now.saturating_duration_since(*self.began.get_or_insert(now));
        let round = self.least.max(ROUND_MIN);
        if elapsed < round {
            return;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let (acked, lost) = (std::mem::take(&mut self.acked), std::mem::take(&mut self.lost));
        let limited = std::mem::take(&mut self.limited);
        self.began = Some(now);
        // A pause is not a round.
        if elapsed > PAUSE * round.max(self.rtt) {
            return;
        }
        let rate = acked.saturating_mul(1_000_000) / micros;
        let (path, best) = (self.round_trip(), self.best());
        let queue = queue_of(path);
        // A burst of small messages is a queue, too.
        let is_full = lost.saturating_mul(LOSS) > acked || !limited && self.rtt >= path + queue / 2;
        // A round with little to send is evidence only if its rate is good.
        if !limited || rate > best {
            self.rates[self.next] = rate;
            self.next = (self.next + 1) % ROUNDS;
        }
        let best = self.best();
        if best > self.mark + self.mark / 4 || best < self.mark - self.mark / 4 {
            // A rate that falls may be the bound's own doing: of a path that has become longer, or loses much.
            self.is_longer |= best < self.mark && self.bound < u64::MAX;
            (self.mark, self.flat) = (best, 0);
        } else if is_full {
            self.flat = (self.flat + 1).min(FLAT);
        } else if !limited {
            // With the maximum in flight there is no queue, so the path may carry more.
            self.flat = self.flat.saturating_sub(1);
        }
        let is_bound = self.bound < u64::MAX;
        self.bound = if self.flat >= FLAT || is_bound && self.flat > 0 {
            let micros = u64::try_from((path + queue).as_micros()).unwrap_or(u64::MAX);
            let least = if limited { BURST } else { BOUND_MIN };
            (best.saturating_mul(micros) / 1_000_000).max(least)
        } else {
            u64::MAX
        };
    }

    fn best(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or_default()
    }

    /// The round trip without a queue: the shortest there ever was, unless for seconds nothing came near it. Then the path has become
    /// a longer one, and to go by the old length would starve it.
    fn round_trip(&self) -> Duration {
        let lately = self.lowest[0].min(self.lowest[1]);
        let near = if self.is_longer { 1 } else { 3 } * queue_of(self.least);
        if lately < Duration::MAX && lately > self.least + near {
            self.least.max(lately.saturating_sub(queue_of(lately)))
        } else {
            self.least
        }
    }
}

/// The allowed queue of a path with this round trip.
fn queue_of(path: Duration) -> Duration {
    QUEUE.max(path / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    /// A path of so many bytes per second, with a queue in front.
    struct Path {
        delivery: Delivery,
        now: Instant,
        trip: Duration,
        rate: u64,
        /// Of a thousand bytes.
        lost: u128,
    }

    impl Path {
        fn new(trip: u64, rate: u64) -> Self {
            let (mut delivery, now, trip) =
                (Delivery::default(), Instant::now(), Duration::from_millis(trip));
            // The handshake.
            delivery.on_ack(now, 1200, trip, trip);
            delivery.on_end_acks(now, true);
            Self { delivery, now, trip, rate, lost: 0 }
        }

        /// Keeps as much in flight as the bound allows, or `most` bytes, and returns the final queue as time.
        fn fill(&mut self, time: Duration, most: u64) -> Duration {
            let mut queue = Duration::ZERO;
            for _ in 0..time.as_millis() {
                self.now += STEP;
                let under_way = u128::from(self.delivery.bound.min(most));
                let fits = self.trip.as_micros() * u128::from(self.rate) / 1_000_000;
                queue = micros(under_way.saturating_sub(fits) * 1_000_000 / u128::from(self.rate));
                let left = under_way * STEP.as_micros() / (self.trip + queue).as_micros();
                let acked = left * (1000 - self.lost) / 1000;
                self.delivery.lost += u64::try_from(left - acked).unwrap();
                self.delivery.on_ack(
                    self.now,
                    u64::try_from(acked).unwrap(),
                    self.trip + queue,
                    self.delivery.least.min(self.trip),
                );
                self.delivery.on_end_acks(self.now, false);
            }
            queue
        }

        /// Sends so many bytes per second for ten seconds, which leave the path empty.
        fn trickle(&mut self, rate: u64) {
            for _ in 0..10_000 {
                self.now += STEP;
                self.delivery.on_ack(self.now, rate / 1000, self.trip, self.trip);
                self.delivery.on_end_acks(self.now, true);
            }
        }
    }

    fn micros(micros: u128) -> Duration {
        Duration::from_micros(u64::try_from(micros).unwrap())
    }

    /// Whatever the path is like, what waits in front of it is bound soon, and stays so; the path stays full.
    #[test]
    fn a_full_path_keeps_a_short_queue() {
        for trip in [1, 10, 50, 200] {
            for rate in [1_000_000, 12_500_000, 125_000_000] {
                let mut path = Path::new(trip, rate);
                let first = path.fill(STEP, SEND_WINDOW);
                path.fill(Duration::from_secs(60), SEND_WINDOW);
                let most = rate.min(SEND_WINDOW * 1000 / trip);
                for _ in 0..100 {
                    let queue = path.fill(Duration::from_millis(500), SEND_WINDOW);
                    let few = micros(u128::from(BOUND_MIN) * 1_000_000 / u128::from(rate));
                    let allowed = (queue_of(path.trip) * 2).max(few).min(first);
                    assert!(queue <= allowed, "{trip} ms, {rate}/s: {queue:?} of {allowed:?}");
                    let best = path.delivery.best();
                    assert!(best >= most / 100 * 95, "{trip} ms, {rate}/s: {best}");
                }
            }
        }
    }

    /// Little data is no evidence about the path, before bulk and after it.
    #[test]
    fn little_data_sets_no_bound() {
        let mut path = Path::new(50, 125_000_000);
        path.trickle(50_000);
        // A request's data in flight, with nothing holding it back.
        path.fill(Duration::from_secs(10), 20_000);
        assert_eq!(path.delivery.bound, u64::MAX);
        path.fill(Duration::from_secs(10), SEND_WINDOW);
        let bound = path.delivery.bound;
        assert!(bound < SEND_WINDOW, "{bound}");
        path.trickle(50_000);
        assert_eq!(path.delivery.bound, bound);
    }

    /// A path that becomes longer or faster is used fully, without a lasting long queue.
    #[test]
    fn a_changed_path_does_not_starve() {
        for (trip, rate) in
            [(200, 12_500_000), (30, 12_500_000), (36, 12_500_000), (10, 125_000_000), (5, 1_000_000)]
        {
            let mut path = Path::new(20, 12_500_000);
            path.fill(Duration::from_secs(10), SEND_WINDOW);
            (path.trip, path.rate) = (Duration::from_millis(trip), rate);
            path.fill(Duration::from_secs(30), SEND_WINDOW);
            let (mut rates, mut short) = (0, 0);
            for _ in 0..600 {
                let queue = path.fill(Duration::from_millis(100), SEND_WINDOW);
                short += usize::from(queue <= queue_of(path.trip) * 3);
                rates += path.delivery.rates[(path.delivery.next + ROUNDS - 1) % ROUNDS] / 600;
            }
            assert!(rates >= rate / 100 * 85, "{trip} ms, {rate}/s: {rates}");
            assert!(short >= 500, "{trip} ms, {rate}/s: {short} of 600");
        }
    }

    /// A path that loses a hundredth is not considered full; one that loses more keeps its rate, for any duration.
    #[test]
    fn losses_do_not_starve() {
        for per_mille in [10, 100, 200] {
            let mut path = Path { lost: per_mille, ..Path::new(50, 125_000_000) };
            path.fill(Duration::from_secs(5), 6_000_000);
            assert!(per_mille > 10 || path.delivery.bound == u64::MAX, "{}", path.delivery.bound);
            let mut rates = 0;
            for _ in 0..600 {
                path.fill(Duration::from_millis(100), 6_000_000);
                rates += path.delivery.rates[(path.delivery.next + ROUNDS - 1) % ROUNDS] / 600;
            }
            let most = 120_000_000 * (1000 - u64::try_from(per_mille).unwrap()) / 1000;
            assert!(rates >= most / 100 * 80, "{per_mille} of a thousand lost: {rates} of {most}");
        }
    }

    /// While a new path is validated, acknowledgements are not counted; and a pause is not a slow path.
    #[test]
    fn silence_is_no_evidence_about_the_path() {
        let mut path = Path::new(50, 125_000_000);
        path.fill(Duration::from_secs(10), SEND_WINDOW);
        let (bound, best) = (path.delivery.bound, path.delivery.best());
        assert!(bound < SEND_WINDOW, "{bound}");
        for _ in 0..20 {
            path.now += Duration::from_millis(100);
            path.delivery.on_end_acks(path.now, false);
        }
        assert_eq!((path.delivery.bound, path.delivery.best()), (bound, best));
        for _ in 0..20 {
            path.now += Duration::from_secs(10);
            path.delivery.on_ack(path.now, 1200, path.trip, path.trip);
            path.delivery.on_end_acks(path.now, false);
        }
        assert_eq!((path.delivery.bound, path.delivery.best()), (bound, best));
    }

    /// Small messages that leave in bursts queue for a moment, and are neither bound by that nor by what they need on average.
    #[test]
    fn bursts_of_small_messages_pass() {
        let mut path = Path::new(50, 125_000_000);
        let bursts = |path: &mut Path| {
            for _ in 0..200 {
                path.now += Duration::from_millis(54);
                path.delivery.on_ack(path.now, 77_000, Duration::from_millis(54), path.trip);
                path.delivery.on_end_acks(path.now, true);
            }
        };
        bursts(&mut path);
        assert_eq!(path.delivery.bound, u64::MAX);
        let mut slow = Path::new(50, 2_000_000);
        slow.fill(Duration::from_secs(10), SEND_WINDOW);
        assert!(slow.delivery.bound < BURST, "{}", slow.delivery.bound);
        bursts(&mut slow);
        assert_eq!(slow.delivery.bound, BURST);
    }
}
