//! A network whose packets the kernel itself drops: two network namespaces and three links, for one agent.
//!
//! ```text
//!   agent ── router ── here     the tunnel: the gateway listens here; faults are rules in the router
//!   agent ──────────── here     beside it, never disturbed: the agent's admin port and its API server
//! ```
//!
//! The rules are nftables' in the router's own namespace, where they hold for packets that are passed on: neither end is
//! told. Addresses are of 198.18.0.0/15, which is for measurements and leads nowhere else.
//!
//! The router can also forge: [`forge`] answers real packets with ICMP errors that nobody on the path meant.

use anyhow::{Context, bail, ensure};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Addresses that the agent can have on the tunnel's side, one at a time.
pub const PLACES: u32 = 5;

static NEXT: AtomicU32 = AtomicU32::new(0);
/// 198.18.0.0/15, 16 addresses per network: a /30, a /30 and a /29.
const POOL: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const RANGES: u32 = (1 << 17) / 16;
const GATEWAY: u32 = 1;
const ROUTER_UP: u32 = 2;
const SIDE_HERE: u32 = 5;
const SIDE_AGENT: u32 = 6;
const INNER: u32 = 8;
const ROUTER_DOWN: u32 = 9;
const FIRST_PLACE: u32 = 10;

/// Bytes of a packet in the errors about it: its header and more of what follows than any kernel asks for.
const QUOTED: usize = 64;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A network for one agent. Dropping it removes it, with whatever still runs in it cut off.
#[derive(Debug)]
pub struct Network {
    /// The namespaces' names.
    agent: String,
    router: String,
    /// Our ends of the links; the routes go with them.
    links: [String; 2],
    /// The first of its 16 addresses.
    base: u32,
    /// Which of its addresses the agent has on the tunnel's side.
    place: u32,
}

impl Network {
    /// Why this machine cannot have such a network, if it cannot.
    #[must_use]
    pub fn missing() -> Option<String> {
        static MISSING: OnceLock<Option<String>> = OnceLock::new();
        MISSING.get_or_init(look).clone()
    }

    /// Creates a network in which everything passes.
    ///
    /// # Errors
    /// The kernel refuses a step.
    pub fn start() -> anyhow::Result<Self> {
        let process = std::process::id();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Self {
            agent: format!("towline-{process}-{number}-agent"),
            router: format!("towline-{process}-{number}-router"),
            links: [format!("tl{process}u{number}"), format!("tl{process}s{number}")],
            base: free_range(process.wrapping_mul(61).wrapping_add(number))?,
            place: 0,
        };
        // From now on a failure removes what there is.
        for name in [&network.agent, &network.router] {
            output("ip", &["netns", "add", name])?;
        }
        network.connect()?;
        Ok(network)
    }

    fn connect(&self) -> anyhow::Result<()> {
        let Self { agent, router, links: [up, side], .. } = self;
        let at = |offset| self.address(offset);
        // Batches of segments would pass the router as one: each packet is to be seen, and dropped, alone.
        ip(
            None,
            &format!(
                "link add {up} gso_max_segs 1 type veth peer name outer netns {router}
                link add {side} type veth peer name side netns {agent}
                address add {}/30 dev {up}
                address add {}/30 dev {side}
                link set {up} up
                link set {side} up
                route add {}/29 via {} dev {up}",
                at(GATEWAY),
                at(SIDE_HERE),
                at(INNER),
                at(ROUTER_UP),
            ),
        )?;
        ip(
            Some(router),
            &format!(
                "link add inner type veth peer name wan gso_max_segs 1 netns {agent}
                address add {}/30 dev outer
                address add {}/29 dev inner
                link set lo up
                link set outer up
                link set inner up",
                at(ROUTER_UP),
                at(ROUTER_DOWN),
            ),
        )?;
        ip(
            Some(agent),
            &format!(
                "address add {}/30 dev side
                address add {}/29 dev wan
                link set lo up
                link set side up
                link set wan up
                route add default via {} dev wan",
                at(SIDE_AGENT),
                at(FIRST_PLACE),
                at(ROUTER_DOWN),
            ),
        )?;
        let set = |name, line: &str| output("ip", &["netns", "exec", name, "sh", "-c", line]);
        set(router, "echo 1 > /proc/sys/net/ipv4/ip_forward")?;
        // A secondary address stays when the primary address is removed.
        set(agent, "echo 1 > /proc/sys/net/ipv4/conf/all/promote_secondaries")?;
        self.nft("add table inet towline\nadd chain inet towline faults { type filter hook forward priority 0; }\n")
    }

