//! The URL of a proxy: `http://USER:PASSWORD@HOST:PORT`. Its password is never shown.

use crate::dial::address::Address;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

const MASK: &str = "***";
/// The port of an `http://` proxy without one, as Go reads it and so kubectl.
const PORT: u16 = 80;

/// `http://` or `https://`, a user and a password where there are any, host and port.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    pub tls: bool,
    pub user: Option<String>,
    password: Option<Zeroizing<String>>,
    pub address: Address,
}

impl ProxyUrl {
    /// Whether the URL itself holds a password.
    #[must_use]
    pub const fn has_password(&self) -> bool {
        self.password.is_some()
    }

    /// Parses a proxy as kubectl and other Go programs do: text after host and port is ignored.
    ///
    /// # Errors
    /// It is not the URL of a proxy. The error never quotes the text, which may contain a password.
    pub fn as_go_reads(text: &str) -> Result<Self, &'static str> {
        let scheme = text.find("://").map_or(0, |at| at + 3);
        let host = text[scheme..].rfind('@').map_or(scheme, |at| scheme + at + 1);
        let end = text[host..].find(['/', '?', '#']).map_or(text.len(), |at| host + at);
        text[..end].parse()
    }

    /// The value of `Proxy-Authorization` for the user, with this password or else the URL's own. None without a user.
    #[must_use]
    pub fn authorization(&self, password: Option<&str>) -> Option<Zeroizing<String>> {
        let user = self.user.as_ref()?;
        let password = password.or_else(|| self.password.as_deref().map(String::as_str)).unwrap_or_default();
        let pair = Zeroizing::new(format!("{user}:{password}"));
        Some(Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes()))))
    }
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

    /// The error never quotes the text, which may contain a password.
    fn from_str(text: &str) -> Result<Self, &'static str> {
        const FORM: &str = "is not http://HOST:PORT or http://USER@HOST:PORT (or https://)";
        let (tls, rest) = match text.split_once("://") {
            Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
                "http" => (false, rest),
                "https" => (true, rest),
                _ => return Err("names a kind of proxy that is not supported: use http:// or https://"),
            },
            // As curl reads it.
            None => (false, text),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, host) =
            rest.rsplit_once('@').map_or((None, rest), |(credentials, host)| (Some(credentials), host));
        let (user, password) = match credentials
            .map(|text| text.split_once(':').map_or((text, None), |(u, p)| (u, Some(p))))
        {
            None => (None, None),
            Some((user, password)) => {
                const ODD: &str = "has a user or password that is not percent-encoded text";
                let user = decoded(user).ok_or(ODD)?;
                let password = password.map(|text| decoded(text).ok_or(ODD)).transpose()?;
                if user.is_empty() || user.contains(':') {
                    return Err(
                        "has credentials without a user, or a user with a colon, which Basic authentication does not allow",
                    );
                }
                if password.as_deref() == Some(MASK) {
                    return Err(
                        "contains the mask that a printed configuration shows instead of the password",
                    );
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

/// Undoes percent-encoding; `None` if it is none, or hides what no user or password has.
#[expect(clippy::indexing_slicing, reason = "two are split off")]
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

/// A user as written in a URL.
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
            ("http://proxy.corp", "http://proxy.corp:80"),
            ("http://[fd00::1]:8080", "http://[fd00::1]:8080"),
            ("http://joe@p:1", "http://joe@p:1"),
            ("http://joe:secret@p:1", "http://joe:***@p:1"),
            ("http://DOM%5Cjoe:s%40c%3Aret@p:1", "http://DOM%5Cjoe:***@p:1"),
            ("http://joe:p@ss@p:1", "http://joe:***@p:1"),
            ("HTTP://proxy:3128", "http://proxy:3128"),
            ("Https://proxy", "https://proxy:443"),
        ] {
            let url: ProxyUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
            assert_eq!(ProxyUrl::as_go_reads(text).as_ref(), Ok(&url));
        }
        for (text, shown) in [
            ("http://proxy:3128/path?x#y", "http://proxy:3128"),
            ("proxy:3128/path", "http://proxy:3128"),
            ("http://joe:a/b@p:1/path", "http://joe:***@p:1"),
            ("https://[fd00::1]?x", "https://[fd00::1]:443"),
        ] {
            assert_eq!(ProxyUrl::as_go_reads(text).unwrap().to_string(), shown);
        }
        assert!(ProxyUrl::as_go_reads("http:///path").is_err() && ProxyUrl::as_go_reads("/").is_err());
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
}
