//! Changes a kubeconfig file: under kubectl's lock, atomically, and without touching foreign entries.

use super::failure::{Failure, Outcome};
use super::kubeconfig::{MARK, mark, parse};
use super::yaml;
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use towline_certs::save::{create_private_directory, write_private};

/// How long to wait for another program's lock.
const PATIENCE: Duration = Duration::from_secs(5);

/// A cluster, its user and the context of both, under one name.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) cluster: Value,
    pub(crate) user: Value,
    pub(crate) namespace: Option<String>,
    pub(crate) origin: Origin,
}

/// The mark of this program's entries.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) gateway: String,
    pub(crate) cluster: String,
    /// The gateway's context, and the files that have it.
    pub(crate) context: String,
    pub(crate) files: Vec<PathBuf>,
}

impl Origin {
    fn extensions(&self) -> Value {
        let Self { gateway, cluster, context, files } = self;
        json!([{"name": MARK, "extension": {
            "gateway": gateway, "cluster": cluster, "context": context, "kubeconfig": files,
        }}])
    }

    /// Whether an entry was written for the same cluster of the same gateway.
    fn wrote(&self, content: &Value) -> bool {
        mark(content).is_some_and(|mark| mark["gateway"] == self.gateway && mark["cluster"] == self.cluster)
    }
}

/// The lock file that kubectl would make, removed when this is dropped.
#[derive(Debug)]
struct Lock(PathBuf);

