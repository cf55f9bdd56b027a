//! The gateway's configuration: one YAML file. Unknown keys are errors, and every mistake is reported at once with its place.
//!
//! Precedence: a flag, then its `TOWLINE_` variable, then the file, then the default here. Each section is described once, with
//! [`towline_settings::section!`]: its reader, what `--check` prints and the JSON schema come from that.

mod check;
mod origin;
mod sections;
pub mod tokens;

pub use origin::{Origin, OriginError};
pub use sections::{
    Admin, ClusterRoute, Drain, EndsWithCredential, FrontTls, Join, Limits, Listen, Plaintext, ProxyProtocol,
    Quic, Timeouts, Tls, TunnelTls,
};
pub use towline_settings::{ByteSize, Problems};
pub(crate) use towline_settings::{Findings, read_text};

use sections::{AccessEntry, EndsWithCredentialWords};
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use towline_certs::{HostName, TrustDomain};
use towline_model::{AccessRule, PublicAddress};
use towline_settings::{Configuration, Each, Places, Text, section};

/// Most requests of one session. It has 2^31 stream ids to give; what is left serves while it is being replaced.
pub(crate) const SESSION_STREAMS_MAX: u32 = (1 << 31) - (1 << 20);

/// Most objects of a kind on record, unless the configuration says fewer (`limits.objects`).
pub(crate) const OBJECTS_MAX: usize = 20_000;

section! {
    /// The whole configuration of a gateway.
    #[derive(Clone, Debug)]
    #[section(check)]
    pub struct GatewayConfig {
        pub listen: Listen;
        pub admin: Admin;
        /// Where the gateway keeps what it remembers: registered clusters, tokens, its own CAs. Without it there is only what
        /// the file says.
        pub state_directory: Option<PathBuf>;
        /// Under which addresses agents and clients reach the gateway: in its own certificates, join tokens, kubeconfigs.
        pub public_addresses: Vec<PublicAddress> as Each<Text>;
        pub tls: Tls;
        /// The one trust domain whose agents count.
        pub trust_domain: TrustDomain as Text;
        /// Requests for `NAME.<hostDomain>` go to cluster NAME. Without it only paths route.
        pub host_domain: Option<String>;
        /// Origins of web pages that may change something in clusters and open raw connections to them.
        pub allowed_origins: Vec<Origin> as Each<Text>;
        /// The clusters that may connect: the allow-list of admission.
        pub clusters: Vec<ClusterRoute>;
        /// Bearer tokens, stored as hashes, in a file of its own.
        pub token_file: Option<PathBuf>;
        /// Who may call which cluster. Nobody, unless a rule allows it.
        pub access: Vec<AccessRule> as Each<AccessEntry>;
        /// What ends when the credential expires that it was let in by.
        pub ends_with_credential: EndsWithCredential as EndsWithCredentialWords = EndsWithCredential::Interactive;
        pub join: Join;
        pub limits: Limits;
        pub drain: Drain;
        pub timeouts: Timeouts;
        /// Threads that carry connections; one per core if not said.
        pub threads: Option<NonZeroUsize>;
        @ /// Where the keys are in the file.
        pub(crate) places: Places;
    }
}

impl Configuration for GatewayConfig {
    const KIND: &'static str = "GatewayConfiguration";
    const PROGRAM: &'static str = "towline-gateway";
}

impl GatewayConfig {
    /// A configuration with this identity and these files, and every other value at its default.
    #[must_use]
    pub fn new(trust_domain: TrustDomain, tls: Tls) -> Self {
        Self {
            listen: Listen::default(),
            admin: Admin::default(),
            state_directory: None,
            public_addresses: Vec::new(),
            tls,
            trust_domain,
            host_domain: None,
            allowed_origins: Vec::new(),
            clusters: Vec::new(),
            token_file: None,
            access: Vec::new(),
            ends_with_credential: EndsWithCredential::default(),
            join: Join::default(),
            limits: Limits::default(),
            drain: Drain::default(),
            timeouts: Timeouts::default(),
            threads: None,
            places: Places::default(),
        }
    }

    /// Reads and checks a file. Relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        Self::parse(&read_text(path).map_err(Problems::one)?, path)
    }

    /// Reads and checks the text of a file; `file` names it in errors.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn parse(text: &str, file: impl AsRef<Path>) -> Result<Self, Problems> {
        let (config, places) = towline_settings::read::<Self>(text, file)?;
        Ok(Self { places, ..config })
    }

    /// Checks ranges of values, and relations between them.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn validate(&self) -> Result<(), Problems> {
        let findings = self.findings();
        towline_settings::check(self, &findings);
        findings.finish().map(drop)
    }

    /// To note what else is wrong with it.
    pub(crate) fn findings(&self) -> Findings {
        Findings::new(self.places.clone())
    }

    /// The configuration in effect as YAML. It holds paths of secrets, never secrets.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        towline_settings::to_yaml(self)
    }

    /// The JSON schema of the file.
    #[must_use]
    pub fn schema() -> serde_json::Value {
        towline_settings::schema::<Self>()
    }

    /// The names of the gateway: those of its public addresses, this machine's own, and every cluster's
    /// host.
    pub(crate) fn server_names(&self) -> Vec<HostName> {
        let mut names: Vec<HostName> =
            self.public_addresses.iter().map(|PublicAddress { host, .. }| host.clone()).collect();
        names.push(HostName::Dns("localhost".to_owned()));
        names.extend(
            ["127.0.0.1", "::1"].iter().filter_map(|text| text.parse::<IpAddr>().ok().map(HostName::Ip)),
        );
        let listen = self.listen.address.ip();
        if !listen.is_unspecified() {
            names.push(HostName::Ip(listen));
        }
        names.extend(self.host_domain.iter().filter_map(|domain| format!("*.{domain}").parse().ok()));
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }

    /// Every file that it names and whose content matters, for the watch on changes.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        if let Some(FrontTls { certificate, key, client_ca }) = &self.tls.front {
            files.extend([certificate.clone(), key.clone()]);
            files.extend(client_ca.clone());
        }
        if let Some(TunnelTls { certificate, key, agent_ca }) = &self.tls.tunnel {
            files.extend([certificate.clone(), key.clone(), agent_ca.clone()]);
        }
        files.extend(self.token_file.clone());
        files
    }
}
