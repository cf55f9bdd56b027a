//! What does `kubectl apply` get, so that an agent or a gateway runs in a cluster? Plain YAML, written for the person who reads it
//! before it is applied: what it may do stands at the top, and every choice beside it.
//!
//! Pure: a description in, a text out. The join token is in the agent's Secret and nowhere else.

mod agent;
mod agent_config;
mod agent_pods;
mod gateway;
mod pod;

pub use agent::{AgentManifest, Grant, IssuerKeys, NAMESPACE as AGENT_NAMESPACE};
pub use agent_config::{AgentProxy, Password, Transport};
pub use gateway::GatewayManifest;
pub use pod::{Label, PodOptions, Resources, Toleration};

use serde_json::Value;
use thiserror::Error;

/// Why there is no manifest.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ManifestError {
    #[error("{what} {text:?} is 1 to {most} of a-z, 0-9 and, between them, -")]
    Name { what: &'static str, text: String, most: usize },
    #[error(
        "the namespace {0:?} is everybody's, and the manifest makes one of its own, in which the strictest rules for pods hold: name another"
    )]
    Shared(String),
    #[error("the image {0:?} is not the name of one: REGISTRY/PATH:TAG, without spaces")]
    Image(String),
    #[error("{0} replicas: it has to be 1 to {most}", most = agent::REPLICAS_MAX)]
    Replicas(u32),
    #[error("{0:?} is not GROUP=CLUSTERROLE, the role as kubectl get clusterroles shows it")]
    Grant(String),
    #[error(
        "no caller is in the group {0:?}: groups that begin with system: are Kubernetes' own, and the gateway and the agent let nobody be in them. Name a group that the gateway gives"
    )]
    GrantToSystem(String),
    #[error(
        "a grant gives rights to those whom the agent impersonates, and in restricted mode it impersonates nobody: leave the grant away, or use --mode impersonate"
    )]
    GrantInVain,
    #[error(
        "{0} is no address of the gateway for an agent in a pod: there it is the pod itself. Give --gateway HOST:PORT (for a kind or k3d cluster on the gateway's machine the host is host.docker.internal), or set publicAddresses at the gateway. Nothing was registered and no token made"
    )]
    Loopback(String),
    #[error(
        "there are {0} addresses for QUIC and {1} of the gateway: each needs the one at which the same gateway is reached over UDP, in the same order"
    )]
    QuicAddresses(usize, usize),
    #[error("the proxy: {0}")]
    Proxy(&'static str),
    #[error("{0:?} is not KEY=VALUE as Kubernetes writes labels")]
    Label(String),
    #[error("the label {0} is the manifest's own: leave it away")]
    OwnLabel(String),
    #[error("the label {0} is given twice, and a key has one value")]
    TwiceLabel(String),
    #[error(
        "{0:?} is not KEY[=VALUE][:EFFECT] as kubectl taint writes it; the effect is NoSchedule, PreferNoSchedule or NoExecute, and * stands for every key"
    )]
    Toleration(String),
    #[error(
        "{0:?} is not a list such as requests.cpu=100m,requests.memory=128Mi,limits.memory=1Gi; there is limits.cpu, too"
    )]
    Resources(String),
    #[error(
        "limits.memory={given} is not enough: it has to be {least}Mi at least, half of which is what the streams may hold"
    )]
    Memory { given: String, least: u64 },
    #[error("requests.memory is more than limits.memory")]
    MoreThanLimit,
    #[error(
        "the keys of the cluster are not a JSON Web Key Set: {0}. Get them with: kubectl get --raw /openid/v1/jwks"
    )]
    Keys(String),
    #[error("the size {0:?} of the volume is not a quantity such as 1Gi")]
    Size(String),
}

/// A string of JSON is one of YAML, whatever is in it.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Name, namespace and labels of an object; `app` is the program that it belongs to.
fn metadata(name: &str, namespace: &str, app: &str, pod: &PodOptions) -> String {
    format!(
        "metadata:
  name: {name}
  namespace: {}
  labels:
    {NAME_LABEL}: {app}
{}",
        quoted(namespace),
        pod.label_lines(4)
    )
}

/// Which rules hold for the pods of a namespace.
const SECURITY_LABEL: &str = "pod-security.kubernetes.io/enforce";
/// By which the pods are found.
const NAME_LABEL: &str = "app.kubernetes.io/name";

fn quoted_list<T: ToString>(items: &[T]) -> String {
    let items: Vec<_> = items.iter().map(|item| quoted(&item.to_string())).collect();
    format!("[{}]", items.join(", "))
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

/// Moves every line but the first to the right.
fn indented(text: &str, spaces: usize) -> String {
    text.trim_end().replace('\n', &format!("\n{}", " ".repeat(spaces)))
}

/// The users that images without a user of their own take; any but root would do.
const USER: u32 = 65_532;

#[cfg(test)]
mod tests;
