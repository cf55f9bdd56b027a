//! A QUIC client made of packets (RFC 9000, RFC 9001): it can send what no honest implementation can be made to send.
//!
//! It is for loopback: nothing is sent again unless somebody asks for it, and one datagram holds at most one packet of ours.

#![allow(
    clippy::expect_used,
    clippy::unwrap_in_result,
    reason = "a test fails by panicking, in its helpers too"
)]

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::quic::{ClientConnection, KeyChange, Keys, Secrets, Version};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio::time::timeout;

/// The least that a datagram with an Initial packet must have.
pub(crate) const INITIAL_MIN: usize = 1200;
const CID_LEN: usize = 8;
const INITIAL: usize = 0;
const HANDSHAKE: usize = 1;
const DATA: usize = 2;
/// A server that has not answered within this time will not answer; a slow machine takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

const PING: u8 = 0x01;
const ACK: u8 = 0x02;

/// Packets of one of the three kinds.
#[derive(Default)]
struct Space {
    keys: Option<Keys>,
    next: u64,
    /// Behind the last packet that asks for an acknowledgement, and behind the last that was acknowledged.
    asked: u64,
    acked: u64,
    seen: BTreeSet<u64>,
    unacked: bool,
    /// What arrived of the handshake's bytes, and how far they were read and written.
    crypto: BTreeMap<u64, Vec<u8>>,
    crypto_read: u64,
    crypto_sent: u64,
}

pub(crate) struct Raw {
    pub(crate) socket: UdpSocket,
    tls: ClientConnection,
    dcid: Vec<u8>,
    scid: [u8; CID_LEN],
    pub(crate) token: Vec<u8>,
    spaces: [Space; 3],
    level: usize,
    /// What the next keys of the established connection are made from, and the phase of those in use: a server changes them
    /// when it likes.
    next: Option<Secrets>,
    phase: u8,
    pub(crate) sent: usize,
    pub(crate) received: usize,
    pub(crate) version_negotiation: bool,
    /// The source id and the token of a Retry.
    pub(crate) retry: Option<(Vec<u8>, Vec<u8>)>,
    /// Why the server closed the connection: its error code and its words.
    pub(crate) closed: Option<(u64, String)>,
    /// Acknowledges what arrives.
    pub(crate) acks: bool,
}

pub(crate) fn varint(out: &mut Vec<u8>, value: u64) {
    match value {
        0..0x40 => out.push(value.to_be_bytes()[7]),
        0x40..0x4000 => out.extend_from_slice(&(value | 0x4000).to_be_bytes()[6..]),
        0x4000..0x4000_0000 => out.extend_from_slice(&(value | 0x8000_0000).to_be_bytes()[4..]),
        _ => out.extend_from_slice(&(value | 0xc000_0000_0000_0000).to_be_bytes()),
    }
}

fn take_varint(bytes: &mut &[u8]) -> u64 {
    let len = 1 << (bytes[0] >> 6);
    let (head, rest) = bytes.split_at(len);
    *bytes = rest;
    head[1..].iter().fold(u64::from(head[0] & 0x3f), |value, byte| value << 8 | u64::from(*byte))
}

fn skip(bytes: &mut &[u8], count: u64) {
    for _ in 0..count {
        take_varint(bytes);
    }
}

fn take<'a>(bytes: &mut &'a [u8], len: u64) -> &'a [u8] {
    let (head, rest) = bytes.split_at(usize::try_from(len).unwrap());
    *bytes = rest;
    head
}

/// The transport parameters of an ordinary client.
pub(crate) fn parameters(scid: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (id, value) in
        [(0x01, 30_000), (0x04, 1 << 24), (0x05, 1 << 20), (0x06, 1 << 20), (0x08, 100), (0x0e, 8)]
    {
        let mut encoded = Vec::new();
        varint(&mut encoded, value);
        varint(&mut out, id);
        varint(&mut out, encoded.len() as u64);
        out.extend(encoded);
    }
    varint(&mut out, 0x0f);
    varint(&mut out, scid.len() as u64);
    out.extend_from_slice(scid);
    out
}

