//! Profiles: who speaks what, over which link, which arms, and a list of scenarios. The standard profiles are part of the
//! program; others are files of the same shape.

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

/// The standard profiles: name and text, in the order of a whole run.
pub const STANDARD: [(&str, &str); 8] = [
    ("http", include_str!("../../scenarios/http.yaml")),
    ("https", include_str!("../../scenarios/https.yaml")),
    ("live", include_str!("../../scenarios/live.yaml")),
    ("stalled", include_str!("../../scenarios/stalled.yaml")),
    ("growth", include_str!("../../scenarios/growth.yaml")),
    ("fleet", include_str!("../../scenarios/fleet.yaml")),
    ("wan", include_str!("../../scenarios/wan.yaml")),
    ("wan-loss", include_str!("../../scenarios/wan-loss.yaml")),
];

/// The largest datagram that passes a long line, without its IP and UDP headers: its packets are Ethernet's.
const ETHERNET: usize = 1_500 - 28;

/// A profile, as in its file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Plan {
    /// Its name in reports.
    pub profile: String,
    /// One sentence.
    pub about: String,
    /// Protocol of the clients.
    pub front: Scheme,
    /// Protocol of the upstream.
    pub upstream: Scheme,
    /// The link of the tunnel hop.
    #[serde(default)]
    pub link: Option<Link>,
    /// Interleaved rounds. Default 3.
    #[serde(default = "three")]
    pub rounds: usize,
    /// Seconds of each measurement. Default 1.5.
    #[serde(default = "seconds")]
    pub seconds: f64,
    /// Seconds before each measurement. Default 0.4.
    #[serde(default = "warmup")]
    pub warmup: f64,
    /// Number of simulated agents, for profiles that measure the gateway alone. Each arm has this many clusters.
    #[serde(default)]
    pub fleet: Option<usize>,
    /// Keys for the gateway's and the agent's configuration, for profiles that need more than the defaults allow.
    #[serde(default = "no_keys")]
    pub gateway: serde_json::Value,
    /// See `gateway`.
    #[serde(default = "no_keys")]
    pub agent: serde_json::Value,
    /// The arms by name; `file:PATH` describes another tunnel.
    pub arms: Vec<String>,
    /// In this order.
    pub scenarios: Vec<Scenario>,
}

fn no_keys() -> serde_json::Value {
    serde_json::json!({})
}
const fn three() -> usize {
    3
}
const fn seconds() -> f64 {
    1.5
}
const fn warmup() -> f64 {
    0.4
}

/// Plaintext or TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// Plaintext.
    Http,
    /// TLS.
    Https,
}

/// An emulated link; see [`towline_testkit::shim::Profile`].
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Link {
    /// There and back, in milliseconds.
    pub round_trip_ms: f64,
    /// Megabits per second in each direction.
    pub mbit: f64,
    /// Added to each way, evenly from zero to this, in milliseconds. Default 0.
    #[serde(default)]
    pub jitter_ms: f64,
    /// Lost, from 0 to 1. Default 0.
    #[serde(default)]
    pub loss: f64,
    /// Queue in front of the link, in milliseconds. Default 10.
    #[serde(default = "ten")]
    pub queue_ms: f64,
}

const fn ten() -> f64 {
    10.0
}

impl Link {
    /// For the relay.
    #[must_use]
    pub fn profile(&self) -> towline_testkit::shim::Profile {
        let ms = |value: f64| Duration::from_secs_f64(value / 1000.0);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be positive")]
        let bandwidth = (self.mbit * 1e6 / 8.0) as u64;
        towline_testkit::shim::Profile {
            delay: ms(self.round_trip_ms / 2.0),
            jitter: ms(self.jitter_ms),
            bandwidth: Some(bandwidth),
            queue: ms(self.queue_ms),
            loss: self.loss,
            mtu: Some(ETHERNET),
            ..towline_testkit::shim::Profile::default()
        }
    }

    /// In words.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("{} ms round trip, {} Mbit/s", self.round_trip_ms, self.mbit);
        if self.jitter_ms > 0.0 {
            text += &format!(", up to {} ms jitter", self.jitter_ms);
        }
        if self.loss > 0.0 {
            text += &format!(
                ", {} % loss (UDP: datagrams are dropped; TCP: emulated as the delay of the retransmission)",
                self.loss * 100.0
            );
        }
        text
    }
}

/// One measurement.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scenario {
    /// Its name in reports, unique in the file.
    pub name: String,
    /// Seconds, if not those of the profile.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Seconds before it, if not those of the profile.
    #[serde(default)]
    pub warmup: Option<f64>,
    /// The load.
    #[serde(flatten)]
    pub kind: Kind,
}

