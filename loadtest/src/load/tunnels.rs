//! Other tunnels for comparison. Each is a small file: the commands of both ends, with placeholders for addresses and
//! certificates. Ours are in `loadtest/tunnels`; `file:PATH` as the name of an arm takes any other.
//!
//! The *near* end takes clients, the *far* end speaks to the upstream. Placeholders, in commands and in files:
//!
//! | placeholder | what |
//! |---|---|
//! | `{front}` | where the near end listens for clients |
//! | `{tunnel}` | where the end that `listens` waits for the other one |
//! | `{peer}` | where the other one finds it: the same, or the emulated link in front of it |
//! | `{upstream}` | where the far end finds the upstream |
//! | `{upstream_scheme}` | `http` or `https` |
//! | `{front_options}` | ` ssl http2` if clients speak TLS, else nothing |
//! | `{certs}` | directory of `ca.crt`, `server.crt`, `server.key` for `localhost` |
//! | `{congestion}` | `bbr` over an emulated link, else `cubic` |
//! | `{dir}` | scratch directory of this arm; `files` are written there |
//! | `{self}` | this program |
//!
//! An address has its port alone as `{front_port}` and so on.

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use towline_testkit::stack::Process;

/// The tunnels that come with the program.
const KNOWN: [(&str, &str); 5] = [
    ("nginx2", include_str!("../../tunnels/nginx2.yaml")),
    ("rathole-tls", include_str!("../../tunnels/rathole-tls.yaml")),
    ("raw-tcp", include_str!("../../tunnels/raw-tcp.yaml")),
    ("raw-tls", include_str!("../../tunnels/raw-tls.yaml")),
    ("raw-quic", include_str!("../../tunnels/raw-quic.yaml")),
];
/// Deadline for an end to listen.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an end is given that cannot be asked whether it listens.
const UDP_START: Duration = Duration::from_millis(500);

/// A tunnel, as in its file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tunnel {
    /// The arm's name.
    pub name: String,
    /// One sentence.
    pub about: String,
    /// Which end listens for the other.
    pub listens: Side,
    /// On what.
    pub tunnel: Protocol,
    /// Whether its front speaks HTTP/2 over TLS.
    #[serde(default)]
    pub http2: bool,
    /// Prints the version.
    #[serde(default)]
    pub version: Vec<String>,
    /// How one gets the program.
    #[serde(default)]
    pub install: String,
    /// Runs once, before both ends.
    #[serde(default)]
    pub prepare: Vec<String>,
    /// The command of the near end.
    pub near: Vec<String>,
    /// The command of the far end.
    pub far: Vec<String>,
    /// Files in `{dir}`.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// An end of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Takes clients.
    Near,
    /// Speaks to the upstream.
    Far,
}

/// The protocol between the ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// The values of the placeholders.
#[derive(Clone, Debug)]
pub struct Places {
    /// `{front}`.
    pub front: SocketAddr,
    /// `{tunnel}`.
    pub tunnel: SocketAddr,
    /// `{peer}`.
    pub peer: SocketAddr,
    /// `{upstream}`.
    pub upstream: SocketAddr,
    /// `{upstream_scheme}` is `https`.
    pub upstream_tls: bool,
    /// `{front_options}` are those of TLS.
    pub front_tls: bool,
    /// `{congestion}`.
    pub congestion: &'static str,
    /// `{certs}`.
    pub certificates: PathBuf,
    /// `{dir}`.
    pub directory: PathBuf,
    /// `{self}`.
    pub own: PathBuf,
}

impl Places {
    fn fill(&self, text: &str) -> anyhow::Result<String> {
        let mut text = text.to_owned();
        for (name, address) in
            [("front", self.front), ("tunnel", self.tunnel), ("peer", self.peer), ("upstream", self.upstream)]
        {
            text = text.replace(&format!("{{{name}}}"), &address.to_string());
            text = text.replace(&format!("{{{name}_port}}"), &address.port().to_string());
        }
        for (name, value) in [
            ("upstream_scheme", if self.upstream_tls { "https" } else { "http" }),
            ("front_options", if self.front_tls { " ssl http2" } else { "" }),
            ("congestion", self.congestion),
            ("certs", self.certificates.to_str().context("an odd path")?),
            ("dir", self.directory.to_str().context("an odd path")?),
            ("self", self.own.to_str().context("an odd path")?),
        ] {
            text = text.replace(&format!("{{{name}}}"), value);
        }
        Ok(text)
    }
}

/// Why a tunnel is not started: its program is not there.
#[derive(Debug, thiserror::Error)]
#[error("{program} is not installed; get it with: {install}")]
pub struct Missing {
    program: String,
    install: String,
}

impl Tunnel {
    /// One that comes with the program, or `file:PATH`.
    ///
    /// # Errors
    /// There is none of this name, or the file is wrong.
    pub fn find(name: &str) -> anyhow::Result<Self> {
        let (text, origin) = if let Some(path) = name.strip_prefix("file:") {
            (std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?, path)
        } else {
            let Some((_, text)) = KNOWN.iter().find(|(known, _)| *known == name) else {
                bail!("there is no arm {name}");
            };
            ((*text).to_owned(), name)
        };
        let tunnel: Self = serde_saphyr::from_str(&text).with_context(|| format!("in {origin}"))?;
        ensure!(
            !tunnel.near.is_empty() && !tunnel.far.is_empty(),
            "{origin}: one of the ends has no command"
        );
        Ok(tunnel)
    }