impl Lock {
    fn take(path: &Path, patience: Duration) -> Outcome<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let lock = PathBuf::from(name);
        let started = Instant::now();
        loop {
            match OpenOptions::new().write(true).create_new(true).mode(0o000).open(&lock) {
                Ok(_) => return Ok(Self(lock)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if started.elapsed() >= patience {
                        return Err(Failure::failed(format!(
                            "another program is changing {}: its lock {} exists. If no kubectl or towline is running, remove the lock",
                            path.display(),
                            lock.display()
                        )));
                    }
                    thread::sleep(Duration::from_millis(50));
                }
                Err(error) => return Err(Failure::failed(format!("{}: {error}", lock.display()))),
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

/// Writes the entries into a kubeconfig, which is made if it is not there.
pub(crate) fn write(path: &Path, entries: &[Entry], current: Option<&str>) -> Outcome {
    write_within(path, entries, current, PATIENCE)
}

fn write_within(path: &Path, entries: &[Entry], current: Option<&str>, patience: Duration) -> Outcome {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        create_private_directory(directory).map_err(|error| Failure::failed(error.to_string()))?;
    }
    let _lock = Lock::take(path, patience)?;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(Failure::failed(format!("{}: {error}", path.display()))),
    };
    let mut content = parse(path, &text)?;
    put(&mut content, entries, current, &path.display().to_string())?;
    // A link stays one: what it leads to is replaced.
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    write_private(&place, yaml::text(&content).as_bytes()).map_err(|error| Failure::failed(error.to_string()))
}

/// A kubeconfig with nothing but the entries.
pub(crate) fn alone(entries: &[Entry], current: Option<&str>) -> Outcome<String> {
    let mut content = json!({});
    put(&mut content, entries, current, "the output")?;
    Ok(yaml::text(&content))
}

/// Puts the entries into a kubeconfig's content; all or none.
fn put(content: &mut Value, entries: &[Entry], current: Option<&str>, file: &str) -> Outcome {
    for (field, value) in [("apiVersion", "v1"), ("kind", "Config")] {
        if content[field].is_null() {
            content[field] = value.into();
        }
    }
    for entry in entries {
        for (list, inner) in [("clusters", "cluster"), ("users", "user"), ("contexts", "context")] {
            if content[list].is_null() {
                content[list] = json!([]);
            }
            let Some(items) = content[list].as_array_mut() else {
                return Err(Failure::usage(format!("{file} is not a kubeconfig: {list} is not a list")));
            };
            let known = items.iter_mut().find(|item| item["name"] == entry.name);
            if let Some(known) = &known
                && !entry.origin.wrote(&known[inner])
            {
                return Err(Failure::failed(format!(
                    "{file} already has a {inner} {:?} that does not belong to cluster {:?} at {}; nothing was written.\nChoose another name with --name NAME or --prefix PREFIX",
                    entry.name, entry.origin.cluster, entry.origin.gateway
                )));
            }
            let mut part = match inner {
                "cluster" => entry.cluster.clone(),
                "user" => entry.user.clone(),
                _ => json!({"cluster": entry.name, "user": entry.name}),
            };
            part["extensions"] = entry.origin.extensions();
            if inner == "user"
                && part["exec"].is_object()
                && let Some(known) = &known
            {
                keep_source(&mut part["exec"], &known[inner]["exec"]);
            }
            if inner == "context" {
                // Which namespace is worked in is the person's choice, and outlives a renewal.
                let kept = known
                    .as_ref()
                    .and_then(|known| known[inner]["namespace"].as_str())
                    .map(ToOwned::to_owned);
                if let Some(namespace) = entry.namespace.clone().or(kept) {
                    part["namespace"] = namespace.into();
                }
            }
            match known {
                Some(known) => known[inner] = part,
                None => items.push(json!({"name": entry.name, inner: part})),
            }
        }
    }
    if let Some(current) = current {
        content["current-context"] = current.into();
    } else if content["current-context"].is_null() {
        content["current-context"] = "".into();
    }
    Ok(())
}

/// Keeps the cluster's own credential of an entry that is written again, unless another is given; and what was added to the
/// environment by hand.
fn keep_source(new: &mut Value, old: &Value) {
    let is_source = |argument: &Value| argument == "--wrap" || argument == "--token-file";
    let (Some(arguments), Some(known)) = (new["args"].as_array_mut(), old["args"].as_array()) else { return };
    if !arguments.iter().any(is_source)
        && let Some(first) = known.iter().position(is_source)
    {
        arguments.extend(known[first..].iter().cloned());
    }
    if !old["env"].is_null() {
        new["env"] = old["env"].clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn entry(name: &str, gateway: &str, cluster: &str) -> Entry {
        Entry {
            name: name.to_owned(),
            cluster: json!({"server": format!("{gateway}/clusters/{cluster}")}),
            user: json!({"exec": {"command": "towline"}}),
            namespace: None,
            origin: Origin {
                gateway: gateway.to_owned(),
                cluster: cluster.to_owned(),
                context: "towline".to_owned(),
                files: Vec::new(),
            },
        }
    }

    /// Enough for eight writers on a disk that is slow.
    const PATIENT: Duration = Duration::from_secs(60);

    fn read(path: &Path) -> Value {
        parse(path, &fs::read_to_string(path).unwrap()).unwrap()
    }

    /// Goal: writing an entry again keeps the cluster's own credential in it.
    #[test]
    fn an_entry_keeps_its_wrapped_plugin() {
        let with = |arguments: &[&str], environment: Value| {
            let mut entry = entry("towline-prod", "https://gw", "prod");
            entry.user = json!({"exec": {"command": "towline", "args": arguments}});
            if !environment.is_null() {
                entry.user["exec"]["env"] = environment;
            }
            entry
        };
        let profile = json!([{"name": "AWS_PROFILE", "value": "prod"}]);
        let mut content = json!({});
        let wrapped = ["credential", "--context", "a", "--wrap", "--", "aws", "eks"];
        put(&mut content, &[with(&wrapped, profile.clone())], None, "f").unwrap();
        put(&mut content, &[with(&["credential", "--context", "b"], Value::Null)], None, "f").unwrap();
        let exec = &content["users"][0]["user"]["exec"];
        let kept = ["credential", "--context", "b", "--wrap", "--", "aws", "eks"];
        assert_eq!((&exec["args"], &exec["env"]), (&json!(kept), &profile));
        let other = ["credential", "--token-file", "/t"];
        put(&mut content, &[with(&other, Value::Null)], None, "f").unwrap();
        assert_eq!(content["users"][0]["user"]["exec"]["args"], json!(other));
    }

    const THEIRS: &str = "apiVersion: v1\nkind: Config\npreferences: {colors: true}\nfuture: [1, {x: 'yes'}]\ncurrent-context: mine\nclusters:\n- name: mine\n  cluster: {server: 'https://mine', odd: 012}\nusers:\n- name: mine\n  user: {token: '0123'}\ncontexts:\n- name: mine\n  context: {cluster: mine, user: mine}\n";

    /// Goal: foreign entries and unknown keys are kept; the file is readable by its owner only.
    #[test]
    fn foreign_entries_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        fs::write(&path, THEIRS).unwrap();
        let before = read(&path);
        write(&path, &[entry("towline-a", "https://gw", "a"), entry("towline-b", "https://gw", "b")], None)
            .unwrap();
        let after = read(&path);
        for field in ["preferences", "future", "current-context", "kind"] {
            assert_eq!(after[field], before[field], "{field}");
        }
        for list in ["clusters", "users", "contexts"] {
            assert_eq!(after[list].as_array().unwrap().len(), 3);
            assert_eq!(after[list][0], before[list][0], "{list}");
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no lock and nothing half is left");
        // Again: the same entries, and the namespace that was chosen meanwhile.
        let chosen = fs::read_to_string(&path).unwrap().replacen(
            "cluster: towline-a\n",
            "cluster: towline-a\n    namespace: work\n",
            1,
        );
        fs::write(&path, chosen).unwrap();
        write(&path, &[entry("towline-a", "https://gw", "a")], Some("towline-a")).unwrap();
        let again = read(&path);
        assert_eq!(again["contexts"][1]["context"]["namespace"], "work", "{again}");
        assert_eq!(
            (again["contexts"].as_array().unwrap().len(), &again["current-context"]),
            (3, &json!("towline-a"))
        );
    }

    /// Goal: an entry of another origin is never overwritten, whichever of the three it is, and nothing else is written then.
    #[test]
    fn entries_of_others_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        fs::write(&path, THEIRS).unwrap();
        let refused =
            write(&path, &[entry("new", "https://gw", "new"), entry("mine", "https://gw", "mine")], None);
        let text = refused.unwrap_err().text().unwrap();
        assert!(text.contains("--name") && text.contains("\"mine\""), "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), THEIRS);
        // Another gateway's, and another cluster's under a chosen name, are others', too.
        write(&path, &[entry("x", "https://gw", "a")], None).unwrap();
        for other in [entry("x", "https://other", "a"), entry("x", "https://gw", "b")] {
            assert!(write(&path, &[other], None).is_err());
        }
        // Only a user of that name, without a context.
        fs::write(&path, "users:\n- name: lone\n  user: {token: t}\n").unwrap();
        let text = write(&path, &[entry("lone", "https://gw", "a")], None).unwrap_err().text().unwrap();
        assert!(text.contains("user \"lone\""), "{text}");
    }

    /// Goal: kubectl and this program keep each other out, by the file that kubectl makes.
    #[test]
    fn the_lock_is_kubectls() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let lock = directory.path().join("config.lock");
        fs::write(&lock, "").unwrap();
        let refused = write_within(&path, &[entry("a", "https://gw", "a")], None, Duration::ZERO);
        let text = refused.unwrap_err().text().unwrap();
        assert!(text.contains("config.lock") && !path.exists() && lock.exists(), "{text}");
        let released = thread::spawn({
            let lock = lock.clone();
            move || {
                thread::sleep(Duration::from_millis(120));
                fs::remove_file(lock).unwrap();
            }
        });
        write_within(&path, &[entry("a", "https://gw", "a")], None, PATIENT).unwrap();
        released.join().unwrap();
        assert!(path.exists() && !lock.exists());
    }

    /// Goal: concurrent writers lose none of each other's changes.
    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        thread::scope(|scope| {
            for number in 0..8 {
                let path = &path;
                scope.spawn(move || {
                    let entry = entry(&format!("n{number}"), "https://gw", "a");
                    write_within(path, &[entry], None, PATIENT).unwrap()
                });
            }
        });
        assert_eq!(read(&path)["contexts"].as_array().unwrap().len(), 8);
    }

    #[test]
    fn a_symlink_stays_one_and_a_broken_file_is_not_changed() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::write(&real, THEIRS).unwrap();
        symlink(&real, &link).unwrap();
        write(&link, &[entry("a", "https://gw", "a")], None).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(read(&real)["contexts"].as_array().unwrap().len(), 2);
        for broken in ["clusters: [", "clusters: 3\n", "- a\n"] {
            fs::write(&real, broken).unwrap();
            assert!(write(&link, &[entry("b", "https://gw", "b")], None).is_err(), "{broken}");
            assert_eq!(fs::read_to_string(&real).unwrap(), broken);
        }
    }
}
