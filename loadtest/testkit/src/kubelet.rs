//! Runs a program exactly as its Deployment describes, without a cluster, as a kubelet would: with the container's command,
//! arguments and environment; its volumes as files at their mount paths; the user and rights of its security context, with
//! a read-only root; and its own network, where its probes reach it.
//!
//! What is not done: seccomp, resource limits, images (the container's root has the machine's libraries and the one program).

use crate::netns::{find, free_range, ip, output, probe};
use crate::stack::{Process, binary, plain_get};
use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Most pods on one node, which has 16 addresses.
const PODS_MAX: u32 = 14;

/// Lays the container's root out in a mount namespace of its own. Takes the root's place, the program and the command.
const SCRIPT: &str = r#"
root=$1; program=$2; shift 2
setpriv=$(command -v setpriv || echo /usr/bin/setpriv); chroot=$(command -v chroot || echo /usr/sbin/chroot)
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$root"
bind() { # SOURCE PLACE ro|rw
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${2%/*}"; : >"$root$2"; fi
    mount --bind "$1" "$root$2"
    [ "$3" = rw ] || mount -o remount,bind,ro "$root$2"
}
for place in /lib /lib64 /usr/lib /usr/lib64; do
    if [ -L "$place" ]; then mkdir -p "$root${place%/*}"; ln -s "$(readlink "$place")" "$root$place"
    elif [ -d "$place" ]; then bind "$place" "$place" ro; fi
done
bind "$program" "/usr/local/bin/${program##*/}" ro
mkdir -p "$root/proc" && mount --rbind /proc "$root/proc"
for device in null urandom; do bind "/dev/$device" "/dev/$device" rw; done
mkdir -p "$root/etc"; echo "127.0.0.1 localhost" >"$root/etc/hosts"
"#;

/// The machine on which pods run: an address that they all reach, and a link to each.
#[derive(Debug)]
pub struct Node {
    directory: PathBuf,
    base: u32,
    link: String,
    pods: u32,
}

/// Objects of the API server, as in its lists.
#[derive(Clone, Debug)]
pub struct Objects(pub Vec<Value>);

/// Values that only the control plane can give to a pod.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// A ServiceAccount token for a subject and an audience; without one, for the API server.
    pub token: &'a dyn Fn(&str, Option<&str>) -> String,
    /// The API server's address for pods.
    pub api_server: SocketAddr,
}

impl std::fmt::Debug for Given<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Given").field("api_server", &self.api_server).finish_non_exhaustive()
    }
}

/// A pod of one container. Dropping it kills it.
#[derive(Debug)]
pub struct Pod {
    /// Its only process.
    pub process: Process,
    spec: Value,
    namespace: String,
    // After the process, which it holds.
    _netns: Netns,
    address: Ipv4Addr,
    volumes: PathBuf,
}

/// A network namespace; gone when dropped.
#[derive(Debug)]
struct Netns(String);

impl Drop for Netns {
    fn drop(&mut self) {
        // A missing object cannot be removed, and a failure has no remedy here.
        drop(output("ip", &["netns", "del", &self.0]));
    }
}

impl Node {
    /// Why no pod can run here, if none can.
    #[must_use]
    pub fn missing() -> Option<String> {
        let user = output("id", &["-u"]).unwrap_or_default();
        if user.trim() != "0" {
            return Some("it needs root".to_owned());
        }
        for (program, version) in
            [("ip", "-V"), ("unshare", "--version"), ("setpriv", "--version"), ("chroot", "--version")]
        {
            if output(program, &[version]).is_err() {
                return Some(format!("no {program} on PATH"));
            }
        }
        probe()
    }