    /// Drops packets that match these rules, which replace the previous rules. A rule is an nftables match, for example
    /// `meta l4proto udp`; it counts before it drops.
    ///
    /// # Errors
    /// nftables rejects them.
    pub fn drop_packets(&self, rules: &[&str]) -> anyhow::Result<()> {
        let mut script = "flush chain inet towline faults\n".to_owned();
        for rule in rules {
            script.push_str(&format!("add rule inet towline faults {rule} counter drop\n"));
        }
        self.nft(&script)
    }

    /// Packets dropped by the current rules.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn dropped(&self) -> anyhow::Result<u64> {
        let mut command = self.nft_command();
        command.args(["list", "chain", "inet", "towline", "faults"]).stdin(Stdio::null());
        let listed = command.output().with_context(|| format!("{command:?}"))?;
        let text = said(&command, listed)?;
        let counts = text.split("packets ").skip(1).map(|rest| rest.split(' ').next()?.parse::<u64>().ok());
        counts.map(|count| count.context("a counter of nftables")).sum()
    }

    /// Replaces the agent's address on the tunnel's side; `place` is taken modulo [`PLACES`].
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn move_agent(&mut self, place: u32) -> anyhow::Result<()> {
        let (old, new) = (self.place, place % PLACES);
        if old != new {
            let [old, new] = [old, new].map(|place| self.address(FIRST_PLACE + place));
            ip(Some(&self.agent), &format!("address add {new}/29 dev wan\naddress del {old}/29 dev wan"))?;
            self.place = place % PLACES;
        }
        Ok(())
    }

    /// The command under which a program runs where the agent does.
    #[must_use]
    pub fn under(&self) -> Vec<String> {
        let ip = find("ip").display().to_string();
        [&ip, "netns", "exec", &self.agent].map(str::to_owned).to_vec()
    }

    /// A command that runs `program` in the router.
    #[must_use]
    pub fn in_router(&self, program: &Path) -> Command {
        let mut command = tool("ip");
        command.args(["netns", "exec", &self.router]).arg(program);
        command
    }

    /// ICMP errors that the agent's kernel has received.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn icmp_errors(&self) -> anyhow::Result<u64> {
        let text = output("ip", &["netns", "exec", &self.agent, "cat", "/proc/net/snmp"])?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Icmp: "));
        let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "InDestUnreachs");
        found.and_then(|(_, value)| value.parse().ok()).context("InDestUnreachs in /proc/net/snmp")
    }

    /// Where the gateway can listen: our end of the tunnel's path.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(GATEWAY)
    }

    /// The agent's address at the moment, on the tunnel's side.
    #[must_use]
    pub fn agent(&self) -> Ipv4Addr {
        self.address(FIRST_PLACE + self.place)
    }

    /// Both ends of the undisturbed link: here, and at the agent.
    #[must_use]
    pub fn side(&self) -> (Ipv4Addr, Ipv4Addr) {
        (self.address(SIDE_HERE), self.address(SIDE_AGENT))
    }

    fn address(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base + offset)
    }

    fn nft(&self, script: &str) -> anyhow::Result<()> {
        let mut command = self.nft_command();
        command.args(["-f", "-"]);
        feed(command, script).map(drop)
    }

    /// nft in the router's namespace. `ip` passes its environment on: where nft was unpacked and not installed it finds its
    /// libraries by it, while `ip` itself may be the system's.
    fn nft_command(&self) -> Command {
        let mut command = tool("ip");
        for (name, value) in tool("nft").get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.args(["netns", "exec", &self.router]).arg(find("nft"));
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A missing object cannot be removed, and a failure has no remedy here.
        for link in &self.links {
            drop(output("ip", &["link", "del", link]));
        }
        for name in [&self.agent, &self.router] {
            drop(output("ip", &["netns", "del", name]));
        }
    }
}

fn look() -> Option<String> {
    let user = output("id", &["-u"]).unwrap_or_default();
    if user.trim() != "0" {
        return Some("it needs root".to_owned());
    }
    for (program, version) in [("ip", "-V"), ("nft", "-v")] {
        if output(program, &[version]).is_err() {
            return Some(format!("no {program} on PATH, in /usr/sbin or target/tools (make tools)"));
        }
    }
    probe()
}

/// Why no namespace can be made, if none can.
pub(crate) fn probe() -> Option<String> {
    let probe = format!("towline-{}-probe", std::process::id());
    let made = output("ip", &["netns", "add", &probe]);
    drop(output("ip", &["netns", "del", &probe]));
    made.err().map(|error| format!("no network namespace can be made: {error:#}"))
}

/// Unused addresses. Different processes start the search at different places.
pub(crate) fn free_range(start: u32) -> anyhow::Result<u32> {
    for step in 0..64 {
        let base = POOL + (start.wrapping_add(step) % RANGES) * 16;
        let taken =
            output("ip", &["-4", "-o", "address", "show", "to", &format!("{}/28", Ipv4Addr::from(base))])?;
        if taken.trim().is_empty() {
            return Ok(base);
        }
    }
    bail!("no free addresses in 198.18.0.0/15")
}