/// The load of a measurement.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Kind {
    /// Small requests on kept connections, each after the answer to the one before (closed loop).
    Requests {
        /// Connections.
        connections: usize,
        /// HTTP/2 with this many concurrent requests on each connection; HTTP/1.1 if absent.
        #[serde(default)]
        http2_streams: Option<usize>,
    },
    /// A new connection for every request.
    NewConnections {
        /// At a time.
        concurrency: usize,
    },
    /// A new connection and one answer, one after the other.
    Sequential,
    /// Large bodies.
    Bulk {
        /// Which way.
        direction: Direction,
        /// Connections.
        streams: usize,
        /// Number of additional downloads whose readers have stopped.
        #[serde(default)]
        stalled: usize,
    },
    /// Small requests at a fixed rate, timed from when they were to be sent (open loop), while something else happens.
    Probe {
        /// The other load.
        beside: Beside,
    },
    /// Connections that did one request each and do nothing now: what does each cost?
    IdleStreams {
        /// How many.
        connections: usize,
    },
    /// Open watches, each with events at a fixed rate: how late do they come?
    Watch {
        /// How many.
        watchers: usize,
        /// Events per second of each.
        rate: u32,
    },
    /// Interactive sessions: a keystroke and its echo.
    Exec {
        /// How many.
        sessions: usize,
        /// Keystrokes per second of each.
        rate: u32,
    },
    /// The daily mix of a fleet: small requests at a fixed rate, which are timed, open watches, and a few lists of 1 MiB.
    Mixed {
        /// Requests per second.
        rate: u32,
        /// Open watches with one event per second.
        watchers: usize,
    },
    /// Small requests while so many watches without events are open in the same session: what does a stream more cost?
    Streams {
        /// Open watches.
        open: usize,
        /// Connections with requests.
        connections: usize,
    },
    /// So many simulated agents with a session each, and nothing to do.
    Agents {
        /// How many.
        count: usize,
    },
    /// All simulated agents lose their sessions, and come back at once.
    Storm,
    /// Simulated agents lose their sessions and come back one by one.
    Churn {
        /// How many each second.
        per_second: u32,
    },
}

/// Which way a body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the client.
    Down,
    /// To the upstream.
    Up,
}

/// The load in addition to a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Beside {
    /// Nothing.
    Nothing,
    /// Four downloads as fast as they go.
    Saturating,
    /// Four downloads whose readers read 25 MB/s each.
    Paced,
    /// Four downloads whose readers have stopped.
    Stalled,
}

impl Kind {
    /// Whether GETs of an ordinary API server are enough for it.
    #[must_use]
    pub const fn only_gets(&self) -> bool {
        matches!(
            self,
            Self::Requests { .. }
                | Self::NewConnections { .. }
                | Self::Sequential
                | Self::Probe { beside: Beside::Nothing }
                | Self::IdleStreams { .. }
        )
    }

    /// Whether it concerns only Towline: its sessions and agents.
    #[must_use]
    pub const fn only_product(&self) -> bool {
        matches!(self, Self::Streams { .. } | Self::Agents { .. } | Self::Storm | Self::Churn { .. })
    }
}

impl Plan {
    /// Whether anything is left to measure.
    #[must_use]
    pub const fn has_work(&self) -> bool {
        !self.scenarios.is_empty() && !self.arms.is_empty()
    }

    /// A standard profile.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn standard(name: &str) -> anyhow::Result<Self> {
        let Some((_, text)) = STANDARD.iter().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = STANDARD.iter().map(|(name, _)| *name).collect();
            bail!("there is no profile {name}. Use {}, or a file", names.join(", "));
        };
        Self::parse(text, name)
    }

    /// A profile from a file.
    ///
    /// # Errors
    /// It cannot be read, or contains an invalid value.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, &path.display().to_string())
    }

    fn parse(text: &str, origin: &str) -> anyhow::Result<Self> {
        let plan: Self = serde_saphyr::from_str(text).with_context(|| format!("in {origin}"))?;
        plan.check().with_context(|| format!("in {origin}"))?;
        Ok(plan)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.rounds > 0 && self.seconds > 0.0 && self.warmup >= 0.0,
            "rounds and times must be positive"
        );
        ensure!(!self.arms.is_empty() && !self.scenarios.is_empty(), "there are no arms, or no scenarios");
        for (index, scenario) in self.scenarios.iter().enumerate() {
            let twice = self.scenarios[..index].iter().any(|other| other.name == scenario.name);
            ensure!(!twice, "two scenarios have the name {}", scenario.name);
        }
        if let Some(link) = &self.link {
            let times = link.round_trip_ms >= 0.0 && link.jitter_ms >= 0.0 && link.queue_ms >= 0.0;
            ensure!(times && link.mbit > 0.0, "a link needs a positive bandwidth and non-negative times");
            ensure!((0.0..1.0).contains(&link.loss), "loss is a fraction from 0 to below 1");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: each built-in profile can be read, has the name by which it is requested, and compares Towline with something.
    #[test]
    fn the_standard_profiles_are_whole() {
        for (name, _) in STANDARD {
            let plan = Plan::standard(name).unwrap();
            assert_eq!(plan.profile, name);
            assert!(plan.arms.iter().any(|arm| arm.starts_with("towline-")), "{name}");
        }
        assert!(Plan::standard("none").unwrap_err().to_string().contains("http, https"));
    }

    /// Goal: a mistake in a file is refused, with what is wrong.
    #[test]
    fn mistakes_are_refused() {
        let good = include_str!("../../scenarios/wan.yaml");
        for (from, to, says) in [
            ("rounds: ", "runds: ", "runds"),
            ("mbit: 1000", "mbit: 0", "bandwidth"),
            ("name: down16", "name: down1", "two scenarios"),
            ("direction: down", "direction: sideways", "sideways"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let error = format!("{:#}", Plan::parse(&bad, "test").unwrap_err());
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