    /// Gives this machine an address that pods reach.
    ///
    /// # Errors
    /// The kernel refuses a step.
    pub fn start(directory: &Path) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let base = free_range(process.wrapping_mul(67).wrapping_add(number))?;
        // A link's name has 15 characters at most.
        let link = format!("k{process}n{number}");
        let node = Self { directory: directory.to_owned(), base, link, pods: 0 };
        let (link, address) = (&node.link, node.address());
        ip(
            None,
            &format!(
                "link add {link} type veth peer name {link}x
                address add {address}/32 dev {link}
                link set {link} up
                link set {link}x up"
            ),
        )?;
        Ok(node)
    }

    /// Where the gateway and the API server listen.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }

    /// Starts a pod of a Deployment.
    ///
    /// # Errors
    /// The Deployment asks for what is not there, or the kernel refuses something.
    pub fn pod(&mut self, deployment: &Value, objects: &Objects, given: Given<'_>) -> anyhow::Result<Pod> {
        let number = self.pods;
        self.pods += 1;
        let netns = Netns(format!("towline-{}-pod{number}", self.link));
        let address = Ipv4Addr::from(self.base + 2 + number % PODS_MAX);
        let spec = deployment["spec"]["template"]["spec"].clone();
        let namespace = text(&deployment["metadata"]["namespace"])?.to_owned();
        let place = self.directory.join(format!("pod-{number}"));
        let volumes = place.join("volumes");
        fs::create_dir_all(&volumes)?;
        self.connect(&netns.0, &format!("{}p{number}", self.link), address)?;
        materialise(&spec, &namespace, &volumes, objects, given)?;
        let process = self.run(&spec, &netns.0, &place, given)?;
        Ok(Pod { process, spec, namespace, _netns: netns, address, volumes })
    }

    fn connect(&self, netns: &str, link: &str, address: Ipv4Addr) -> anyhow::Result<()> {
        let here = self.address();
        output("ip", &["netns", "add", netns])?;
        ip(
            None,
            &format!(
                "link add {link} type veth peer name eth0 netns {netns}
                link set {link} up
                route add {address}/32 dev {link} src {here}"
            ),
        )?;
        ip(
            Some(netns),
            &format!(
                "address add {address}/32 dev eth0
                link set lo up
                link set eth0 up
                route add {here}/32 dev eth0 src {address}"
            ),
        )
    }

    fn run(&self, spec: &Value, netns: &str, place: &Path, given: Given<'_>) -> anyhow::Result<Process> {
        let container = &spec["containers"][0];
        let words = |field: &str| -> anyhow::Result<Vec<String>> {
            let list = container[field].as_array().map(Vec::as_slice).unwrap_or_default();
            list.iter().map(|word| Ok(text(word)?.to_owned())).collect()
        };
        let command = words("command")?;
        let program = command.first().context("the container has no command")?;
        let root = place.join("root");
        fs::create_dir_all(&root)?;
        let mut script = SCRIPT.to_owned();
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let source = place.join("volumes").join(text(&mount["name"])?);
            let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
            let (source, at) = (source.display(), text(&mount["mountPath"])?);
            script.push_str(&format!("bind {source} {at} {mode}\n"));
        }
        let mut environment = vec![
            "PATH=/usr/local/bin:/usr/bin:/bin".to_owned(),
            format!("HOSTNAME={netns}"),
            format!("KUBERNETES_SERVICE_HOST={}", given.api_server.ip()),
            format!("KUBERNETES_SERVICE_PORT={}", given.api_server.port()),
        ];
        for variable in container["env"].as_array().into_iter().flatten() {
            environment.push(format!("{}={}", text(&variable["name"])?, text(&variable["value"])?));
        }
        let (pod, own) = (&spec["securityContext"], &container["securityContext"]);
        let id = |field: &str| own[field].as_u64().or_else(|| pod[field].as_u64());
        let user = id("runAsUser").context("the image says no user, and neither does the pod")?;
        ensure!(
            user != 0 || own["runAsNonRoot"] != true && pod["runAsNonRoot"] != true,
            "root is not allowed"
        );
        let group = id("runAsGroup").unwrap_or(0);
        let groups = pod["fsGroup"].as_u64().map_or_else(String::new, |group| group.to_string());
        if own["readOnlyRootFilesystem"] == true {
            script.push_str("mount -o remount,ro \"$root\"\n");
        }
        let mut privileges = String::new();
        if own["allowPrivilegeEscalation"] == false {
            privileges.push_str(" --no-new-privs");
        }
        if own["capabilities"]["drop"].as_array().is_some_and(|list| list.iter().any(|name| name == "ALL")) {
            // chroot loses its own capabilities when it changes the user.
            privileges.push_str(" --bounding-set=-all,+sys_chroot,+setuid,+setgid");
        }
        script.push_str(&format!(
            "exec env -i {} \"$setpriv\"{privileges} \"$chroot\" --userspec={user}:{group} --groups={groups} \"$root\" \"$@\"\n",
            environment.join(" ")
        ));
        let built = binary(program)?;
        let ip = find("ip");
        let mut arguments: Vec<String> =
            ["netns", "exec", netns, "unshare", "-m", "sh", "-eu", "-c", &script, "pod"]
                .map(str::to_owned)
                .to_vec();
        for path in [&root, &built] {
            arguments.push(path.display().to_string());
        }
        arguments.extend(command.iter().cloned().chain(words("args")?));
        Process::start_program(&ip, &arguments, &place.join("log"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A missing object cannot be removed, and a failure has no remedy here.
        drop(output("ip", &["link", "del", &self.link]));
    }
}

