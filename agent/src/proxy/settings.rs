//! Which proxy is the agent told to use, and what does it reach without one? `proxy` in the configuration, else the environment.
//!
//! hyper-util has a matcher for such settings. It is not used here: it goes without a proxy, and without a word, where
//! the URL is malformed, and its exemptions have no ports.

use std::env;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::address::{Address, Host};
use crate::yaml::Section;

/// The proxy that the agent was told to use.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    pub url: ProxyUrl,
    /// Where the password is, if it is not in the URL; read again whenever it changes.
    pub password_file: Option<PathBuf>,
    /// CA bundle for an `https://` proxy; the system's trust store if none is named.
    pub ca: Option<PathBuf>,
    /// What is dialled directly.
    pub no_proxy: NoProxy,
    /// Who said so: `proxy`, or the name of a variable.
    pub source: &'static str,
}

/// `http://` or `https://`, a user and a password where there are any, host and port.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    pub tls: bool,
    pub user: Option<String>,
    pub(super) password: Option<Zeroizing<String>>,
    pub address: Address,
}

/// As an operator may see it: never with the password.
impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "https://" } else { "http://" })?;
        if let Some(user) = &self.user {
            let masked = self.password.as_ref().map_or_else(String::new, |_| format!(":{MASK}"));
            write!(f, "{}{masked}@", encoded(user))?;
        }
        self.address.fmt(f)
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ProxyUrl {
    type Err = &'static str;

    /// The error never quotes the text: there may be a password in it.
    fn from_str(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "is not http://HOST:PORT or http://USER@HOST:PORT (or https://)";
        let (tls, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return Err("names a kind of proxy that is not spoken: use http:// or https://"),
            // As curl reads it.
            None => (false, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, host) =
            rest.rsplit_once('@').map_or((None, rest), |(credentials, host)| (Some(credentials), host));
        let (user, password) =
            match credentials.map(|text| text.split_once(':').map_or((text, None), |(u, p)| (u, Some(p)))) {
                None => (None, None),
                Some((user, password)) => {
                    const ODD: &str = "has a user or password that is not percent-encoded text";
                    let user = decoded(user).ok_or(ODD)?;
                    let password = password.map(|text| decoded(text).ok_or(ODD)).transpose()?;
                    if user.is_empty() || user.contains(':') {
                        return Err(
                            "has credentials without a user, or a user with a colon, which Basic cannot say",
                        );
                    }
                    if password.as_deref() == Some(MASK) {
                        return Err("has the mask of a printed configuration in place of the password");
                    }
                    (Some(user), password.map(Zeroizing::new))
                }
            };
        let address = match host.parse::<Address>() {
            Ok(address) => address,
            Err(_) => Address { host: host.parse().map_err(|_| FORM)?, port: if tls { 443 } else { PORT } },
        };
        Ok(Self { tls, user, password, address })
    }
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
            let (url, source) = variable(["HTTPS_PROXY", "https_proxy"])?;
            let (no_proxy, _) = variable(["NO_PROXY", "no_proxy"]).unwrap_or_default();
            return Self::of_environment(&url, source, &no_proxy)
                .map_err(|problem| root.problem(source, problem))
                .ok();
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
        if password_file.is_some() && url.password.is_some() {
            section.problem("passwordFile", "is there, and url holds a password too: leave one");
        }
        if password_file.is_some() && url.user.is_none() {
            section.problem("passwordFile", "is there, but url names no user: http://USER@HOST:PORT");
        }
        if ca.is_some() && !url.tls {
            section.problem("ca", "is there, but url is http://: nothing would be checked against it");
        }
        Some(Self { url, password_file, ca, no_proxy: NoProxy(entries), source: "proxy" })
    }

    fn of_environment(url: &str, source: &'static str, no_proxy: &str) -> Result<Self, &'static str> {
        // A variable is shared by many programs: what this one cannot read in NO_PROXY is for another one.
        let entries = no_proxy.split([',', ' ']).filter_map(|entry| entry.trim().parse().ok());
        let own = [NoProxyEntry::Loopback];
        let no_proxy = NoProxy(own.into_iter().chain(entries).collect());
        Ok(Self { url: url.parse()?, password_file: None, ca: None, no_proxy, source })
    }

    /// For `--check`; reads as itself, but for a password that is in the URL.
    pub(crate) fn effective(&self) -> serde_json::Value {
        serde_json::json!({
            "url": self.url.to_string(),
            "passwordFile": self.password_file,
            "ca": self.ca,
            "noProxy": self.no_proxy.0.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    }
}

fn variable(names: [&'static str; 2]) -> Option<(String, &'static str)> {
    names.into_iter().find_map(|name| {
        let value = env::var(name).ok().filter(|value| !value.trim().is_empty())?;
        Some((value.trim().to_owned(), name))
    })
}

/// Destinations that are dialled directly, as Go and curl read `NO_PROXY`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoProxy(pub(super) Vec<NoProxyEntry>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoProxyEntry {
    /// `*`
    All,
    /// `localhost` and loopback addresses; comes with the environment, as in Go.
    Loopback,
    Net(IpNet),
    Ip(IpAddr, Option<u16>),
    /// `example.com`: this name and all below it. `.example.com`, `*.example.com`: all below it only.
    Name {
        name: String,
        itself: bool,
        port: Option<u16>,
    },
}

impl NoProxy {
    /// Whether this destination is dialled directly. Names are not resolved: only what is written is compared.
    #[must_use]
    pub fn exempts(&self, address: &Address) -> bool {
        let port_ok = |port: &Option<u16>| port.is_none_or(|port| port == address.port);
        self.0.iter().any(|entry| match (entry, &address.host) {
            (NoProxyEntry::All, _) => true,
            (NoProxyEntry::Loopback, Host::Ip(ip)) => ip.to_canonical().is_loopback(),
            (NoProxyEntry::Loopback, Host::Name(name)) => &**name == "localhost",
            (NoProxyEntry::Net(net), Host::Ip(ip)) => net.contains(&ip.to_canonical()),
            (NoProxyEntry::Ip(exempt, port), Host::Ip(ip)) => *exempt == ip.to_canonical() && port_ok(port),
            (NoProxyEntry::Name { name, itself, port }, Host::Name(host)) => {
                let below = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                port_ok(port) && (below || (*itself && **host == **name))
            }
            _ => false,
        })
    }
}

impl FromStr for NoProxyEntry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no host, .suffix, IP address, CIDR block or *, where hosts and addresses may have a :port"
            )
        };
        if text == "*" {
            return Ok(Self::All);
        }
        if text == LOOPBACK {
            return Ok(Self::Loopback);
        }
        if text.contains('/') {
            return text.parse().map(|net: IpNet| Self::Net(net.trunc())).map_err(|_| wrong());
        }
        // An IPv6 address may stand without brackets where no port follows.
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(ip.to_canonical(), None));
        }
        let (rest, itself) = match text.strip_prefix("*.").or_else(|| text.strip_prefix('.')) {
            Some(rest) => (rest, false),
            None => (text, true),
        };
        let (host, port) = match rest.parse::<Address>() {
            Ok(address) => (address.host, Some(address.port)),
            Err(_) => (rest.parse::<Host>().map_err(|_| wrong())?, None),
        };
        match host {
            Host::Ip(ip) if itself => Ok(Self::Ip(ip.to_canonical(), port)),
            Host::Ip(_) => Err(wrong()),
            Host::Name(name) => Ok(Self::Name { name: name.into(), itself, port }),
        }
    }
}

