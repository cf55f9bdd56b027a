//! `towline agent` and `towline gateway`: print the manifests that a cluster's owner applies. These commands apply nothing.

use super::client::{API_VERSION, Client};
use super::connection::ConnectionArguments;
use super::failure::{Failure, Outcome};
use super::manifest::{
    AgentManifest, AgentProxy, GatewayManifest, Grant, IssuerKeys, Label, ManifestError, Password,
    PodOptions, Resources, Toleration, Transport,
};
use super::output;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use towline_certs::{JoinAddress, JoinToken, TrustDomain};
use towline_model::{ClusterName, Mode, PublicAddress};
use towline_proto::dial::proxy::ProxyUrl;

const AGENT: &str = "Examples:
  towline agent manifest prod | kubectl --context prod-admin apply -f -
  towline agent manifest prod --register --mode impersonate --grant towline:admins=view > agent.yaml
  towline agent manifest prod --replicas 2 --image registry.example.com/towline-agent:1.0
  towline agent manifest prod --no-secret > agent.yaml                     safe to commit
  towline agent manifest prod --proxy-url http://joe@proxy:3128 --proxy-password-file password
  towline agent manifest prod --mode restricted --join-token-file token    contacts no gateway
";

/// Largest token or key set.
const FILE_MAX: u64 = 64 << 10;

const OWN: &str = "Examples:
  towline gateway manifest gateway.example.com:8443 | kubectl apply -f -
";

/// Print the manifest of a cluster's agent.
#[derive(Debug, Subcommand)]
#[command(before_help = AGENT)]
pub(crate) enum AgentCommand {
    /// Print the manifest of an agent, including a new join token: YAML for kubectl apply.
    Manifest(Manifest),
}

/// Print the manifest of a gateway.
#[derive(Debug, Subcommand)]
#[command(before_help = OWN)]
pub(crate) enum GatewayCommand {
    /// Print the manifest of a gateway that runs in a cluster: YAML for kubectl apply.
    Manifest(OwnManifest),
}

impl AgentCommand {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        match self {
            Self::Manifest(manifest) => manifest.run(connection).await,
        }
    }
}

impl GatewayCommand {
    pub(crate) fn run(&self) -> Outcome {
        match self {
            Self::Manifest(manifest) => manifest.run(),
        }
    }
}

#[derive(Debug, Args)]
#[command(before_help = AGENT)]
pub(crate) struct Manifest {
    /// Name of the cluster at the gateway.
    #[arg(value_parser = super::show::cluster_name)]
    cluster: String,
    /// Register the cluster first if it is not registered.
    #[arg(long, conflicts_with = "join_token_file")]
    register: bool,
    /// restricted: callers send their own credential for the cluster; the agent has no permissions. impersonate: the agent
    /// impersonates the callers. Default: the registered mode of the cluster.
    #[arg(long, value_enum)]
    mode: Option<ModeWord>,
    /// In impersonate mode: bind a group of callers to a ClusterRole of the cluster; repeatable.
    #[arg(long, value_name = "GROUP=CLUSTERROLE")]
    grant: Vec<Grant>,
    /// Namespace that the manifest creates.
    #[arg(long, default_value = super::manifest::AGENT_NAMESPACE)]
    namespace: String,
    /// Number of agents; with 2 the cluster stays connected while a node is drained.
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    /// File with an existing join token (- for stdin), instead of creating one. No gateway is contacted, so --mode is required.
    #[arg(long, value_name = "FILE", requires = "mode")]
    join_token_file: Option<PathBuf>,
    /// Print no Secret and create no join token, for a manifest in a repository. The output says how to create the Secrets by hand.
    #[arg(long)]
    no_secret: bool,
    /// In restricted mode: file with the cluster's public keys (kubectl get --raw /openid/v1/jwks), instead of making them readable by everybody.
    #[arg(long, value_name = "FILE")]
    issuer_keys: Option<PathBuf>,
    /// Add a NetworkPolicy: no ingress; egress only to DNS, the gateway, the proxy and the API server.
    #[arg(long)]
    network_policy: bool,
    #[command(flatten)]
    way: Way,
    #[command(flatten)]
    pod: PodFlags,
}

/// How the agent reaches the gateway.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection to the gateway")]
struct Way {
    /// Address of the gateway as seen from this cluster; repeatable. Default: the gateway's publicAddresses.
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    gateway: Vec<JoinAddress>,
    /// Address of the same gateway over UDP, if it differs: one for each --gateway, in the same order.
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    quic_address: Vec<JoinAddress>,
    /// Transport of the tunnel: QUIC, TCP, or whichever works.
    #[arg(long, value_enum, default_value_t)]
    transport: TransportWord,
    /// HTTP proxy between agent and gateway: http://HOST:PORT or http://USER@HOST:PORT (or https://).
    #[arg(long, value_name = "URL")]
    proxy_url: Option<String>,
    /// File with the password of the proxy's user, on one line.
    #[arg(long, value_name = "FILE", requires = "proxy_url")]
    proxy_password_file: Option<PathBuf>,
    /// File with the CA of an https:// proxy, if it is not a public CA.
    #[arg(long, value_name = "FILE", requires = "proxy_url")]
    proxy_ca: Option<PathBuf>,
}