impl Pod {
    /// Writes the volumes again, as the kubelet does when a token is due, or a ConfigMap or a Secret has changed.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn refresh(&self, objects: &Objects, given: Given<'_>) -> anyhow::Result<()> {
        materialise(&self.spec, &self.namespace, &self.volumes, objects, given)
    }

    /// Whether a probe of the container succeeds now.
    ///
    /// # Errors
    /// There is no such probe, or this kubelet does not support it.
    pub async fn probe(&self, probe: &str) -> anyhow::Result<bool> {
        let container = &self.spec["containers"][0];
        let get = &container[probe]["httpGet"];
        let path = text(&get["path"])?;
        let port = match &get["port"] {
            Value::String(name) => {
                let ports = container["ports"].as_array().context("the container names no ports")?;
                let port = ports.iter().find(|port| port["name"] == name.as_str());
                port.and_then(|port| port["containerPort"].as_u64()).context("no port of this name")?
            }
            port => port.as_u64().context("a probe's port")?,
        };
        let at = SocketAddr::new(self.address.into(), u16::try_from(port)?);
        let patience = Duration::from_secs(container[probe]["timeoutSeconds"].as_u64().unwrap_or(1));
        let answer = tokio::time::timeout(patience, plain_get(at, path)).await;
        Ok(matches!(answer, Ok(Ok((200..=399, _)))))
    }

    /// Where its health port is.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its process as the kernel sees it: a file of /proc.
    ///
    /// # Errors
    /// It has ended.
    pub fn proc_file(&self, name: &str) -> anyhow::Result<String> {
        Ok(fs::read_to_string(format!("/proc/{}/{name}", self.process.id()))?)
    }

    /// Ends it as a deletion does: TERM, and KILL when its time of grace is over. Tells the exit code; `None` if it was killed.
    pub async fn delete(self) -> Option<i32> {
        let grace = self.spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        let ended = self.process.terminate(Duration::from_secs(grace)).await;
        // A process that did not end in time was killed.
        ended.unwrap_or(None)
    }

    /// Ends it at once, as when its node is gone.
    ///
    /// # Errors
    /// It had ended by itself.
    pub async fn kill(self) -> anyhow::Result<()> {
        self.process.kill().await
    }
}

impl Objects {
    fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<&Value> {
        self.0.iter().find(|object| {
            let metadata = &object["metadata"];
            object["kind"] == kind && metadata["namespace"] == namespace && metadata["name"] == name
        })
    }

    /// The entries of a ConfigMap or a Secret.
    fn entries(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
        let object =
            self.find(kind, namespace, name).with_context(|| format!("there is no {kind} {name}"))?;
        let data = object["data"].as_object().into_iter().flatten();
        data.map(|(key, value)| {
            let value = text(value)?;
            let bytes = if kind == "Secret" { STANDARD.decode(value)? } else { value.as_bytes().to_vec() };
            Ok((key.clone(), bytes))
        })
        .collect()
    }
}

/// A file of a volume.
struct File {
    content: Vec<u8>,
    mode: u32,
}

