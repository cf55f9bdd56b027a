//! The servers that the agent forwards to: the API server or an allowed target, with an address, a TLS configuration and a
//! name for errors.

pub(crate) mod ask;
pub(crate) mod pool;
pub(crate) mod reach;
pub(crate) mod resources;
pub(crate) mod socket;
pub(crate) mod targets;
pub(crate) mod token;
pub(crate) mod upstreams;

use crate::config::address::{Address, Host, Reach};
use crate::config::{AgentConfig, ApiServerConfig, TargetConfig};
use crate::dial::connect::{self, ConnectError, server_name};
use crate::random::random_fraction;
use crate::upstream::pool::Pool;
use crate::upstream::resources::Resources;
use crate::upstream::socket::{Io, Tcp};
use http::HeaderValue;
use rustls::ClientConfig;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;
use tokio::time::{Duration, Instant};
use towline_certs::load::{self, LoadError, Loaded};
use towline_certs::{ServerName, TlsError, UpstreamProtocol, tls};
use towline_proto::tunnel::socket as tcp;

/// Why an upstream cannot be set up.
#[derive(Debug, Error)]
pub enum UpstreamError {
    #[error("{hop}: {cause}")]
    Load { hop: String, cause: LoadError },
    #[error("{hop}: {cause}")]
    Tls { hop: String, cause: TlsError },
    #[error("{hop}: a certificate cannot be issued for the name {host}. Set serverName")]
    Name { hop: String, host: String },
}

/// One upstream.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// `agent -> API server https://10.0.0.1:6443`.
    pub(crate) hop: String,
    /// The `Host` of requests to it.
    pub(crate) authority: HeaderValue,
    pub(crate) pool: Pool,
    pub(crate) resources: Resources,
    address: Address,
    reach: Reach,
    tls: Option<Tls>,
}

struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    /// The name of the CA bundle in errors.
    bundle: String,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).field("bundle", &self.bundle).finish_non_exhaustive()
    }
}

impl Upstream {
    /// Creates the upstream for the API server. Blocks while it reads the CA file.
    pub(crate) fn api_server(config: &AgentConfig, resources: &Resources) -> Result<Self, UpstreamError> {
        let ApiServerConfig { url, ca, server_name } = &config.api_server;
        let hop = format!("agent -> API server {url}");
        let tls =
            url.tls.then(|| Tls::new(&hop, ca.as_deref(), server_name.as_ref().unwrap_or(&url.address.host)));
        // The owner may name any address as the API server: a control plane can be on this machine.
        Ok(Self::new(hop, url.address.clone(), Reach::Anywhere, tls.transpose()?, resources))
    }

    /// Creates the upstream for a target. Blocks while it reads the CA file.
    pub(crate) fn target(target: &TargetConfig, resources: &Resources) -> Result<Self, UpstreamError> {
        let hop = format!("agent -> target {} ({})", target.name, target.address);
        let tls = target.tls.as_ref().map(|tls| {
            Tls::new(&hop, tls.ca.as_deref(), tls.server_name.as_ref().unwrap_or(&target.address.host))
        });
        let reach = if target.allow_local { Reach::Anywhere } else { Reach::NotSpecial };
        Ok(Self::new(hop, target.address.clone(), reach, tls.transpose()?, resources))
    }

    #[expect(clippy::expect_used, reason = "its message says why it cannot fail")]
    fn new(hop: String, address: Address, reach: Reach, tls: Option<Tls>, resources: &Resources) -> Self {
        let default_port = if tls.is_some() { 443 } else { 80 };
        let authority =
            if address.port == default_port { address.host.to_string() } else { address.to_string() };
        let authority = HeaderValue::from_str(&authority)
            .expect("a host is letters, digits and a few signs that headers may hold");
        let resources = resources.clone();
        Self { hop, authority, pool: Pool::default(), resources, address, reach, tls }
    }

    /// Makes one connection. Dropping the future abandons it.
    pub(crate) async fn connect(&self) -> Result<Io, ConnectError> {
        let deadline = Instant::now() + self.resources.timeouts.upstream_connect;
        let result = self.connect_by(deadline).await;
        let outcome = result.as_ref().map_or_else(ConnectError::label, |_| "ok");
        self.resources.metrics.connects.with_label_values(&[outcome]).inc();
        result
    }

    /// As [`Self::connect`], for the agent's own requests, which are not counted as exchanges.
    pub(crate) async fn connect_aside(&self, within: Duration) -> Result<Io, ConnectError> {
        self.connect_by(Instant::now() + within).await
    }

    async fn connect_by(&self, deadline: Instant) -> Result<Io, ConnectError> {
        let stream = connect::connect(&self.address, self.reach, deadline).await?;
        if let Err(error) = tcp::tune(&stream) {
            tracing::debug!(hop = self.hop, %error, "a socket option was refused");
        }
        let tcp = Tcp::new(stream);
        let Some(tls) = &self.tls else { return Ok(Io::Plain(tcp)) };
        let stream =
            connect::handshake(tcp, Arc::clone(&tls.config), tls.name.clone(), &tls.bundle, deadline).await?;
        Ok(Io::Tls(Box::new(stream)))
    }

    /// How long a new connection may live: the configured age ± a tenth, so that those made at once do not end at once.
    pub(crate) fn age(&self) -> Duration {
        let age = self.resources.timeouts.upstream_age;
        age.mul_f64(0.9 + 0.2 * random_fraction())
    }
}

impl Tls {
    fn new(hop: &str, ca: Option<&Path>, host: &Host) -> Result<Self, UpstreamError> {
        let roots = match ca {
            Some(path) => load::load_bundle(path),
            None => load::system_roots().map(|value| Loaded { value, warnings: Vec::new() }),
        };
        let Loaded { value: roots, warnings } =
            roots.map_err(|cause| UpstreamError::Load { hop: hop.to_owned(), cause })?;
        for warning in warnings {
            tracing::warn!(hop, "{warning}");
        }
        let config = tls::upstream_client(&roots, None, UpstreamProtocol::Http1)
            .map_err(|cause| UpstreamError::Tls { hop: hop.to_owned(), cause })?;
        let name = server_name(host)
            .ok_or_else(|| UpstreamError::Name { hop: hop.to_owned(), host: host.to_string() })?;
        let bundle =
            ca.map_or_else(|| "the system's trust store".to_owned(), |path| path.display().to_string());
        Ok(Self { config, name, bundle })
    }
}
