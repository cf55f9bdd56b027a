//! Reads the kubeconfig as kubectl finds and merges it, and resolves a context into a gateway and a user.

use super::connection::ConnectionArguments;
use super::exec::Plugin;
use super::failure::{Failure, Outcome};
use super::proxy::Proxy;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use std::path::{Path, PathBuf};
use thiserror::Error;
use towline_certs::FileBytes;
use towline_proto::dial::address::Address;

/// The name of the extension that marks the entries which this program has written.
pub(crate) const MARK: &str = "towline.io";

/// The files in order of precedence.
#[derive(Debug)]
pub(crate) struct Kubeconfig {
    files: Vec<File>,
}

/// One file.
#[derive(Debug)]
struct File {
    path: PathBuf,
    content: Value,
}

/// An entry and the directory that its paths start from.
#[derive(Clone, Copy, Debug)]
struct Located<'a> {
    content: &'a Value,
    file: &'a File,
}

/// A gateway and a credential for it.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) name: String,
    /// `https://HOST:PORT`, without a path.
    pub(crate) gateway: String,
    /// Its host and port.
    pub(crate) address: Address,
    /// The proxy for connections to it.
    pub(crate) proxy: Option<Proxy>,
    /// `proxy-url`, for entries that are written from this one.
    pub(crate) proxy_url: Option<String>,
    /// The CA bundle as PEM; `None` for the system's.
    pub(crate) ca: Option<Bundle>,
    /// The name in the gateway's certificate, if it differs from the host.
    pub(crate) server_name: Option<String>,
    pub(crate) user: User,
    /// The files that were read.
    pub(crate) files: Vec<PathBuf>,
}

/// What a context selects, for programs that judge it by themselves.
pub struct Selected {
    /// The URL of the server.
    pub server: String,
    /// The CA bundle; `None` for the system's.
    pub ca: Option<FileBytes>,
    /// The chain of the client certificate, and its key.
    pub certificate: Option<(FileBytes, FileBytes)>,
    pub token: Option<String>,
}

impl std::fmt::Debug for Selected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Selected").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Why a kubeconfig selects nothing.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct KubeconfigError(String);

/// PEM and where it is from.
#[derive(Clone)]
pub(crate) struct Bundle {
    pub(crate) pem: Vec<u8>,
    pub(crate) from: PathBuf,
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bundle").field("from", &self.from).finish_non_exhaustive()
    }
}

impl Bundle {
    pub(crate) fn file(&self) -> FileBytes {
        FileBytes::from_memory(&self.from, self.pem.clone())
    }
}

/// The credential of a context's user.
pub(crate) enum User {
    Certificate {
        chain: Bundle,
        key: Bundle,
    },
    Token(String),
    Plugin(Plugin),
    /// No credential.
    Nobody,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Certificate { .. } => "Certificate(..)",
            Self::Token(_) => "Token(..)",
            Self::Plugin(_) => "Plugin(..)",
            Self::Nobody => "Nobody",
        })
    }
}

/// What a context of one file selects; without a name the current context.
///
/// # Errors
/// The file cannot be read, has no such context, or names a file that cannot be read.
pub fn select(file: &Path, context: Option<&str>) -> Result<Selected, KubeconfigError> {
    let connection =
        ConnectionArguments { kubeconfig: vec![file.to_owned()], context: context.map(ToOwned::to_owned) };
    let select = || {
        let kubeconfig = Kubeconfig::load(&connection)?;
        let (cluster, user) = kubeconfig.parts(&kubeconfig.chosen(context)?)?;
        let (certificate, token) = match user {
            Some(user) => (user.certificate()?, user.token()?),
            None => (None, None),
        };
        Ok(Selected {
            server: cluster.content["server"].as_str().unwrap_or_default().to_owned(),
            ca: cluster.bundle("certificate-authority")?.map(|ca| ca.file()),
            certificate: certificate.map(|(chain, key)| (chain.file(), key.file())),
            token,
        })
    };
    select().map_err(|failure: Failure| KubeconfigError(failure.text().unwrap_or_default()))
}

