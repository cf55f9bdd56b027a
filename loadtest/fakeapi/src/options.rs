//! Options of the fake API server: listen address, users, and limits.

use std::net::SocketAddr;
use std::time::Duration;

/// Default token of `admin`, a member of `system:masters`.
pub const ADMIN_TOKEN: &str = "fake-admin-token";
/// Default token of the agent's ServiceAccount, which may impersonate.
pub const AGENT_TOKEN: &str = "fake-agent-token";
/// Default token of `alice`, who is not allowed to impersonate.
pub const USER_TOKEN: &str = "fake-user-token";
const AGENT_USER: &str = "system:serviceaccount:towline:towline-agent";

/// Settings of a [`FakeApi`](crate::FakeApi); `default()` is a small healthy cluster on a free loopback port.
#[derive(Clone, Debug)]
pub struct FakeApiOptions {
    /// Address to listen on; port 0 picks a free port.
    pub listen: SocketAddr,
    /// Bearer tokens with their users.
    pub tokens: Vec<Token>,
    /// Users that may send `Impersonate-*`; members of `system:masters` always may.
    pub impersonators: Vec<String>,
    /// Users (after impersonation) that every resource request answers with 403.
    pub denied_users: Vec<String>,
    /// Whether ClusterRoles and their bindings authorize requests, impersonation included. Otherwise every authenticated caller
    /// may do everything.
    pub rbac: bool,
    /// Whether a request without a credential is `system:anonymous` (403 but for health and version) and not 401.
    pub anonymous: bool,
    /// A connection without a request is closed after this time; a real server uses 90 s.
    pub idle_timeout: Duration,
    /// SETTINGS_MAX_CONCURRENT_STREAMS of HTTP/2.
    pub streams_max: u32,
    /// Offer HTTP/2 by ALPN in addition to HTTP/1.1.
    pub http2: bool,
    /// Offer only TLS 1.2.
    pub tls12_only: bool,
    /// Show a certificate that expired an hour ago.
    pub expired: bool,
    /// How many requests the recorder keeps; 0 switches recording off (load tests).
    pub requests_kept: usize,
    /// How many plaintext bytes per connection and direction the recorder keeps; 0 keeps only the counts.
    pub bytes_kept: usize,
    /// How many changes a watch may lag behind before it gets 410 Gone.
    pub history_kept: usize,
    /// Time between two lines of `kubectl logs -f`.
    pub log_interval: Duration,
    /// Time between two BOOKMARK events of a watch that allows them.
    pub bookmark_interval: Duration,
}

impl Default for FakeApiOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            tokens: vec![
                Token::new(ADMIN_TOKEN, "admin", &["system:masters"]),
                Token::new(AGENT_TOKEN, AGENT_USER, &["system:serviceaccounts"]),
                Token::new(USER_TOKEN, "alice", &["dev"]),
            ],
            impersonators: vec![AGENT_USER.to_owned()],
            denied_users: Vec::new(),
            rbac: false,
            anonymous: false,
            idle_timeout: Duration::from_secs(90),
            streams_max: 100,
            http2: true,
            tls12_only: false,
            expired: false,
            requests_kept: 65_536,
            bytes_kept: 0,
            history_kept: 1024,
            log_interval: Duration::from_millis(100),
            bookmark_interval: Duration::from_secs(10),
        }
    }
}

/// One row of the token table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The bearer token.
    pub token: String,
    /// The user of the token.
    pub user: String,
    /// The groups of that user, without `system:authenticated`, which is added.
    pub groups: Vec<String>,
}

impl Token {
    /// A row of the token table.
    pub fn new(token: &str, user: &str, groups: &[&str]) -> Self {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        Self { token: token.to_owned(), user: user.to_owned(), groups }
    }
}
