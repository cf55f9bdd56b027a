//! The manifests of agent and gateway: plain YAML for `kubectl apply`, written for the person who reviews it. The first lines say what
//! the program may do, and every choice has a comment.
//!
//! The functions are pure: a description in, a text out. The YAML is in `manifest/templates`. The join token is only in the agent's Secret.

mod agent;
mod gateway;
mod pod;
mod template;

pub use agent::{
    AgentManifest, AgentProxy, Grant, IssuerKeys, NAMESPACE as AGENT_NAMESPACE, Password, Transport,
};
pub use gateway::GatewayManifest;
pub use pod::{Label, PodOptions, Resources, Toleration};

use thiserror::Error;

/// Which rules hold for the pods of a namespace.
const SECURITY_LABEL: &str = "pod-security.kubernetes.io/enforce";
/// By which the pods are found.
const NAME_LABEL: &str = "app.kubernetes.io/name";

/// Why there is no manifest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ManifestError {
    #[error("{what} {text:?} is invalid: use 1 to {most} characters, a-z, 0-9 and inner hyphens")]
    Name { what: &'static str, text: String, most: usize },
    #[error(
        "the namespace {0:?} is shared, but the manifest creates its own namespace with the restricted pod security standard; choose another name"
    )]
    Shared(String),
    #[error("{0:?} is not an image reference: write REGISTRY/PATH:TAG, without spaces")]
    Image(String),
    #[error("{0} replicas are out of range: use 1 to {most}", most = agent::REPLICAS_MAX)]
    Replicas(u32),
    #[error("{0:?} is not GROUP=CLUSTERROLE; kubectl get clusterroles lists the roles")]
    Grant(String),
    #[error(
        "no caller can be in the group {0:?}: groups that begin with system: are reserved for Kubernetes, and the gateway and the agent refuse them. Name a group of the gateway's callers"
    )]
    GrantToSystem(String),
    #[error(
        "--grant works in impersonate mode only: in restricted mode the agent impersonates nobody. Omit --grant, or use --mode impersonate"
    )]
    GrantInVain,
    #[error(
        "an agent in a pod cannot reach the gateway at {0}, which is the pod itself there. Set --gateway HOST:PORT (for a kind or k3d cluster on the gateway's machine the host is host.docker.internal), or set publicAddresses in the gateway's configuration. Nothing was registered and no token was created"
    )]
    Loopback(String),
    #[error(
        "{0} QUIC addresses do not match {1} gateway addresses: give one QUIC address for each --gateway, in the same order"
    )]
    QuicAddresses(usize, usize),
    #[error("the proxy: {0}")]
    Proxy(&'static str),
    #[error("{0:?} is not a Kubernetes label KEY=VALUE")]
    Label(String),
    #[error("the label {0} is reserved for the manifest itself; omit it")]
    OwnLabel(String),
    #[error("the label {0} is given twice; give each key once")]
    TwiceLabel(String),
    #[error(
        "{0:?} is not a taint KEY[=VALUE][:EFFECT]; EFFECT is NoSchedule, PreferNoSchedule or NoExecute, and * matches every key"
    )]
    Toleration(String),
    #[error(
        "{0:?} is not a list of resources, for example requests.cpu=100m,limits.cpu=1,requests.memory=128Mi,limits.memory=1Gi"
    )]
    Resources(String),
    #[error(
        "limits.memory={given} is too small: use at least {least}Mi, half of which is reserved for the streams' buffers"
    )]
    Memory { given: String, least: u64 },
    #[error("requests.memory is larger than limits.memory")]
    MoreThanLimit,
    #[error(
        "the file of --issuer-keys is not a JSON Web Key Set: {0}. Get it with: kubectl get --raw /openid/v1/jwks"
    )]
    Keys(String),
    #[error("the volume size {0:?} is not a quantity such as 1Gi")]
    Size(String),
}

/// Whether a text is a DNS label of at most `most` characters, as Kubernetes wants names to be.
fn check_name(what: &'static str, text: &str, most: usize) -> Result<(), ManifestError> {
    let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let edges = bytes.first().is_some_and(plain) && bytes.last().is_some_and(plain);
    let fits = edges && bytes.len() <= most && bytes.iter().all(|byte| plain(byte) || *byte == b'-');
    if fits { Ok(()) } else { Err(ManifestError::Name { what, text: text.to_owned(), most }) }
}

/// Whether a namespace can be the manifest's own.
fn check_namespace(namespace: &str) -> Result<(), ManifestError> {
    check_name("the namespace", namespace, 63)?;
    let shared = namespace == "default" || namespace.starts_with("kube-");
    if shared { Err(ManifestError::Shared(namespace.to_owned())) } else { Ok(()) }
}

fn check_image(image: &str) -> Result<(), ManifestError> {
    let fits = !image.is_empty() && image.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(()) } else { Err(ManifestError::Image(image.to_owned())) }
}

#[cfg(test)]
mod tests;
