//! Finds the `kubectl`s of this machine: in `$KUBECTLS`, on `$PATH`, in target/tools (`make tools`) and in a few usual
//! places.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const USUAL_PLACES: &[&str] = &[
    "/usr/lib/google-cloud-sdk/bin",
    "/usr/local/bin",
    "/usr/bin",
    "/opt/kubectl",
    "/usr/local/kubebuilder/bin",
];

/// One `kubectl` binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubectl {
    /// The binary.
    pub path: PathBuf,
    /// Its version, such as `v1.33.1`.
    pub version: String,
    /// The minor part of its version.
    pub minor: u32,
}

impl Kubectl {
    /// The argument of `--raw` for a path of a server whose URL ends in `prefix`: from 1.34 on kubectl adds the prefix itself.
    #[must_use]
    pub fn raw(&self, prefix: &str, path: &str) -> String {
        if self.minor < 34 { format!("{prefix}{path}") } else { path.to_owned() }
    }
}

impl fmt::Display for Kubectl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "kubectl {}", self.version)
    }
}

/// Every `kubectl` found, one of each version, the oldest first.
///
/// `$KUBECTLS` is a list of files and directories like `$PATH`. A test that finds none should say so and skip.
pub fn find() -> Vec<Kubectl> {
    let mut places: Vec<PathBuf> = Vec::new();
    for list in ["KUBECTLS", "PATH"] {
        places.extend(std::env::var_os(list).iter().flat_map(std::env::split_paths));
    }
    places.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools"));
    places.extend(USUAL_PLACES.iter().map(PathBuf::from));
    let mut found = BTreeMap::new();
    for binary in places.iter().flat_map(|place| binaries(place)) {
        if let Some((minor, version)) = client_version(&binary) {
            let kubectl = Kubectl { path: binary, version: version.clone(), minor };
            found.entry((minor, version)).or_insert(kubectl);
        }
    }
    found.into_values().collect()
}

fn binaries(place: &Path) -> Vec<PathBuf> {
    if place.is_file() {
        return vec![place.to_owned()];
    }
    let Ok(entries) = std::fs::read_dir(place) else { return Vec::new() };
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let version = name.strip_prefix("kubectl").unwrap_or("?");
        version.chars().all(|character| character.is_ascii_digit() || matches!(character, '.' | 'v' | '-'))
    };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(named).collect();
    found.sort();
    found
}

fn client_version(binary: &Path) -> Option<(u32, String)> {
    let mut command = Command::new(binary);
    command.args(["version", "--client", "--output=json"]).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.env("KUBECONFIG", "/dev/null").output().ok()?;
    let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
    let version = answer["clientVersion"]["gitVersion"].as_str()?.split(['-', '+']).next()?.to_owned();
    let minor = version.split('.').nth(1)?.parse().ok()?;
    Some((minor, version))
}