/// Writes every volume of a pod: a directory of its own for each state, a link `..data` that is switched to it at once, and a link
/// for each file.
fn materialise(
    spec: &Value,
    namespace: &str,
    place: &Path,
    objects: &Objects,
    given: Given<'_>,
) -> anyhow::Result<()> {
    let group = spec["securityContext"]["fsGroup"].as_u64().map(u32::try_from).transpose()?;
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        let files = files(spec, volume, namespace, objects, given)?;
        let directory = place.join(text(&volume["name"])?);
        fs::create_dir_all(&directory)?;
        let old = fs::read_link(directory.join("..data")).ok();
        let number = old.as_ref().and_then(|old| old.to_str()?.rsplit('_').next()?.parse::<u32>().ok());
        let state = format!("..state_{}", number.map_or(0, |number| number + 1));
        fs::create_dir(directory.join(&state))?;
        for (path, File { content, mode }) in &files {
            let file = directory.join(&state).join(path);
            fs::write(&file, content)?;
            chown(&file, None, group)?;
            // As the kubelet does: the group may read what it owns.
            let mode = if group.is_some() { mode | 0o440 } else { *mode };
            fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        }
        symlink(&state, directory.join("..data_new"))?;
        fs::rename(directory.join("..data_new"), directory.join("..data"))?;
        for path in files.keys() {
            if fs::symlink_metadata(directory.join(path)).is_err() {
                symlink(Path::new("..data").join(path), directory.join(path))?;
            }
        }
        if let Some(old) = old {
            fs::remove_dir_all(directory.join(old))?;
        }
    }
    Ok(())
}

fn files(
    spec: &Value,
    volume: &Value,
    namespace: &str,
    objects: &Objects,
    given: Given<'_>,
) -> anyhow::Result<BTreeMap<String, File>> {
    let mode = |source: &Value| source["defaultMode"].as_u64().map_or(Ok(0o644), u32::try_from);
    if let Some(source) = volume.get("configMap") {
        return entries("ConfigMap", source, namespace, mode(source)?, objects);
    }
    if let Some(source) = volume.get("secret") {
        return entries("Secret", source, namespace, mode(source)?, objects);
    }
    let Some(projected) = volume.get("projected") else { bail!("a volume of another kind: {volume}") };
    let mut files = BTreeMap::new();
    for source in projected["sources"].as_array().into_iter().flatten() {
        if let Some(token) = source.get("serviceAccountToken") {
            let subject = format!("system:serviceaccount:{namespace}:{}", text(&spec["serviceAccountName"])?);
            let content = (given.token)(&subject, token["audience"].as_str()).into_bytes();
            files.insert(text(&token["path"])?.to_owned(), File { content, mode: 0o600 });
        } else if let Some(map) = source.get("configMap") {
            files.extend(entries("ConfigMap", map, namespace, mode(projected)?, objects)?);
        } else if let Some(secret) = source.get("secret") {
            files.extend(entries("Secret", secret, namespace, mode(projected)?, objects)?);
        } else {
            bail!("a source of another kind: {source}");
        }
    }
    Ok(files)
}

/// The chosen entries, or all of them.
fn entries(
    kind: &str,
    source: &Value,
    namespace: &str,
    mode: u32,
    objects: &Objects,
) -> anyhow::Result<BTreeMap<String, File>> {
    let name =
        source["name"].as_str().or_else(|| source["secretName"].as_str()).context("a volume's source")?;
    let mut found = match objects.entries(kind, namespace, name) {
        Err(_) if source["optional"] == true => return Ok(BTreeMap::new()),
        found => found?,
    };
    let Some(items) = source["items"].as_array() else {
        return Ok(found.into_iter().map(|(path, content)| (path, File { content, mode })).collect());
    };
    let mut files = BTreeMap::new();
    for item in items {
        let key = text(&item["key"])?;
        let content = found.remove(key).with_context(|| format!("{kind} {name} has no {key}"))?;
        files.insert(text(&item["path"])?.to_owned(), File { content, mode });
    }
    Ok(files)
}

fn text(value: &Value) -> anyhow::Result<&str> {
    value.as_str().with_context(|| format!("a string is expected, not {value}"))
}