    /// Its programs, or what is missing.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn installed(&self) -> Result<(), Missing> {
        let commands = [&self.near, &self.far, &self.prepare];
        for name in commands.into_iter().filter_map(|command| command.first()) {
            if name != "{self}" && program(name).is_none() {
                return Err(Missing { program: name.clone(), install: self.install.clone() });
            }
        }
        Ok(())
    }

    /// The first line of what its version command prints.
    #[must_use]
    pub fn version(&self) -> Option<String> {
        let (name, arguments) = self.version.split_first()?;
        let output = std::process::Command::new(program(name)?).args(arguments).output().ok()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }

    /// Starts both ends: near, far.
    ///
    /// # Errors
    /// A command fails; with the end of its output.
    pub async fn start(&self, places: &Places) -> anyhow::Result<[Process; 2]> {
        for (name, text) in &self.files {
            std::fs::write(places.directory.join(name), places.fill(text)?)?;
        }
        if let Some((name, arguments)) = self.prepare.split_first() {
            let arguments: Vec<String> =
                arguments.iter().map(|argument| places.fill(argument)).collect::<Result<_, _>>()?;
            let output = std::process::Command::new(program(name).context("is missing")?)
                .args(arguments)
                .output()
                .with_context(|| name.clone())?;
            ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let end = |side: Side| -> anyhow::Result<Process> {
            let (command, log) = match side {
                Side::Near => (&self.near, "near.log"),
                Side::Far => (&self.far, "far.log"),
            };
            let filled: Vec<String> =
                command.iter().map(|word| places.fill(word)).collect::<Result<_, _>>()?;
            let path = program(&filled[0]).with_context(|| format!("{} is missing", filled[0]))?;
            Process::start_program(&path, &filled[1..], &places.directory.join(log))
        };
        let (first, second) = match self.listens {
            Side::Near => (Side::Near, Side::Far),
            Side::Far => (Side::Far, Side::Near),
        };
        let mut listener = end(first)?;
        match self.tunnel {
            Protocol::Tcp => listening(&mut listener, places.tunnel).await?,
            Protocol::Udp => tokio::time::sleep(UDP_START).await,
        }
        let dialler = end(second)?;
        let [near, mut far] = match first {
            Side::Near => [listener, dialler],
            Side::Far => [dialler, listener],
        };
        ensure!(!far.has_ended(), "the far end ended: {}", far.tail());
        let mut near = near;
        listening(&mut near, places.front).await?;
        Ok([near, far])
    }
}

/// Waits until somebody accepts TCP connections there.
async fn listening(process: &mut Process, address: SocketAddr) -> anyhow::Result<()> {
    let started = Instant::now();
    while TcpStream::connect(address).await.is_err() {
        ensure!(!process.has_ended(), "it exited at once; its output ends with:\n{}", process.tail());
        let late = started.elapsed() > PATIENCE;
        ensure!(!late, "nothing listens on {address}; the output ends with:\n{}", process.tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Finds a program by its path or name: in PATH, where system programs are, and in `target/tools`, where `make tools` puts what it
/// unpacks.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.push("/usr/sbin".into());
    for tools in [Path::new("target/tools"), &Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")] {
        places.extend(["bin", "root/usr/sbin", "root/usr/bin"].map(|place| tools.join(place)));
    }
    let found = places.into_iter().map(|place| place.join(name)).find(|program| program.is_file())?;
    // The caller may change the directory of what it starts.
    std::path::absolute(found).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: every file of the program can be read, has the name by which it is requested, and leaves no placeholder.
    #[test]
    fn the_known_tunnels_are_whole() {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let places = Places {
            front: local(1),
            tunnel: local(2),
            peer: local(3),
            upstream: local(4),
            upstream_tls: false,
            front_tls: true,
            congestion: "bbr",
            certificates: "/certs".into(),
            directory: "/dir".into(),
            own: "/self".into(),
        };
        for (name, _) in KNOWN {
            let tunnel = Tunnel::find(name).unwrap();
            assert_eq!(tunnel.name, name);
            let words = [&tunnel.near, &tunnel.far, &tunnel.prepare].into_iter().flatten();
            for text in words.chain(tunnel.files.values()) {
                let filled = places.fill(text).unwrap();
                let left =
                    ["{front", "{tunnel", "{peer", "{upstream", "{certs", "{dir", "{congestion", "{self"];
                assert!(!left.iter().any(|name| filled.contains(name)), "{name}: {filled}");
            }
        }
    }

    /// Goal: a program that is not there is named, with how to get it.
    #[test]
    fn a_missing_tunnel_program_is_named() {
        let mut tunnel = Tunnel::find("rathole-tls").unwrap();
        tunnel.near[0] = "no-such-program".to_owned();
        let error = tunnel.installed().unwrap_err().to_string();
        assert!(error.contains("no-such-program") && error.contains("cargo install"), "{error}");
        assert!(Tunnel::find("nobody").is_err());
    }
}