impl Way {
    /// The proxy. It is not parsed by clap, because clap's errors quote the value, which may contain a password.
    fn proxy_url(&self) -> Outcome<Option<ProxyUrl>> {
        let url = self.proxy_url.as_deref().map(str::parse).transpose();
        url.map_err(|error| Failure::usage(format!("--proxy-url {error}")))
    }
}

/// Pod options.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pod")]
struct PodFlags {
    /// Image reference that the cluster's nodes can pull.
    #[arg(long)]
    image: Option<String>,
    /// Pull secret in the namespace; repeatable, like the options below.
    #[arg(long, value_name = "NAME")]
    image_pull_secret: Vec<String>,
    /// Node selector: run only on nodes with this label.
    #[arg(long, value_name = "KEY=VALUE")]
    node_selector: Vec<Label>,
    /// Toleration: also run on nodes with this taint; * is every taint.
    #[arg(long, value_name = "KEY[=VALUE][:EFFECT]")]
    toleration: Vec<Toleration>,
    /// Label for the namespace, its objects and the pods.
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<Label>,
    /// PriorityClass of the pods.
    #[arg(long, value_name = "NAME")]
    priority_class: Option<String>,
    /// Resources, for example requests.cpu=100m,requests.memory=128Mi,limits.memory=1Gi.
    #[arg(long, value_name = "LIST")]
    resources: Option<Resources>,
    /// Let the platform choose user and groups (OpenShift), instead of 65532.
    #[arg(long)]
    platform_uid: bool,
}

impl PodFlags {
    fn options(&self) -> PodOptions {
        PodOptions {
            pull_secrets: self.image_pull_secret.clone(),
            node_selector: self.node_selector.clone(),
            tolerations: self.toleration.clone(),
            priority_class: self.priority_class.clone(),
            labels: self.label.clone(),
            resources: self.resources.clone().unwrap_or_default(),
            platform_uid: self.platform_uid,
        }
    }
}

fn address(text: &str) -> Result<JoinAddress, &'static str> {
    text.parse().map_err(|()| "is not HOST:PORT; write an IPv6 address in brackets")
}

/// As [`Transport`], on the command line.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum TransportWord {
    #[default]
    Auto,
    Quic,
    Tcp,
}

impl From<TransportWord> for Transport {
    fn from(word: TransportWord) -> Self {
        match word {
            TransportWord::Auto => Self::Auto,
            TransportWord::Quic => Self::Quic,
            TransportWord::Tcp => Self::Tcp,
        }
    }
}

/// As [`Mode`], on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeWord {
    Restricted,
    Impersonate,
}

impl From<ModeWord> for Mode {
    fn from(word: ModeWord) -> Self {
        match word {
            ModeWord::Restricted => Self::Restricted,
            ModeWord::Impersonate => Self::Impersonate,
        }
    }
}

impl From<ManifestError> for Failure {
    fn from(error: ManifestError) -> Self {
        Self::usage(error.to_string())
    }
}

