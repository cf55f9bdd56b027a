//! Chooses the HTTP proxy as kubectl does: `proxy-url` of the kubeconfig's cluster, or else the environment's proxy unless `NO_PROXY`
//! exempts the gateway. An `https://` proxy is verified against the gateway's CA, as Go does.

use super::failure::{Failure, Outcome};
use rustls::ClientConfig;
use std::fmt;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;
use towline_certs::explain::explain_naming;
use towline_certs::{ServerName, tls_error};
use towline_proto::dial::address::{Address, Host};
use towline_proto::dial::proxy::{self, Asker, Leg, ProxyUrl, Source};

/// A connection to the gateway itself, or to a proxy that passes bytes on.
pub(crate) type Road = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// A proxy on the way to the gateway.
#[derive(Clone, Debug)]
pub(crate) struct Proxy {
    url: ProxyUrl,
    source: Source,
}

/// As errors call it.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy {} (set by {})", self.url, self.source)
    }
}

impl Proxy {
    /// The one for `to`, if any is said. What cannot be read is an error: without a proxy would be another way than the one meant.
    pub(crate) fn find(kubeconfig: Option<&str>, to: &Address) -> Outcome<Option<Self>> {
        let (source, text) = match kubeconfig {
            Some(text) => (Source::Kubeconfig, text.to_owned()),
            None => match Source::environment() {
                Some((source, text, exempt)) if !exempt.exempts(to) => (source, text),
                _ => return Ok(None),
            },
        };
        let url =
            ProxyUrl::as_go_reads(&text).map_err(|error| Failure::usage(format!("{source} {error}")))?;
        Ok(Some(Self { url, source }))
    }

    pub(crate) const fn speaks_tls(&self) -> bool {
        self.url.tls
    }

    /// Makes a connection to `to` through it. `tls` is for an `https://` one, `bundle` names what it is checked against. The error is
    /// about "the proxy".
    pub(crate) async fn connect(
        &self,
        to: &Address,
        tls: Option<&Arc<ClientConfig>>,
        bundle: &str,
    ) -> Result<Leg<Road>, String> {
        let at = &self.url.address;
        let socket = dial(at).await.map_err(|error| format!("cannot reach the proxy: {error}"))?;
        let road = match tls {
            None => Either::Left(socket),
            Some(tls) => {
                let name = match &at.host {
                    Host::Ip(ip) => ServerName::from(*ip),
                    Host::Name(name) => ServerName::try_from(name.to_string())
                        .map_err(|_| format!("the proxy: {name} is not a valid server name"))?,
                };
                let stream = TlsConnector::from(Arc::clone(tls)).connect(name, socket).await;
                Either::Right(Box::new(stream.map_err(|error| {
                    let why = tls_error(&error)
                        .map_or_else(|| error.to_string(), |error| explain_naming(error, bundle));
                    format!("the proxy: {why}")
                })?))
            }
        };
        let authorization = self.url.authorization(None);
        let asker = Asker {
            authorization: authorization.as_deref().map(String::as_str),
            source: self.source,
            software: concat!("towline/", env!("CARGO_PKG_VERSION")),
        };
        proxy::connect(road, to, asker).await.map_err(|error| format!("the proxy: {error}"))
    }
}

/// A TCP connection.
pub(crate) async fn dial(at: &Address) -> std::io::Result<TcpStream> {
    let socket = match &at.host {
        Host::Ip(ip) => TcpStream::connect((*ip, at.port)).await?,
        Host::Name(name) => TcpStream::connect((&**name, at.port)).await?,
    };
    socket.set_nodelay(true)?;
    Ok(socket)
}
