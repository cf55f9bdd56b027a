//! The gateway's manifest: one pod with a volume for its records, and a Service in front of it.

use super::pod::{Defaults, PodOptions};
use super::{ManifestError, check_image, check_namespace, template};
use minijinja::{Value, context};
use std::collections::BTreeSet;
use towline_certs::TrustDomain;
use towline_model::{ADMINS, PublicAddress};

const DEFAULTS: Defaults =
    Defaults { cpu: "250m", memory: "256Mi", memory_limit: 2048, own_memory: 1280, memory_least: 512 };
/// The default namespace.
const NAMESPACE: &str = "towline-gateway";

/// A gateway, described.
#[derive(Clone, Debug)]
pub struct GatewayManifest {
    pub namespace: String,
    pub image: String,
    /// Under which addresses agents and clients reach the Service.
    pub addresses: Vec<PublicAddress>,
    pub trust_domain: TrustDomain,
    /// Size of the volume.
    pub storage: String,
    /// With a NetworkPolicy.
    pub network_policy: bool,
    pub pod: PodOptions,
}

impl GatewayManifest {
    /// A gateway at these addresses, in the namespace `towline-gateway`.
    #[must_use]
    pub fn new(addresses: Vec<PublicAddress>, trust_domain: TrustDomain) -> Self {
        Self {
            namespace: NAMESPACE.to_owned(),
            image: format!("towline-gateway:{}", env!("CARGO_PKG_VERSION")),
            addresses,
            trust_domain,
            storage: "1Gi".to_owned(),
            network_policy: false,
            pod: PodOptions::default(),
        }
    }

    /// The YAML.
    ///
    /// # Errors
    /// A part is invalid.
    pub fn render(&self) -> Result<String, ManifestError> {
        check_namespace(&self.namespace)?;
        check_image(&self.image)?;
        self.pod.check(&DEFAULTS)?;
        let digits = self.storage.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
            return Err(ManifestError::Size(self.storage.clone()));
        }
        let Self { namespace, image, addresses, trust_domain, storage, network_policy, pod } = self;
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let config = template::render(
            "gateway-config.yaml",
            context! { addresses, admins => [ADMINS], trust_domain => trust_domain.as_str(), memory => self.memory() },
        );
        let ports = self.ports();
        let own = context! { namespace, image, storage, network_policy, ports, config };
        Ok(template::render("gateway.yaml", context! { ..own, ..pod.values(&DEFAULTS) }))
    }

    /// How the configuration shares half of a given memory limit, in MiB.
    fn memory(&self) -> Option<Value> {
        let own = self.pod.own_memory()?;
        // A quarter of it for what clients upload; of each a quarter for one cluster and one principal, as the defaults are.
        let (uploads, tunnel) = (own / 4, own - own / 4);
        Some(context! {
            tunnel,
            tunnel_per_cluster => tunnel / 4,
            uploads,
            uploads_per_principal => uploads / 4,
        })
    }

    /// The Service's ports, those of the addresses, by which agents and clients come; each has its own names.
    fn ports(&self) -> Vec<Value> {
        let ports: BTreeSet<u16> = self.addresses.iter().map(|address| address.port).collect();
        let several = ports.len() > 1;
        let name = |what: &str, port: u16| if several { format!("{what}-{port}") } else { what.to_owned() };
        let port = |number| context! { number, tls => name("tls", number), quic => name("quic", number) };
        ports.into_iter().map(port).collect()
    }
}