/// Objects created at the gateway, to be removed if the manifest cannot be printed.
type Made = Vec<(&'static str, Value)>;

impl Manifest {
    async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let cluster = ClusterName::new(&self.cluster).map_err(|error| Failure::usage(error.to_string()))?;
        // Before any request.
        self.way.proxy_url()?;
        let Some(file) = &self.join_token_file else {
            let client = Client::new(connection)?;
            let mut made = Made::new();
            let outcome = self.of_gateway(&client, &cluster, &mut made).await;
            if outcome.is_err() {
                take_back(&client, made).await;
            }
            return outcome;
        };
        let mode = self.mode.map_or(Mode::Restricted, Mode::from);
        let line = read(file)?;
        let token: JoinToken = line
            .parse()
            .map_err(|error| Failure::usage(format!("the join token in {} {error}", file.display())))?;
        if token.cluster != cluster.as_str() {
            return Err(Failure::usage(format!(
                "the join token in {} is for cluster {}, not for {cluster}. Create one for this cluster: {} token create {cluster}",
                file.display(),
                token.cluster,
                super::connection::name()
            )));
        }
        self.print(&self.manifest(cluster, mode, Some(&token))?, &token)
    }

    /// Builds the manifest with the gateway's data about the cluster. Everything is checked first: in dry runs the gateway returns what it
    /// would put into a join token.
    async fn of_gateway(&self, client: &Client, cluster: &ClusterName, made: &mut Made) -> Outcome {
        let found = self.look(client).await?;
        let mode = match &found {
            Some(found) => self.mode_of(found)?,
            None => self.mode.map_or(Mode::Restricted, Mode::from),
        };
        if found.is_none() {
            let asked = json!({"apiVersion": API_VERSION, "kind": "Cluster",
                "metadata": {"name": self.cluster}, "spec": {"mode": mode}});
            let would = client.would_create("clusters", &asked).await?;
            let mut manifest = self.manifest(cluster.clone(), mode, None)?;
            if manifest.addresses.is_empty() {
                let told = would["status"]["addresses"].as_array().into_iter().flatten();
                manifest.addresses = told.filter_map(|address| address.as_str()?.parse().ok()).collect();
            }
            manifest.check()?;
            let registered = client.create("clusters", &asked).await?;
            output::note(&format!("cluster {} registered, mode {}", self.cluster, shown(&registered)));
            made.push(("clusters", registered));
        }
        let would = parsed(&client.would_create("jointokens", &self.token()).await?)?;
        let manifest = self.manifest(cluster.clone(), mode, Some(&would))?;
        manifest.check()?;
        if self.no_secret {
            return self.print(&manifest, &would);
        }
        // A gateway restart in between may have changed addresses and pins: use those of the real response.
        let token = client.create("jointokens", &self.token()).await?;
        made.push(("jointokens", token.clone()));
        output::note(&format!(
            "join token {} created, valid until {}",
            output::text(&token["metadata"]["name"]),
            output::text(&token["status"]["expires"])
        ));
        let token = parsed(&token)?;
        self.print(&self.manifest(cluster.clone(), mode, Some(&token))?, &token)
    }

    fn print(&self, manifest: &AgentManifest, token: &JoinToken) -> Outcome {
        let line = token.line();
        output::bytes(manifest.render((!self.no_secret).then_some(line.as_str()))?.as_bytes())
    }

    fn manifest(
        &self,
        cluster: ClusterName,
        mode: Mode,
        token: Option<&JoinToken>,
    ) -> Outcome<AgentManifest> {
        let mut manifest = AgentManifest::new(cluster, mode, token);
        manifest.namespace.clone_from(&self.namespace);
        manifest.replicas = self.replicas;
        manifest.grants.clone_from(&self.grant);
        manifest.network_policy = self.network_policy;
        manifest.pod = self.pod.options();
        if let Some(image) = &self.pod.image {
            manifest.image.clone_from(image);
        }
        let Way { gateway, quic_address, transport, proxy_password_file, proxy_ca, .. } = &self.way;
        if !gateway.is_empty() {
            manifest.addresses.clone_from(gateway);
        }
        manifest.quic_addresses.clone_from(quic_address);
        manifest.transport = (*transport).into();
        if let Some(url) = self.way.proxy_url()? {
            let password = match proxy_password_file {
                None => Password::None,
                Some(_) if self.no_secret => Password::Elsewhere,
                Some(file) => Password::Printed(read(file)?.trim_end_matches(['\r', '\n']).to_owned()),
            };
            let ca = proxy_ca.as_deref().map(read).transpose()?;
            manifest.proxy = Some(AgentProxy { url, password, ca });
        }
        if let Some(file) = &self.issuer_keys {
            if mode == Mode::Impersonate {
                return Err(Failure::usage(
                    "--issuer-keys works in restricted mode only: in impersonate mode the agent reads the keys from the API server itself",
                ));
            }
            manifest.keys = IssuerKeys::Given(read(file)?);
        }
        Ok(manifest)
    }

    /// The registered cluster; `None` if it has to be registered.
    async fn look(&self, client: &Client) -> Outcome<Option<Value>> {
        let cluster = match client.get("clusters", &self.cluster).await {
            Err(failure) if failure.is_not_found() && self.register => return Ok(None),
            Err(failure) if failure.is_not_found() => {
                let next = format!(
                    "cluster {} is not registered. Repeat the command with --register, or run: {} cluster register {}",
                    self.cluster,
                    super::connection::name(),
                    self.cluster
                );
                return Err(Failure::failed(next));
            }
            found => found?,
        };
        if cluster["status"]["source"] == "configuration" {
            let text = format!(
                "cluster {} is defined in the gateway's configuration file; its agents use certificate files and cannot join",
                self.cluster
            );
            return Err(Failure::failed(text));
        }
        Ok(Some(cluster))
    }

    /// The registered mode of a cluster; an error if another mode was requested.
    fn mode_of(&self, cluster: &Value) -> Outcome<Mode> {
        let mode: Mode = serde_json::from_value(cluster["spec"]["mode"].clone()).map_err(|_| {
            Failure::failed("the gateway reports a mode that this program does not know; upgrade towline")
        })?;
        if self.mode.is_some_and(|wanted| Mode::from(wanted) != mode) {
            let text = format!(
                "cluster {} is registered in mode {}. Omit --mode, or change the cluster first: kubectl patch cluster {} --type=merge -p '{{\"spec\":{{\"mode\":\"…\"}}}}'",
                self.cluster,
                shown(cluster),
                self.cluster
            );
            return Err(Failure::failed(text));
        }
        Ok(mode)
    }

    /// A token with one use per replica: all may join before the gateway knows the cluster's keys.
    fn token(&self) -> Value {
        json!({"apiVersion": API_VERSION, "kind": "JoinToken",
            "metadata": {"generateName": format!("{}-", self.cluster.chars().take(48).collect::<String>().trim_end_matches('-'))},
            "spec": {"cluster": self.cluster, "uses": self.replicas}})
    }
}

