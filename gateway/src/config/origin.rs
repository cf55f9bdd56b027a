//! The origin of a web page, as the configuration lists it.

use http::uri::Authority;
use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use thiserror::Error;

/// Who a page is of: `https://HOST` or `https://HOST:PORT`, or the same with `http`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub(crate) secure: bool,
    /// Lower case, an address of version 6 in brackets.
    host: String,
    port: u16,
}

/// Why a text is no [`Origin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("write https://HOST or https://HOST:PORT as browsers send it, without a path")]
pub struct OriginError;

impl FromStr for Origin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, OriginError> {
        let (secure, authority) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => return Err(OriginError),
        };
        Self::of(secure, authority).ok_or(OriginError)
    }
}

impl Origin {
    pub(crate) fn of(secure: bool, authority: &str) -> Option<Self> {
        if authority.contains('@') {
            return None;
        }
        let authority: Authority = authority.parse().ok()?;
        let host = authority.host().trim_end_matches('.').to_ascii_lowercase();
        let port = match authority.as_str().get(authority.host().len()..) {
            None | Some("") => Self::default_port(secure),
            Some(port) => port.strip_prefix(':')?.parse().ok()?,
        };
        let address = host.strip_prefix('[').map(|rest| rest.trim_end_matches(']').parse::<Ipv6Addr>());
        let is_host = !host.is_empty() && !host.contains('*') && !matches!(address, Some(Err(_)));
        is_host.then_some(Self { secure, host, port })
    }

    const fn default_port(secure: bool) -> u16 {
        if secure { 443 } else { 80 }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.host)?;
        if self.port == Self::default_port(self.secure) { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        for (text, printed) in [
            ("https://dash.example.com", "https://dash.example.com"),
            ("https://Dash.Example.com:443", "https://dash.example.com"),
            ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
            ("https://[::1]:8443", "https://[::1]:8443"),
            ("http://[2001:db8::1]", "http://[2001:db8::1]"),
        ] {
            assert_eq!(text.parse::<Origin>().unwrap().to_string(), printed, "{text}");
        }
        for wrong in [
            "",
            "null",
            "*",
            "https://",
            "https://*",
            "https://*.example.com",
            "dash.example.com",
            "https://a/",
            "https://a/b",
            "https://u@a",
            "https://a:b",
            "https://a:99999",
            "https://a:",
            "ftp://a",
            "https://a b",
            "https://a,https://b",
            "https://[x]",
        ] {
            assert_eq!(wrong.parse::<Origin>(), Err(OriginError), "{wrong}");
        }
    }
}