/// Runs lines of `ip`, here or in a namespace.
pub(crate) fn ip(namespace: Option<&str>, lines: &str) -> anyhow::Result<()> {
    let mut command = tool("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    feed(command, lines).map(drop)
}

fn feed(mut command: Command, input: &str) -> anyhow::Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    child.stdin.take().context("a pipe was asked for")?.write_all(input.as_bytes())?;
    said(&command, child.wait_with_output()?).with_context(|| input.to_owned())
}

pub(crate) fn output(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = tool(program);
    command.args(arguments).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{command:?}"))?;
    said(&command, output)
}

fn said(command: &Command, output: Output) -> anyhow::Result<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program of the system's, or of those that `make tools` unpacks.
pub(crate) fn find(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let unpacked = ["usr/sbin", "sbin", "usr/bin", "bin"].map(|place| tools().join(place));
    let mut places = std::env::split_paths(&path).chain(system).chain(unpacked);
    places
        .find_map(|place| Some(place.join(program)).filter(|path| path.is_file()))
        .unwrap_or_else(|| program.into())
}

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/root")
}

pub(crate) fn tool(program: &str) -> Command {
    let (found, tools) = (find(program), tools());
    let mut command = Command::new(&found);
    if found.starts_with(&tools) {
        let system = format!("{}-linux-gnu", std::env::consts::ARCH);
        let libraries = ["usr/lib", "lib"].map(|place| tools.join(place).join(&system));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap_or_default());
    }
    command
}

// ---- Forged errors ----

/// The code of a forged ICMP message of type 3 (destination unreachable).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forged {
    /// Code 1.
    HostUnreachable,
    /// Code 3.
    PortUnreachable,
    /// Code 4: fragmentation needed; the next hop's MTU in bytes.
    FragmentationNeeded(u16),
}

impl Forged {
    /// The message that quotes `packet`, an IPv4 packet from its header on.
    fn message(self, packet: &[u8]) -> Vec<u8> {
        let (code, mtu) = match self {
            Self::HostUnreachable => (1, 0),
            Self::PortUnreachable => (3, 0),
            Self::FragmentationNeeded(mtu) => (4, mtu),
        };
        let [high, low] = mtu.to_be_bytes();
        let mut message = vec![3, code, 0, 0, 0, 0, high, low];
        message.extend_from_slice(&packet[..packet.len().min(QUOTED)]);
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
        message
    }
}

/// For `time`, answers each TCP and UDP packet that passes this machine or namespace with a forged error to its sender. The error
/// quotes the packet, so no kernel can distinguish it from a real one. Returns the number of errors.
///
/// # Errors
/// A raw socket cannot be opened, or nothing can be sent.
pub fn forge(forged: Forged, time: Duration) -> io::Result<u64> {
    // Packets as they arrive, from their IPv4 header on; the numbers are those of <linux/if_ether.h> in network order.
    let ipv4 = Protocol::from(i32::from(0x0800_u16.to_be()));
    let mut packets = Socket::new(Domain::PACKET, Type::DGRAM, Some(ipv4))?;
    packets.set_read_timeout(Some(Duration::from_millis(50)))?;
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    let started = Instant::now();
    let mut sent = 0;
    let mut buffer = vec![0; 65_536];
    while started.elapsed() < time {
        let length = match packets.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let packet = &buffer[..length];
        let is_flow = packet.len() >= 28 && matches!(packet[9], TCP | UDP);
        if !is_flow {
            continue;
        }
        let sender = Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
        raw.send_to(&forged.message(packet), &SockAddr::from(SocketAddrV4::new(sender, 0)))?;
        sent += 1;
    }
    Ok(sent)
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The checksum over a message with its checksum in place is zero (RFC 1071), of even and odd lengths.
    #[test]
    fn forged_messages_have_a_valid_checksum() {
        for length in [28, 29, 64, 1500] {
            let packet: Vec<u8> = (0..length).map(|n| (n * 7 % 251) as u8).collect();
            for forged in [Forged::HostUnreachable, Forged::PortUnreachable, Forged::FragmentationNeeded(576)]
            {
                let message = forged.message(&packet);
                assert_eq!(checksum(&message), 0, "{forged:?} {length}");
                assert_eq!(message.len(), 8 + packet.len().min(QUOTED));
            }
        }
        assert_eq!(Forged::FragmentationNeeded(576).message(&[0; 28])[..2], [3, 4]);
        assert_eq!(Forged::FragmentationNeeded(576).message(&[0; 28])[6..8], [2, 64]);
    }
}