/// The candidate kubeconfig files, and whether they must exist: those named for this program must.
pub(crate) fn places(connection: &ConnectionArguments) -> (Vec<PathBuf>, bool) {
    if !connection.kubeconfig.is_empty() {
        return (connection.kubeconfig.clone(), true);
    }
    let (ours, kubectls) = (listed("TOWLINE_KUBECONFIG"), listed("KUBECONFIG"));
    if !ours.is_empty() {
        (ours, true)
    } else if !kubectls.is_empty() {
        (kubectls, false)
    } else {
        (home_file().into_iter().collect(), false)
    }
}

/// The file into which kubectl would write.
pub(crate) fn kubectls() -> Option<PathBuf> {
    listed("KUBECONFIG").into_iter().next().or_else(home_file)
}

fn listed(variable: &str) -> Vec<PathBuf> {
    let list = std::env::var_os(variable).unwrap_or_default();
    std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect()
}

fn home_file() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|home| !home.is_empty()).map(|home| Path::new(&home).join(".kube/config"))
}

/// A kubeconfig's content; `None` for an empty file.
pub(crate) fn parse(path: &Path, text: &str) -> Outcome<Value> {
    if text.trim().is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    // Without the surrounding lines, which may contain a token.
    let content: Value = serde_saphyr::from_str(text).map_err(|error| {
        Failure::usage(format!("{} is not a kubeconfig: {}", path.display(), error.without_snippet()))
    })?;
    match content {
        Value::Null => Ok(Value::Object(serde_json::Map::new())),
        Value::Object(_) => Ok(content),
        _ => Err(Failure::usage(format!("{} is not a kubeconfig: it has no fields", path.display()))),
    }
}