impl Raw {
    /// A client that has sent nothing yet. `parameters` are its transport parameters, from its connection id.
    pub(crate) async fn new(
        to: SocketAddr,
        tls: Arc<ClientConfig>,
        number: u8,
        parameters: impl FnOnce(&[u8]) -> Vec<u8>,
    ) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(to).await.unwrap();
        let scid = [number; CID_LEN];
        let name = ServerName::try_from("gateway").unwrap();
        let tls = ClientConnection::new(tls, Version::V1, name, parameters(&scid)).unwrap();
        let mut raw = Self {
            socket,
            tls,
            dcid: Vec::new(),
            scid,
            token: Vec::new(),
            spaces: Default::default(),
            level: INITIAL,
            next: None,
            phase: 0,
            sent: 0,
            received: 0,
            version_negotiation: false,
            retry: None,
            closed: None,
            acks: true,
        };
        raw.aim(&[number ^ 0xff; CID_LEN]);
        raw
    }

    /// Uses this connection id of the server's, as one that is not known yet.
    pub(crate) fn aim(&mut self, dcid: &[u8]) {
        let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
        let side = rustls::Side::Client;
        self.dcid = dcid.to_vec();
        self.spaces[INITIAL].keys = Some(Keys::initial(Version::V1, suite, suite.quic.unwrap(), dcid, side));
    }

    /// Shakes hands.
    pub(crate) async fn connect(to: SocketAddr, tls: Arc<ClientConfig>, number: u8) -> Self {
        let mut raw = Self::new(to, tls, number, parameters).await;
        let hello = raw.client_hello();
        raw.send_initial(&hello, INITIAL_MIN).await;
        let done = async {
            while raw.level != DATA {
                raw.receive().await;
                raw.handshake().await;
            }
        };
        timeout(PATIENCE, done).await.expect("the handshake ends in time");
        assert_eq!(raw.closed, None);
        raw
    }

    /// The frame with the first bytes of the handshake.
    pub(crate) fn client_hello(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        assert!(self.tls.write_hs(&mut bytes).is_none());
        self.crypto_frame(INITIAL, &bytes)
    }

    fn crypto_frame(&mut self, level: usize, bytes: &[u8]) -> Vec<u8> {
        let space = &mut self.spaces[level];
        let mut frame = vec![0x06];
        varint(&mut frame, space.crypto_sent);
        varint(&mut frame, bytes.len() as u64);
        frame.extend_from_slice(bytes);
        space.crypto_sent += bytes.len() as u64;
        frame
    }

    /// Sends an Initial packet that makes a datagram of at least `pad_to` bytes.
    pub(crate) async fn send_initial(&mut self, frames: &[u8], pad_to: usize) {
        let packet = self.packet(INITIAL, frames, pad_to);
        self.send_datagram(&packet).await;
    }

    /// Sends an Initial packet again and again until it has been answered: on a busy machine loopback loses datagrams too.
    pub(crate) async fn insist(&mut self, frames: &[u8], pad_to: usize, answered: impl Fn(&Self) -> bool) {
        let began = Instant::now();
        while !answered(self) {
            assert!(
                began.elapsed() < PATIENCE,
                "{} bytes and no answer, {} received",
                self.sent,
                self.received
            );
            self.send_initial(frames, pad_to).await;
            let sent = Instant::now();
            while !answered(self) && sent.elapsed() < Duration::from_secs(2) {
                self.drive(Duration::from_millis(50)).await;
            }
        }
    }

    /// Waits until the server has acknowledged, and so has read, all packets but the last `but`, or has closed the connection;
    /// whether it has.
    pub(crate) async fn caught_up(&mut self, but: u64) -> bool {
        let began = Instant::now();
        while self.closed.is_none() && self.spaces[DATA].asked.saturating_sub(self.spaces[DATA].acked) > but {
            assert!(began.elapsed() < PATIENCE, "the server does not read on");
            let received = self.received;
            self.drive(Duration::from_millis(100)).await;
            if self.received == received {
                // The last packets may be lost, and are never acknowledged then: one behind them is.
                self.send(&[PING]).await;
            }
        }
        self.closed.is_some()
    }

    /// Sends frames in a packet of the established connection.
    pub(crate) async fn send(&mut self, frames: &[u8]) {
        let packet = self.packet(DATA, frames, 0);
        self.send_datagram(&packet).await;
    }

    pub(crate) async fn send_datagram(&mut self, datagram: &[u8]) {
        // The error may be an ICMP error of an earlier datagram, not of this one.
        if let Ok(sent) = self.socket.send(datagram).await {
            self.sent += sent;
        }
    }

    fn packet(&mut self, level: usize, frames: &[u8], pad_to: usize) -> Vec<u8> {
        let space = &mut self.spaces[level];
        let number = space.next;
        space.next += 1;
        if frames.first() != Some(&ACK) {
            space.asked = space.next;
        }
        let keys = space.keys.as_ref().expect("there are keys");
        let tag = keys.local.packet.tag_len();
        let mut header = match level {
            DATA => vec![0x43 | self.phase << 2],
            _ => vec![[0xc3, 0xe3][level], 0, 0, 0, 1],
        };
        let mut payload = frames.to_vec();
        if level == DATA {
            header.extend_from_slice(&self.dcid);
        } else {
            for cid in [&self.dcid[..], &self.scid] {
                header.push(u8::try_from(cid.len()).unwrap());
                header.extend_from_slice(cid);
            }
            if level == INITIAL {
                varint(&mut header, self.token.len() as u64);
                header.extend_from_slice(&self.token);
            }
            let fixed = header.len() + 2 + 4 + tag;
            payload.resize(payload.len().max(pad_to.saturating_sub(fixed)), 0);
            let length = u16::try_from(4 + payload.len().max(4) + tag).unwrap();
            header.extend_from_slice(&(length | 0x4000).to_be_bytes());
        }
        payload.resize(payload.len().max(4), 0);
        let number_at = header.len();
        header.extend_from_slice(&u32::try_from(number).unwrap().to_be_bytes());
        let tag = keys.local.packet.encrypt_in_place(number, &header, &mut payload).unwrap();
        let mut packet = header;
        packet.extend_from_slice(&payload);
        packet.extend_from_slice(tag.as_ref());
        let sample_at = number_at + 4;
        let sample = packet[sample_at..sample_at + keys.local.header.sample_len()].to_vec();
        let (first, rest) = packet.split_first_mut().unwrap();
        let number = &mut rest[number_at - 1..number_at + 3];
        keys.local.header.encrypt_in_place(&sample, first, number).unwrap();
        packet
    }

    /// Takes what has arrived within `wait`, one datagram at least unless none comes, and acknowledges it.
    pub(crate) async fn drive(&mut self, wait: Duration) {
        if timeout(wait, self.receive()).await.is_err() {
            return;
        }
        let mut datagram = vec![0; 65_536];
        while let Ok(len) = self.socket.try_recv(&mut datagram) {
            self.handle(&mut datagram[..len]);
        }
        if self.level == DATA && self.spaces[DATA].unacked && self.acks && self.closed.is_none() {
            let ack = self.ack(DATA);
            self.send(&ack).await;
        }
    }

    async fn receive(&mut self) {
        let mut datagram = vec![0; 65_536];
        // An ICMP error shows here too.
        if let Ok(len) = self.socket.recv(&mut datagram).await {
            self.handle(&mut datagram[..len]);
        }
    }

    /// Says what is due of the handshake.
    async fn handshake(&mut self) {
        loop {
            let level = self.level;
            let mut bytes = Vec::new();
            let change = self.tls.write_hs(&mut bytes);
            if bytes.is_empty() && change.is_none() {
                break;
            }
            if !bytes.is_empty() {
                let mut frames = self.ack(level);
                frames.extend(self.crypto_frame(level, &bytes));
                let packet = self.packet(level, &frames, if level == INITIAL { INITIAL_MIN } else { 0 });
                self.send_datagram(&packet).await;
            }
            match change {
                Some(KeyChange::Handshake { keys }) => {
                    self.spaces[HANDSHAKE].keys = Some(keys);
                    self.level = HANDSHAKE;
                }
                Some(KeyChange::OneRtt { keys, next }) => {
                    self.next = Some(next);
                    self.spaces[DATA].keys = Some(keys);
                    self.level = DATA;
                }
                None => {}
            }
        }
        // Until our address is proven the server sends no more than three times what we do.
        for level in [INITIAL, HANDSHAKE] {
            if self.spaces[level].unacked && self.spaces[level].keys.is_some() {
                let frames = self.ack(level);
                let packet = self.packet(level, &frames, if level == INITIAL { INITIAL_MIN } else { 0 });
                self.send_datagram(&packet).await;
            }
        }
    }

    fn ack(&mut self, level: usize) -> Vec<u8> {
        let space = &mut self.spaces[level];
        space.unacked = false;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for &number in space.seen.iter().rev() {
            let full = ranges.len() == 32;
            match ranges.last_mut() {
                Some((low, _)) if *low == number + 1 => *low = number,
                _ if full => break,
                _ => ranges.push((number, number)),
            }
        }
        let Some(&(mut low, high)) = ranges.first() else { return Vec::new() };
        let mut frame = vec![ACK];
        varint(&mut frame, high);
        varint(&mut frame, 0);
        varint(&mut frame, ranges.len() as u64 - 1);
        varint(&mut frame, high - low);
        for &(next_low, next_high) in &ranges[1..] {
            varint(&mut frame, low - next_high - 2);
            varint(&mut frame, next_high - next_low);
            low = next_low;
        }
        frame
    }

    // ---- What arrives ----

    fn handle(&mut self, datagram: &mut [u8]) {
        self.received += datagram.len();
        let mut rest = datagram;
        while !rest.is_empty() {
            let Some(len) = self.handle_packet(rest) else { return };
            rest = &mut rest[len..];
        }
    }

    /// Takes the first packet of a datagram; its length, if another one may follow.
    fn handle_packet(&mut self, packet: &mut [u8]) -> Option<usize> {
        let (level, number_at, end) = if packet[0] & 0x80 == 0 {
            (DATA, 1 + CID_LEN, packet.len())
        } else {
            let mut bytes = &packet[1..];
            let version = take(&mut bytes, 4).to_vec();
            let len = take(&mut bytes, 1)[0];
            take(&mut bytes, len.into());
            let len = take(&mut bytes, 1)[0];
            let scid = take(&mut bytes, len.into()).to_vec();
            if version == [0; 4] {
                self.version_negotiation = true;
                return None;
            }
            let level = match packet[0] >> 4 & 3 {
                0 => INITIAL,
                2 => HANDSHAKE,
                3 => {
                    self.retry = Some((scid, bytes[..bytes.len() - 16].to_vec()));
                    return None;
                }
                _ => return None,
            };
            if level == INITIAL {
                let len = take_varint(&mut bytes);
                take(&mut bytes, len);
            }
            let length = usize::try_from(take_varint(&mut bytes)).unwrap();
            let number_at = packet.len() - bytes.len();
            if level == INITIAL && self.spaces[INITIAL].seen.is_empty() {
                self.dcid = scid;
            }
            (level, number_at, number_at + length)
        };
        let space = &mut self.spaces[level];
        // Packets before their keys are lost and retransmitted.
        let keys = space.keys.as_ref()?;
        let sample_at = number_at + 4;
        let sample = packet.get(sample_at..sample_at + keys.remote.header.sample_len())?.to_vec();
        let (first, tail) = packet.split_first_mut()?;
        keys.remote.header.decrypt_in_place(&sample, first, &mut tail[number_at - 1..number_at + 3]).ok()?;
        let number_len = usize::from(packet[0] & 3) + 1;
        let (header, payload) = packet[..end].split_at_mut(number_at + number_len);
        let low = header[number_at..].iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let window = 1_u64 << (8 * number_len);
        let expected = space.seen.last().map_or(0, |last| last + 1);
        let near = expected & !(window - 1) | low;
        let number = [near.wrapping_sub(window), near, near + window]
            .into_iter()
            .min_by_key(|number| number.abs_diff(expected))
            .unwrap();
        let keys = space.keys.as_mut()?;
        if level == DATA && header[0] >> 2 & 1 != self.phase {
            let keys_set = self.next.as_mut()?.next_packet_keys();
            (keys.local.packet, keys.remote.packet) = (keys_set.local, keys_set.remote);
            self.phase ^= 1;
        }
        let payload = keys.remote.packet.decrypt_in_place(number, header, payload).ok()?.to_vec();
        space.seen.insert(number);
        self.handle_frames(level, &payload);
        Some(end)
    }

    fn handle_frames(&mut self, level: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let kind = take_varint(&mut bytes);
            self.spaces[level].unacked |= !matches!(kind, 0x00 | 0x02 | 0x03 | 0x1c | 0x1d);
            match kind {
                0x00 | 0x01 | 0x1e => {}
                0x02 | 0x03 => {
                    let largest = take_varint(&mut bytes);
                    let space = &mut self.spaces[level];
                    space.acked = space.acked.max(largest + 1);
                    skip(&mut bytes, 1);
                    let ranges = take_varint(&mut bytes);
                    skip(&mut bytes, 1 + 2 * ranges + 3 * (kind - 2));
                }
                0x04 | 0x11 | 0x15 => skip(&mut bytes, if kind == 0x04 { 3 } else { 2 }),
                0x05 => skip(&mut bytes, 2),
                0x06 => {
                    let offset = take_varint(&mut bytes);
                    let len = take_varint(&mut bytes);
                    let crypto = take(&mut bytes, len).to_vec();
                    self.spaces[level].crypto.insert(offset, crypto);
                    self.read_handshake(level);
                }
                0x07 => {
                    let len = take_varint(&mut bytes);
                    take(&mut bytes, len);
                }
                0x08..=0x0f => {
                    skip(&mut bytes, 1 + u64::from(kind & 4 != 0));
                    let len = if kind & 2 != 0 { take_varint(&mut bytes) } else { bytes.len() as u64 };
                    take(&mut bytes, len);
                }
                0x10 | 0x12 | 0x13 | 0x14 | 0x16 | 0x17 | 0x19 => skip(&mut bytes, 1),
                0x18 => {
                    skip(&mut bytes, 2);
                    let len = take(&mut bytes, 1)[0];
                    take(&mut bytes, u64::from(len) + 16);
                }
                0x1a | 0x1b => drop(take(&mut bytes, 8)),
                0x1c | 0x1d => {
                    let code = take_varint(&mut bytes);
                    if kind == 0x1c {
                        take_varint(&mut bytes);
                    }
                    let len = take_varint(&mut bytes);
                    let text = String::from_utf8_lossy(take(&mut bytes, len)).into_owned();
                    self.closed.get_or_insert((code, text));
                }
                // An extension that we have not asked for.
                _ => return,
            }
        }
    }

    fn read_handshake(&mut self, level: usize) {
        let space = &mut self.spaces[level];
        while let Some((&offset, _)) = space.crypto.iter().next()
            && offset <= space.crypto_read
        {
            let bytes = space.crypto.remove(&offset).unwrap();
            let known = usize::try_from(space.crypto_read - offset).unwrap().min(bytes.len());
            space.crypto_read += (bytes.len() - known) as u64;
            // What a server says to a broken hello need not be right.
            drop(self.tls.read_hs(&bytes[known..]));
        }
    }
}

/// A STREAM frame with an offset and a length.
pub(crate) fn stream(out: &mut Vec<u8>, id: u64, offset: u64, bytes: &[u8]) {
    out.push(0x0e);
    varint(out, id);
    varint(out, offset);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}
