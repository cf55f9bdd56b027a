//! The handle [`FakeApi`]: how a test starts, uses and stops a fake API server.

use crate::faults::Faults;
use crate::lock::lock;
use crate::options::{ADMIN_TOKEN, FakeApiOptions};
use crate::pods::host::PodHost;
use crate::recorder::Recorder;
use crate::seed;
use crate::serve;
use crate::shared::Shared;
use crate::store::Store;
use crate::tls::{Authority, ClientCertificate, TlsError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A running fake API server. Dropping it stops everything at once; [`FakeApi::shutdown`] also waits for it.
pub struct FakeApi {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// The fake API server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its certificates could not be made.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its port or its scratch directory could not be had.
    #[error("cannot listen or make a scratch directory: {0}")]
    Io(#[from] std::io::Error),
}

impl FakeApi {
    /// Binds, makes certificates, fills the store and accepts.
    pub async fn start(options: FakeApiOptions) -> Result<Self, StartError> {
        let authority = Authority::new()?;
        let acceptor = TlsAcceptor::from(Arc::new(authority.server_config(&options)?));
        let listener = TcpListener::bind(options.listen).await?;
        let address = listener.local_addr()?;
        let tasks = TaskTracker::new();
        let stop = CancellationToken::new();
        let pods = PodHost::start(&tasks, &stop).await?;
        let store = Store::new(options.history_kept);
        seed::fill(&store, authority.ca_pem());
        let shared = Arc::new(Shared {
            faults: Arc::new(Faults::new(options.idle_timeout)),
            recorder: Arc::new(Recorder::new(options.requests_kept)),
            authority,
            store,
            pods,
            tasks,
            stop,
            live: AtomicUsize::new(0),
            connections_total: AtomicU64::new(0),
            keys: Mutex::new(json!({"keys": []})),
            options,
        });
        shared.tasks.spawn(serve::accept(Arc::clone(&shared), listener, acceptor));
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// `https://127.0.0.1:PORT`.
    pub fn base_url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The CA that signed its certificate, PEM.
    pub fn ca_pem(&self) -> &str {
        self.shared.authority.ca_pem()
    }

    /// What it saw.
    pub fn recorder(&self) -> &Recorder {
        &self.shared.recorder
    }

    /// How many connections are open, upgraded ones too.
    pub fn connections(&self) -> usize {
        self.shared.live.load(Ordering::Relaxed)
    }

    /// How many connections there ever were.
    pub fn connections_total(&self) -> u64 {
        self.shared.connections_total.load(Ordering::Relaxed)
    }

    /// How many processes that `exec` started are still running.
    pub fn processes(&self) -> usize {
        self.shared.pods.processes()
    }

    /// A client certificate that this server accepts.
    pub fn issue_client(&self, user: &str, groups: &[&str]) -> Result<ClientCertificate, TlsError> {
        self.shared.authority.issue_client(user, groups)
    }

    /// A kubeconfig (JSON, which is YAML) for direct access as `admin`.
    pub fn kubeconfig(&self) -> String {
        kubeconfig(&self.base_url(), self.ca_pem(), ADMIN_TOKEN)
    }

    /// The public keys of ServiceAccount tokens, as `/openid/v1/jwks` shows them from now on.
    pub fn set_keys(&self, keys: Value) {
        *lock(&self.shared.keys) = keys;
    }

    /// Forgets the watch history: a watch from an older version gets 410 Gone.
    pub fn compact(&self) {
        self.shared.store.compact();
    }

    /// Stops at once and waits until every task has ended.
    pub async fn shutdown(self) {
        self.shared.stop.cancel();
        self.shared.faults.freeze(false);
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.faults.freeze(false);
    }
}

impl std::fmt::Debug for FakeApi {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("FakeApi").field("address", &self.address).finish_non_exhaustive()
    }
}

/// A kubeconfig with one context.
pub fn kubeconfig(server: &str, ca_pem: &str, token: &str) -> String {
    let cluster = json!({"server": server, "certificate-authority-data": STANDARD.encode(ca_pem)});
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": cluster}],
        "users": [{"name": "fake", "user": {"token": token}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": "default"}}],
    })
    .to_string()
}
