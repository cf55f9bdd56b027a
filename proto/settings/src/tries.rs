//! Trials for `--check`: whether a directory can be written, and whether a port is free.

use crate::findings::Findings;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

/// What listens on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// Tries whether files can be made in the directory of `key`, and leaves nothing behind. For one that is not there yet the nearest
/// directory above it counts, where it would be made. Blocks.
pub fn directory(findings: &Findings, key: &str, directory: &Path) {
    let place = match nearest(directory) {
        Ok(place) => place,
        Err(what) => return findings.note(key, what),
    };
    let probe = place.join(format!(".towline-check-{}", std::process::id()));
    match OpenOptions::new().write(true).create_new(true).open(&probe) {
        Ok(_) => drop(fs::remove_file(probe)),
        Err(error) => findings.note(key, format_args!("{} cannot be written: {error}", place.display())),
    }
}

fn nearest(directory: &Path) -> Result<PathBuf, String> {
    for place in directory.ancestors() {
        // The parent of a relative path is the directory where the program runs.
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        match fs::metadata(place) {
            Ok(found) if found.is_dir() => return Ok(place.to_owned()),
            Ok(_) => return Err(format!("{} is not a directory", place.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{} cannot be used: {error}", place.display())),
        }
    }
    Err(format!("{} is not there, nor a directory above it", directory.display()))
}

/// Tries whether the address of `key` can be listened on, and lets go of it at once. If another process of this program listens
/// there, that is returned and is no problem: it may be the one that is to be replaced. Blocks.
#[must_use]
pub fn port(findings: &Findings, key: &str, address: SocketAddr, protocol: Protocol) -> Option<String> {
    let tried = match protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp => UdpSocket::bind(address).map(drop),
    };
    let error = tried.err()?;
    let name = if protocol == Protocol::Tcp { "TCP" } else { "UDP" };
    let refused = format!("{address} ({name}) cannot be opened: {error}");
    let holder =
        (error.kind() == io::ErrorKind::AddrInUse).then(|| holder(address.port(), protocol)).flatten();
    match holder {
        Some(Holder { process, program }) if Some(&program) == program_of("self").as_ref() => {
            return Some(format!("{key}: {address} ({name}) is in use by {program}, process {process}"));
        }
        Some(Holder { process, program }) => {
            findings.note(key, format_args!("{refused}. {program}, process {process}, has it"));
        }
        None => findings.note(key, refused),
    }
    None
}

/// Who listens on a port, as far as this process may see.
struct Holder {
    process: u32,
    program: String,
}

fn holder(port: u16, protocol: Protocol) -> Option<Holder> {
    // The state is that of a socket that listens, or that is bound.
    let (tables, state) = match protocol {
        Protocol::Tcp => (["tcp", "tcp6"], "0A"),
        Protocol::Udp => (["udp", "udp6"], "07"),
    };
    let suffix = format!(":{port:04X}");
    let sockets: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
        .flat_map(|table| {
            let inode = |line: &str| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let ours = fields.get(1)?.ends_with(&suffix) && *fields.get(3)? == state;
                ours.then(|| fields.get(9).map(|inode| format!("socket:[{inode}]")))?
            };
            table.lines().filter_map(inode).collect::<Vec<_>>()
        })
        .collect();
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|process| {
        let open = fs::read_dir(format!("/proc/{process}/fd")).ok()?;
        let holds = open.filter_map(Result::ok).filter_map(|file| fs::read_link(file.path()).ok());
        let mut holds = holds.filter_map(|link| link.to_str().map(str::to_owned));
        holds.any(|link| sockets.contains(&link)).then_some(())?;
        Some(Holder { process, program: program_of(&process.to_string())? })
    })
}

fn program_of(process: &str) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{process}/comm")).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problems;

    fn found(findings: Findings) -> Vec<String> {
        findings.finish().map_or_else(|problems: Problems| problems.lines(), |_| Vec::new())
    }

    /// Goal: D15: a state directory that cannot be written is told, and one that can be made is fine and stays as it is.
    #[test]
    fn d15_a_directory_is_tried() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("file"), "x").unwrap();
        for (path, expected) in [
            (scratch.path().to_owned(), ""),
            (scratch.path().join("a/b"), ""),
            (scratch.path().join("file"), "is not a directory"),
            (scratch.path().join("file/below"), "cannot be used"),
            ("/proc/towline".into(), "cannot be written"),
        ] {
            let findings = Findings::of_file("f".as_ref());
            directory(&findings, "stateDirectory", &path);
            let lines = found(findings);
            assert_eq!(lines.is_empty(), expected.is_empty(), "{path:?} {lines:?}");
            assert!(lines.iter().all(|line| line.contains(expected)), "{path:?} {lines:?}");
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing is left behind");
    }

    /// Goal: D15: a port that is taken is told, with who has it; by a process of the same program it may be.
    #[test]
    fn d15_a_port_is_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap();
        let findings = Findings::of_file("f".as_ref());
        let warning = port(&findings, "listen.address", taken, Protocol::Tcp).unwrap();
        assert!(warning.contains(&format!("process {}", std::process::id())), "{warning}");
        let anywhere = "192.0.2.1:1".parse().unwrap();
        assert_eq!(port(&findings, "admin.address", anywhere, Protocol::Udp), None);
        drop(listener);
        assert_eq!(port(&findings, "listen.address", taken, Protocol::Tcp), None);
        assert_eq!(found(findings).len(), 1, "an address that is not this machine's");
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let held = holder(socket.local_addr().unwrap().port(), Protocol::Udp).unwrap();
        assert_eq!(held.process, std::process::id());
    }
}