/// Removes what was created for a manifest that was not printed. Names what cannot be removed, and the command for it.
async fn take_back(client: &Client, made: Made) {
    for (plural, object) in made.into_iter().rev() {
        let name = output::text(&object["metadata"]["name"]);
        let what = if plural == "clusters" { "the registration of cluster" } else { "join token" };
        match client.delete(plural, &object).await {
            Ok(_) => output::note(&format!(
                "{what} {name} was removed again, because the manifest was not printed"
            )),
            Err(failure) => output::note(&format!(
                "{what} {name} is left over; remove it: {}",
                failure.text().unwrap_or_default()
            )),
        }
    }
}

/// The join token in the response to its creation.
fn parsed(answer: &Value) -> Outcome<JoinToken> {
    let line = answer["status"]["token"].as_str();
    let line = line.ok_or_else(|| Failure::failed("the gateway's response has no join token"))?;
    line.parse().map_err(|error| Failure::failed(format!("the gateway's response {error}")))
}

fn shown(cluster: &Value) -> String {
    output::text(&cluster["spec"]["mode"])
}

fn read(file: &Path) -> Outcome<String> {
    let mut text = String::new();
    let result = if file == Path::new("-") {
        std::io::stdin().lock().take(FILE_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|opened| opened.take(FILE_MAX).read_to_string(&mut text))
    };
    result.map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?;
    Ok(text)
}

#[derive(Debug, Args)]
#[command(before_help = OWN)]
pub(crate) struct OwnManifest {
    /// Addresses at which agents and clients reach the gateway.
    #[arg(required = true, value_name = "HOST:PORT")]
    addresses: Vec<PublicAddress>,
    /// Namespace that the manifest creates.
    #[arg(long)]
    namespace: Option<String>,
    /// Trust domain in the agents' certificates; immutable.
    #[arg(long, default_value = "towline.local")]
    trust_domain: String,
    /// Size of the volume.
    #[arg(long)]
    storage: Option<String>,
    /// Add a NetworkPolicy: ingress only to the gateway's port, not to the health port; no egress.
    #[arg(long)]
    network_policy: bool,
    #[command(flatten)]
    pod: PodFlags,
}

impl OwnManifest {
    fn run(&self) -> Outcome {
        let domain =
            TrustDomain::new(&self.trust_domain).map_err(|error| Failure::usage(error.to_string()))?;
        let mut manifest = GatewayManifest::new(self.addresses.clone(), domain);
        manifest.network_policy = self.network_policy;
        manifest.pod = self.pod.options();
        for (place, given) in [
            (&mut manifest.namespace, &self.namespace),
            (&mut manifest.image, &self.pod.image),
            (&mut manifest.storage, &self.storage),
        ] {
            if let Some(given) = given {
                place.clone_from(given);
            }
        }
        output::bytes(manifest.render()?.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches as _;

    /// Goal: D10: an invalid proxy URL is refused without quoting it, because it may contain a password.
    #[test]
    fn d10_a_password_in_a_proxy_s_url_is_not_told() {
        for url in ["http://joe:s3cret@", "socks5://joe:s3cret@p:1", "http://joe:s3cret@p:1/path"] {
            let command = Way::augment_args(clap::Command::new("towline"));
            let matches = command.try_get_matches_from(["towline", "--proxy-url", url]).unwrap();
            let failure = Way::from_arg_matches(&matches).unwrap().proxy_url().unwrap_err();
            let text = failure.text().unwrap();
            assert!(text.contains("--proxy-url") && !text.contains("s3cret"), "{text}");
            assert_eq!(failure.code(), 2);
        }
    }
}
