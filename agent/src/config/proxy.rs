//! Proxy settings: which proxy the agent uses and which destinations it reaches directly, from `proxy` in the configuration
//! or else from the environment.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use towline_proto::dial::proxy::{NoProxy, NoProxyEntry, ProxyUrl, Source};
use towline_settings::{Each, Secret, Section, section};

/// What `proxy.url` is to use no proxy, whatever the environment says.
const OFF: &str = "none";

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
    /// The proxy of the environment, if it names one.
    ///
    /// # Errors
    /// What is wrong with it, and who names it.
    pub(crate) fn of_environment() -> Result<Option<Self>, (Source, &'static str)> {
        let Some((source, url, no_proxy)) = Source::environment() else { return Ok(None) };
        let url = ProxyUrl::as_go_reads(&url).map_err(|problem| (source, problem))?;
        Ok(Some(Self { url, password_file: None, ca: None, no_proxy, source }))
    }
}

section! {
    /// An HTTP proxy on the way to the gateway. With this section the environment does not count at all.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub(crate) struct ProxySection {
        /// `http://USER@HOST:PORT` or `https://`; `none` uses no proxy, whatever the environment says.
        pub url: ProxyTo as Secret;
        /// Where the password is, if it is not in the URL.
        pub password_file: Option<PathBuf>;
        /// CA bundle for an `https://` proxy; the system's trust store if none is named.
        pub ca: Option<PathBuf>;
        /// What is dialled directly, as in NO_PROXY.
        pub no_proxy: Vec<NoProxyEntry> as Each<Secret>;
    }
}

impl ProxySection {
    /// The proxy that it names, if it names one.
    pub(crate) fn proxy(&self) -> Option<ProxyConfig> {
        let ProxyTo::Url(url) = self.url.clone() else { return None };
        Some(ProxyConfig {
            url,
            password_file: self.password_file.clone(),
            ca: self.ca.clone(),
            no_proxy: NoProxy::new(self.no_proxy.clone()),
            source: Source::Configuration,
        })
    }

    /// The section that says what is in force: it reads as itself, but for a password that is in the URL.
    pub(crate) fn of(proxy: Option<&ProxyConfig>) -> Self {
        match proxy {
            None => Self { url: ProxyTo::Nowhere, password_file: None, ca: None, no_proxy: Vec::new() },
            Some(ProxyConfig { url, password_file, ca, no_proxy, source: _ }) => Self {
                url: ProxyTo::Url(url.clone()),
                password_file: password_file.clone(),
                ca: ca.clone(),
                no_proxy: no_proxy.entries().cloned().collect(),
            },
        }
    }

    fn check(&self, section: &Section<'_>) {
        let given = [
            ("passwordFile", self.password_file.is_some()),
            ("ca", self.ca.is_some()),
            ("noProxy", !self.no_proxy.is_empty()),
        ];
        let against_url = |key: &str, what: &dyn fmt::Display| section.contradiction(&[key, "url"], what);
        match &self.url {
            ProxyTo::Nowhere => {
                for (key, _) in given.iter().filter(|(_, given)| *given) {
                    against_url(key, &format_args!("is there, but url is {OFF}: no proxy is used"));
                }
            }
            ProxyTo::Url(url) => {
                if self.password_file.is_some() && url.has_password() {
                    against_url("passwordFile", &"is there, and url holds a password too: leave one");
                }
                if self.password_file.is_some() && url.user.is_none() {
                    against_url("passwordFile", &"is there, but url names no user: http://USER@HOST:PORT");
                }
                if self.ca.is_some() && !url.tls {
                    against_url("ca", &"is there, but url is http://: nothing would be checked against it");
                }
            }
        }
    }
}

/// What `proxy.url` says.
#[derive(Clone, Debug)]
pub(crate) enum ProxyTo {
    /// `none`
    Nowhere,
    Url(ProxyUrl),
}

impl FromStr for ProxyTo {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == OFF { Ok(Self::Nowhere) } else { text.parse().map(Self::Url) }
    }
}

/// With the password masked.
impl fmt::Display for ProxyTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => f.write_str(OFF),
            Self::Url(url) => url.fmt(f),
        }
    }
}
