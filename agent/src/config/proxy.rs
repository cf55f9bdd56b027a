//! Proxy settings: which proxy the agent uses and which destinations it reaches directly, from `proxy` in the configuration
//! or else from the environment.

use std::path::PathBuf;
use std::str::FromStr as _;

use towline_proto::dial::proxy::{NoProxy, NoProxyEntry, ProxyUrl, Source};

use crate::config::yaml::Section;

/// The configured proxy.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    pub url: ProxyUrl,
    /// Where the password is, if it is not in the URL; read again whenever it changes.
    pub password_file: Option<PathBuf>,
    /// CA bundle for an `https://` proxy; the system's trust store if none is named.
    pub ca: Option<PathBuf>,
    /// Destinations that are dialled directly.
    pub no_proxy: NoProxy,
    pub source: Source,
}

impl ProxyConfig {
    /// What the section `proxy` says, else the environment. With the section the environment does not count at all.
    pub(crate) fn read(root: &Section<'_>) -> Option<Self> {
        let section = root.section("proxy");
        let (password_file, ca) = (section.path("passwordFile"), section.path("ca"));
        let no_proxy: Vec<_> = section.texts("noProxy").into_iter().map(NoProxyEntry::from_str).collect();
        let mut entries = Vec::new();
        for entry in no_proxy {
            entry.map_or_else(|error| section.problem("noProxy", error), |entry| entries.push(entry));
        }
        if !root.has("proxy") {
            let (source, url, no_proxy) = Source::environment()?;
            let url = ProxyUrl::as_go_reads(&url);
            let url = url.map_err(|problem| root.problem(&source.to_string(), problem)).ok()?;
            return Some(Self { url, password_file: None, ca: None, no_proxy, source });
        }
        let url = section.required("url")?;
        if url == OFF {
            for key in ["passwordFile", "ca", "noProxy"] {
                if section.has(key) {
                    section.problem(key, format_args!("is there, but url is {OFF}: no proxy is used"));
                }
            }
            return None;
        }
        let url: ProxyUrl = url.parse().map_err(|error| section.problem("url", error)).ok()?;
        if password_file.is_some() && url.has_password() {
            section.problem("passwordFile", "is there, and url holds a password too: leave one");
        }
        if password_file.is_some() && url.user.is_none() {
            section.problem("passwordFile", "is there, but url names no user: http://USER@HOST:PORT");
        }
        if ca.is_some() && !url.tls {
            section.problem("ca", "is there, but url is http://: nothing would be checked against it");
        }
        Some(Self { url, password_file, ca, no_proxy: NoProxy::new(entries), source: Source::Configuration })
    }

    /// For `--check`; reads as itself, but for a password that is in the URL.
    pub(crate) fn effective(&self) -> serde_json::Value {
        serde_json::json!({
            "url": self.url.to_string(),
            "passwordFile": self.password_file,
            "ca": self.ca,
            "noProxy": self.no_proxy.entries().map(ToString::to_string).collect::<Vec<_>>(),
        })
    }
}

/// What `proxy.url` is to use no proxy, whatever the environment says.
const OFF: &str = "none";