impl Kubeconfig {
    /// Reads the files that the flags, `$KUBECONFIG` or the home directory name.
    pub(crate) fn load(connection: &ConnectionArguments) -> Outcome<Self> {
        let (places, required) = places(connection);
        let mut files = Vec::new();
        for path in &places {
            let text = match std::fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => continue,
                Err(error) => return Err(Failure::usage(format!("{}: {error}", path.display()))),
            };
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let content = parse(&path, &text)?;
            files.push(File { path, content });
        }
        if files.is_empty() {
            let looked: Vec<_> = places.iter().map(|path| path.display().to_string()).collect();
            return Err(Failure::usage(format!(
                "no kubeconfig found (looked for {}).\nOn the gateway's machine, create one for the first admin:\n  towline-gateway --config FILE admin-kubeconfig --output admin.yaml\n  export TOWLINE_KUBECONFIG=$PWD/admin.yaml",
                if looked.is_empty() { "$KUBECONFIG and $HOME".to_owned() } else { looked.join(", ") }
            )));
        }
        Ok(Self { files })
    }

    /// The gateway's context: the selected one, or the one from which this program wrote the selected entry.
    pub(crate) fn gateways(connection: &ConnectionArguments) -> Outcome<Context> {
        let kubeconfig = Self::load(connection)?;
        let context = kubeconfig.context(connection)?;
        match kubeconfig.origin(&context.name) {
            Some(origin) => Self::load(&origin)?.context(&origin),
            None => Ok(context),
        }
    }

    /// The name of the context of the flags, or else of the current one.
    fn chosen(&self, context: Option<&str>) -> Outcome<String> {
        let mut said = self.files.iter().filter_map(|file| file.content["current-context"].as_str());
        let name = context.or_else(|| said.find(|name| !name.is_empty()));
        name.map(ToOwned::to_owned).ok_or_else(|| {
            Failure::usage(format!(
                "the kubeconfig has no current context; choose one with --context NAME. Available: {}",
                self.names()
            ))
        })
    }

    /// The cluster of a context, and its user if it names one.
    fn parts(&self, name: &str) -> Outcome<(Located<'_>, Option<Located<'_>>)> {
        let context = self.entry("contexts", "context", name).ok_or_else(|| {
            Failure::usage(format!("the kubeconfig has no context {name:?}. Available: {}", self.names()))
        })?;
        let part = |list: &str, inner: &str| {
            let wanted = context.content[inner].as_str().unwrap_or_default();
            self.entry(list, inner, wanted).ok_or_else(|| {
                Failure::usage(format!(
                    "context {name:?} refers to the {inner} {wanted:?}, which is not in the kubeconfig"
                ))
            })
        };
        let user = match context.content["user"].as_str() {
            None | Some("") => None,
            Some(_) => Some(part("users", "user")?),
        };
        Ok((part("clusters", "cluster")?, user))
    }

    /// Resolves the context of the flags, or else the current one.
    pub(crate) fn context(&self, connection: &ConnectionArguments) -> Outcome<Context> {
        let name = self.chosen(connection.context.as_deref())?;
        let (cluster, user) = self.parts(&name)?;
        let user = user.map_or(Ok(User::Nobody), |user| user.user(&name))?;
        let server = cluster.content["server"].as_str().unwrap_or_default();
        let (gateway, address) = gateway(server).ok_or_else(|| {
            Failure::usage(format!("the server {server:?} of context {name:?} is not https://GATEWAY; choose a gateway's context with --context NAME"))
        })?;
        if cluster.content["insecure-skip-tls-verify"] == true {
            return Err(Failure::usage(format!(
                "context {name:?} sets insecure-skip-tls-verify, which towline does not support; set the gateway's CA (certificate-authority) instead"
            )));
        }
        let proxy_url = cluster.content["proxy-url"].as_str().filter(|proxy| !proxy.is_empty());
        let ca = cluster.bundle("certificate-authority")?;
        let server_name = cluster.content["tls-server-name"].as_str().filter(|name| !name.is_empty());
        Ok(Context {
            server_name: server_name.map(ToOwned::to_owned),
            proxy: Proxy::find(proxy_url, &address)?,
            proxy_url: proxy_url.map(ToOwned::to_owned),
            gateway,
            address,
            ca,
            user,
            files: self.files.iter().map(|file| file.path.clone()).collect(),
            name,
        })
    }

    /// The gateway context from which this program wrote a cluster's context, if it did.
    pub(crate) fn origin(&self, context: &str) -> Option<ConnectionArguments> {
        let entry = self.entry("contexts", "context", context)?;
        let mark = mark(entry.content)?;
        let files = mark["kubeconfig"].as_array().into_iter().flatten().filter_map(Value::as_str);
        Some(ConnectionArguments {
            kubeconfig: files.map(PathBuf::from).collect(),
            context: Some(mark["context"].as_str()?.to_owned()),
        })
    }

    /// The first entry of a name wins, as in kubectl.
    fn entry(&self, list: &str, inner: &str, name: &str) -> Option<Located<'_>> {
        self.files.iter().find_map(|file| {
            let mut entries = file.content[list].as_array().into_iter().flatten();
            let entry = entries.find(|entry| entry["name"] == name)?;
            Some(Located { content: &entry[inner], file })
        })
    }

    fn names(&self) -> String {
        let lists = self.files.iter().filter_map(|file| file.content["contexts"].as_array());
        let names: Vec<_> = lists.flatten().filter_map(|entry| entry["name"].as_str()).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }
}

/// The content of an entry's mark, if it has one.
pub(crate) fn mark(content: &Value) -> Option<&Value> {
    let extensions = content["extensions"].as_array()?;
    extensions.iter().find(|extension| extension["name"] == MARK).map(|extension| &extension["extension"])
}