impl fmt::Display for NoProxyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let with_port = |f: &mut fmt::Formatter<'_>, port: &Option<u16>| match port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        };
        match self {
            Self::All => f.write_str("*"),
            Self::Loopback => f.write_str(LOOPBACK),
            Self::Net(net) => net.fmt(f),
            Self::Ip(ip, port) => Host::Ip(*ip).fmt(f).and_then(|()| with_port(f, port)),
            Self::Name { name, itself, port } => {
                write!(f, "{}{name}", if *itself { "" } else { "." }).and_then(|()| with_port(f, port))
            }
        }
    }
}

/// Undoes percent-encoding; `None` if it is none, or hides what no user or password has.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            bytes.push(digit(digits[0])? << 4 | digit(digits[1])?);
            rest = after;
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok().filter(|text| !text.chars().any(char::is_control))
}

/// A user as it stands in a URL.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    text.bytes().fold(String::new(), |out, byte| {
        if plain(byte) {
            out + char::from(byte).encode_utf8(&mut [0; 4])
        } else {
            format!("{out}%{byte:02X}")
        }
    })
}

/// What `proxy.url` is to use no proxy, whatever the environment says.
const OFF: &str = "none";
/// What [`NoProxyEntry::Loopback`] is called.
const LOOPBACK: &str = "<loopback>";
const MASK: &str = "***";
/// The port of an `http://` proxy without one: what curl takes, and most proxies listen on something near.
const PORT: u16 = 1080;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_never_show_the_password() {
        for (text, shown) in [
            ("http://proxy.corp:3128", "http://proxy.corp:3128"),
            ("http://proxy.corp:3128/", "http://proxy.corp:3128"),
            ("proxy.corp:3128", "http://proxy.corp:3128"),
            ("https://proxy.corp", "https://proxy.corp:443"),
            ("http://proxy.corp", "http://proxy.corp:1080"),
            ("http://[fd00::1]:8080", "http://[fd00::1]:8080"),
            ("http://joe@p:1", "http://joe@p:1"),
            ("http://joe:secret@p:1", "http://joe:***@p:1"),
            ("http://DOM%5Cjoe:s%40c%3Aret@p:1", "http://DOM%5Cjoe:***@p:1"),
            ("http://joe:p@ss@p:1", "http://joe:***@p:1"),
        ] {
            let url: ProxyUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
        }
        for text in [
            "",
            "socks5://p:1",
            "http://",
            "http://p:0",
            "http://joe:***@p:1",
            "http://:x@p:1",
            "http://j%zz@p:1",
            "http://j%0d@p:1",
            "http://p:1/path",
            "http://jo%3Ae:x@p:1",
        ] {
            let error = text.parse::<ProxyUrl>().unwrap_err();
            assert!(!error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn exemptions_are_those_of_go_and_curl() {
        let exempts =
            |entry: &str, to: &str| NoProxy(vec![entry.parse().unwrap()]).exempts(&to.parse().unwrap());
        for (entry, to, expected) in [
            ("*", "gw.example.com:443", true),
            ("example.com", "example.com:443", true),
            ("example.com", "gw.example.com:443", true),
            ("example.com", "notexample.com:443", false),
            ("EXAMPLE.com", "GW.Example.COM:443", true),
            (".example.com", "gw.example.com:443", true),
            (".example.com", "a.b.example.com:443", true),
            (".example.com", "example.com:443", false),
            ("*.example.com", "gw.example.com:443", true),
            ("*.example.com", "example.com:443", false),
            ("example.com:8443", "gw.example.com:8443", true),
            ("example.com:8443", "gw.example.com:443", false),
            ("10.0.0.0/8", "10.1.2.3:443", true),
            ("10.1.2.3/8", "10.9.9.9:443", true),
            ("10.0.0.0/8", "11.1.2.3:443", false),
            ("10.0.0.0/8", "ten.example.com:443", false),
            ("10.0.0.0/8", "[::ffff:10.1.2.3]:443", true),
            ("10.1.2.3", "10.1.2.3:443", true),
            ("10.1.2.3:443", "10.1.2.3:443", true),
            ("10.1.2.3:443", "10.1.2.3:80", false),
            ("fd00::/8", "[fd00::1]:443", true),
            ("fd00::1", "[fd00::1]:443", true),
            ("[fd00::1]:443", "[fd00::1]:443", true),
            ("[fd00::1]:443", "[fd00::1]:80", false),
            ("localhost", "localhost:443", true),
            ("localhost", "127.0.0.1:443", false),
            ("<loopback>", "127.9.9.9:443", true),
            ("<loopback>", "localhost:443", true),
            ("<loopback>", "gw.example.com:443", false),
        ] {
            assert_eq!(exempts(entry, to), expected, "{entry} {to}");
            let again = entry.parse::<NoProxyEntry>().unwrap().to_string();
            assert_eq!(exempts(&again, to), expected, "{entry} as {again}, {to}");
        }
        for entry in ["", "a b", "10.0.0.0/99", ".10.0.0.1", "http://x", "x:0", "**"] {
            assert!(entry.parse::<NoProxyEntry>().is_err(), "{entry}");
        }
    }

    #[test]
    fn the_environment_counts_as_go_reads_it() {
        let read = |url, no_proxy| ProxyConfig::of_environment(url, "HTTPS_PROXY", no_proxy);
        let config = read("http://joe:secret@p:3128", "a.example, .b.example,10.0.0.0/8 ,!!,").unwrap();
        assert!(!format!("{config:?}").contains("secret"));
        assert_eq!(
            config.effective()["noProxy"].to_string(),
            r#"["<loopback>","a.example",".b.example","10.0.0.0/8"]"#
        );
        assert!(config.no_proxy.exempts(&"127.0.0.1:443".parse().unwrap()));
        assert!(!config.no_proxy.exempts(&"gw.example:443".parse().unwrap()));
        assert!(read("socks5://p:1", "").is_err(), "a proxy that cannot be used is no reason to go without");
    }
}