impl Located<'_> {
    /// A file that the entry names or embeds; embedded data wins, as in kubectl.
    fn bundle(&self, field: &str) -> Outcome<Option<Bundle>> {
        let data = &self.content[format!("{field}-data").as_str()];
        if let Some(data) = data.as_str().filter(|data| !data.is_empty()) {
            let pem = STANDARD.decode(data).map_err(|_| {
                Failure::usage(format!("{}: {field}-data is not base64", self.file.path.display()))
            })?;
            return Ok(Some(Bundle { pem, from: self.file.path.join(format!("{field}-data")) }));
        }
        let Some(path) = self.content[field].as_str().filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        let from = self.resolve(path);
        let pem = std::fs::read(&from).map_err(|error| {
            Failure::usage(format!("{} ({field} of {}): {error}", from.display(), self.file.path.display()))
        })?;
        Ok(Some(Bundle { pem, from }))
    }

    /// Paths are relative to the file that names them.
    fn resolve(&self, path: &str) -> PathBuf {
        self.file.path.parent().unwrap_or_else(|| Path::new(".")).join(path)
    }

    /// The client certificate and its key.
    fn certificate(&self) -> Outcome<Option<(Bundle, Bundle)>> {
        Ok(self.bundle("client-certificate")?.zip(self.bundle("client-key")?))
    }

    /// The token; a file wins, as in kubectl.
    fn token(&self) -> Outcome<Option<String>> {
        if let Some(path) = self.content["tokenFile"].as_str().filter(|path| !path.is_empty()) {
            let path = self.resolve(path);
            let token = std::fs::read_to_string(&path)
                .map_err(|error| Failure::usage(format!("{} (tokenFile): {error}", path.display())))?;
            return Ok(Some(token.trim().to_owned()));
        }
        Ok(self.content["token"].as_str().filter(|token| !token.is_empty()).map(ToOwned::to_owned))
    }

    fn user(&self, context: &str) -> Outcome<User> {
        if self.content["exec"].is_object() {
            let mut plugin = Plugin::from_kubeconfig(&self.content["exec"]).ok_or_else(|| {
                Failure::usage(format!("the user of context {context:?} has an exec without a command"))
            })?;
            // A plain name is searched in $PATH; a path is relative to the file.
            if plugin.command.contains('/') {
                plugin.command = self.resolve(&plugin.command).display().to_string();
            }
            return Ok(User::Plugin(plugin));
        }
        if let Some((chain, key)) = self.certificate()? {
            return Ok(User::Certificate { chain, key });
        }
        match self.token()? {
            Some(token) => Ok(User::Token(token)),
            None if self.content["username"].is_string() || self.content["auth-provider"].is_object() => {
                Err(Failure::usage(format!(
                    "the user of context {context:?} has a password or an auth-provider; use a client certificate, a token or an exec plugin"
                )))
            }
            None => Ok(User::Nobody),
        }
    }
}

/// The gateway of a server's URL, which may go on to a cluster: its URL, and its host and port.
fn gateway(server: &str) -> Option<(String, Address)> {
    let url: http::Uri = server.parse().ok()?;
    if url.scheme_str() != Some("https") {
        return None;
    }
    let path = url.path().trim_end_matches('/');
    let cluster = path.strip_prefix("/clusters/").is_some_and(|name| !name.is_empty() && !name.contains('/'));
    if !path.is_empty() && !cluster {
        return None;
    }
    let authority = url.authority()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let (host, port) = (authority.host(), authority.port_u16());
    // A fully qualified name with a final dot, which certificates never have.
    let host = host.strip_suffix('.').unwrap_or(host);
    let written = match port {
        Some(port) => format!("https://{host}:{port}"),
        None => format!("https://{host}"),
    };
    Some((written, Address { host: host.parse().ok()?, port: port.unwrap_or(443) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the error about a kubeconfig does not quote the surrounding lines.
    #[test]
    fn a_mistake_shows_no_secret() {
        let text = "users:\n- name: a\n  user:\n    token: CANARY-1\n    token: CANARY-2\n  bad: [\n";
        let told = format!("{:?}", parse(Path::new("config"), text).unwrap_err());
        assert!(told.contains("config is not a kubeconfig") && !told.contains("CANARY"), "{told}");
    }

    fn connection(files: &[PathBuf], context: Option<&str>) -> ConnectionArguments {
        ConnectionArguments { kubeconfig: files.to_vec(), context: context.map(ToOwned::to_owned) }
    }

    #[test]
    fn the_gateway_of_a_cluster_is_its_server_without_the_path() {
        for (server, wanted) in [
            ("https://gw", Some(("https://gw", "gw:443"))),
            ("https://gw:8443/", Some(("https://gw:8443", "gw:8443"))),
            ("https://gw/clusters/prod", Some(("https://gw", "gw:443"))),
            ("https://[::1]:1/clusters/prod/", Some(("https://[::1]:1", "[::1]:1"))),
            ("https://gw.example.com.:8443", Some(("https://gw.example.com:8443", "gw.example.com:8443"))),
            ("https://gw..", None),
            ("https://./", None),
            ("https://gw/api", None),
            ("https://gw/clusters/a/b", None),
            ("http://gw", None),
            ("https://user@gw", None),
            ("gw", None),
        ] {
            let found = gateway(server);
            let found = found.as_ref().map(|(url, address)| (url.as_str(), address.to_string()));
            assert_eq!(found, wanted.map(|(url, address)| (url, address.to_owned())), "{server}");
        }
    }

    /// Goal: the files of a list are merged as kubectl merges them: the first entry of a name, the first current context, each
    /// path from its own file.
    #[test]
    fn files_are_merged_as_kubectl_does() {
        let directory = tempfile::tempdir().unwrap();
        let (a, b) = (directory.path().join("a/config"), directory.path().join("b/config"));
        for file in [&a, &b] {
            std::fs::create_dir(file.parent().unwrap()).unwrap();
        }
        std::fs::write(directory.path().join("b/ca.crt"), "PEM").unwrap();
        std::fs::write(directory.path().join("b/token"), "tlat_b\n").unwrap();
        std::fs::write(&a, "clusters:\n- name: one\n  cluster: { server: 'https://first' }\ncontexts:\n- name: x\n  context: { cluster: two, user: u }\n").unwrap();
        std::fs::write(&b, "current-context: x\nclusters:\n- name: one\n  cluster: { server: 'https://second' }\n- name: two\n  cluster: { server: 'https://two/clusters/prod', certificate-authority: ca.crt, tls-server-name: gw }\nusers:\n- name: u\n  user: { tokenFile: token }\ncontexts:\n- name: other\n  context: { cluster: one, user: '' }\n").unwrap();
        let kubeconfig = Kubeconfig::load(&connection(&[a.clone(), b.clone()], None)).unwrap();
        let context = kubeconfig.context(&connection(&[], None)).unwrap();
        assert_eq!((context.gateway.as_str(), context.server_name.as_deref()), ("https://two", Some("gw")));
        assert_eq!(context.ca.unwrap().pem, b"PEM");
        assert!(matches!(context.user, User::Token(token) if token == "tlat_b"));
        let other = kubeconfig.context(&connection(&[], Some("other"))).unwrap();
        assert_eq!(other.gateway, "https://first");
        let missing = kubeconfig.context(&connection(&[], Some("z"))).unwrap_err();
        assert!(
            missing.code() == 2 && missing.text().unwrap().contains("Available: x, other"),
            "{missing:?}"
        );
    }

    #[test]
    fn a_missing_kubeconfig_names_the_command_that_creates_one() {
        let gone = Kubeconfig::load(&connection(&["/nowhere/config".into()], None)).unwrap_err();
        assert!(gone.code() == 2 && gone.text().unwrap().contains("/nowhere/config"), "{gone:?}");
    }

    #[test]
    fn what_is_not_checked_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config");
        std::fs::write(&file, "current-context: x\nclusters:\n- name: c\n  cluster: { server: 'https://gw', insecure-skip-tls-verify: true }\ncontexts:\n- name: x\n  context: { cluster: c }\n").unwrap();
        let connection = connection(&[file], None);
        let refused = Kubeconfig::load(&connection).unwrap().context(&connection).unwrap_err();
        assert!(refused.text().unwrap().contains("insecure-skip-tls-verify"), "{refused:?}");
    }
}
