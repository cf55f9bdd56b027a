//! `towline agent` and `towline gateway`: what a cluster's owner applies, as text. Nothing is applied from here.

use super::Connection;
use super::client::{API_VERSION, Client};
use super::failure::{Failure, Outcome};
use super::manifest::{AgentManifest, GatewayManifest, Grant, IssuerKeys, ManifestError};
use super::output;
use crate::config::{Mode, PublicAddress};
use crate::routing::ClusterName;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use towline_certs::{JoinToken, TrustDomain};

/// The agent of a cluster.
#[derive(Debug, Subcommand)]
#[command(before_help = AGENT)]
pub(crate) enum AgentCommand {
    /// Print what a cluster needs to join: YAML for kubectl apply, a new join token included.
    Manifest(Manifest),
}

/// A gateway in a cluster.
#[derive(Debug, Subcommand)]
#[command(before_help = OWN)]
pub(crate) enum GatewayCommand {
    /// Print what runs a gateway in a cluster: YAML for kubectl apply.
    Manifest(OwnManifest),
}

impl AgentCommand {
    pub(crate) async fn run(&self, connection: &Connection) -> Outcome {
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

const AGENT: &str = "Examples:
  towline agent manifest prod | kubectl --context prod-admin apply -f -
  towline agent manifest prod --register --mode impersonate --grant towline:admins=view | kubectl apply -f -
  towline agent manifest prod --replicas 2 --image registry.example.com/towline-agent:1.0 > agent.yaml
  towline agent manifest prod --join-token-file join-token    asks no gateway
";

#[derive(Args, Debug)]
#[command(before_help = AGENT)]
pub(crate) struct Manifest {
    /// The cluster's name at the gateway.
    cluster: String,
    /// Register the cluster first, if it is not.
    #[arg(long, conflicts_with = "join_token_file")]
    register: bool,
    /// restricted: callers bring a credential of the cluster, the agent has no right. impersonate: the agent acts in the callers'
    /// names. Default: as the cluster is registered.
    #[arg(long, value_enum)]
    mode: Option<ModeWord>,
    /// In impersonate mode: bind a group of callers to a ClusterRole of the cluster. May be repeated.
    #[arg(long, value_name = "GROUP=CLUSTERROLE")]
    grant: Vec<Grant>,
    /// The namespace, which the manifest makes.
    #[arg(long, default_value = super::manifest::AGENT_NAMESPACE)]
    namespace: String,
    /// The image, by a name under which the cluster's nodes get it.
    #[arg(long)]
    image: Option<String>,
    /// How many agents; with 2 the cluster stays connected while a node is drained.
    #[arg(long, default_value_t = 1)]
    replicas: u32,
    /// Use this join token, - for stdin, instead of a new one. No gateway is asked then.
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// In restricted mode: the cluster's public keys (kubectl get --raw /openid/v1/jwks), instead of showing them to everybody.
    #[arg(long, value_name = "FILE")]
    issuer_keys: Option<PathBuf>,
    /// Add a NetworkPolicy: nothing in; out only to names, the gateway and the API server.
    #[arg(long)]
    network_policy: bool,
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

impl Manifest {
    async fn run(&self, connection: &Connection) -> Outcome {
        let cluster = ClusterName::new(&self.cluster).map_err(|error| Failure::usage(error.to_string()))?;
        let (mode, line) = match &self.join_token_file {
            Some(file) => {
                let mode = self.mode.map_or(Mode::Restricted, Mode::from);
                self.manifest(&cluster, mode, None)?.check()?;
                (mode, read(file)?)
            }
            None => {
                let client = Client::new(connection)?;
                let mode = self.registered(&client).await?;
                // Before there is a token: one that nobody gets to see would stay until it expires.
                self.manifest(&cluster, mode, None)?.check()?;
                (mode, self.new_token(&client).await?)
            }
        };
        let token: JoinToken = line.parse().map_err(|error| match &self.join_token_file {
            Some(file) => Failure::usage(format!("the join token in {} {error}", file.display())),
            None => Failure::failed(format!("the gateway's answer {error}")),
        })?;
        let text = self.manifest(&cluster, mode, Some(&token))?.render(&token.line())?;
        output::bytes(text.as_bytes())
    }

    fn manifest(
        &self,
        cluster: &ClusterName,
        mode: Mode,
        token: Option<&JoinToken>,
    ) -> Outcome<AgentManifest> {
        let mut manifest = AgentManifest::new(cluster.clone(), mode, token);
        manifest.namespace.clone_from(&self.namespace);
        manifest.replicas = self.replicas;
        manifest.grants.clone_from(&self.grant);
        manifest.network_policy = self.network_policy;
        if let Some(image) = &self.image {
            manifest.image.clone_from(image);
        }
        if let Some(file) = &self.issuer_keys {
            if mode == Mode::Impersonate {
                return Err(Failure::usage(
                    "--issuer-keys is for restricted mode: an agent that impersonates asks the API server itself",
                ));
            }
            manifest.keys = IssuerKeys::Given(read(file)?);
        }
        Ok(manifest)
    }

    /// The mode in which the cluster is registered; registers it if that is wanted.
    async fn registered(&self, client: &Client) -> Outcome<Mode> {
        let cluster = match client.get("clusters", &self.cluster).await {
            Err(failure) if failure.is_not_found() && self.register => {
                let mode = self.mode.map_or(Mode::Restricted, Mode::from);
                let asked = json!({"apiVersion": API_VERSION, "kind": "Cluster",
                    "metadata": {"name": self.cluster}, "spec": {"mode": mode}});
                let made = client.create("clusters", &asked).await?;
                output::note(&format!("cluster {} registered, mode {}", self.cluster, shown(&made)));
                made
            }
            Err(failure) if failure.is_not_found() => {
                let next = format!(
                    "cluster {} is not registered. Once more with --register, or: {} cluster register {}",
                    self.cluster,
                    super::name(),
                    self.cluster
                );
                return Err(Failure::failed(next));
            }
            found => found?,
        };
        if cluster["status"]["source"] == "configuration" {
            let text = format!(
                "cluster {} stands in the gateway's configuration, where agents have certificates of files and do not join",
                self.cluster
            );
            return Err(Failure::failed(text));
        }
        let mode: Mode = serde_json::from_value(cluster["spec"]["mode"].clone()).map_err(|_| {
            Failure::failed("the gateway says a mode that this program does not know; update it")
        })?;
        if self.mode.is_some_and(|wanted| Mode::from(wanted) != mode) {
            let text = format!(
                "cluster {} is registered in mode {}. Leave --mode away, or change it first: kubectl patch cluster {} --type=merge -p '{{\"spec\":{{\"mode\":\"…\"}}}}'",
                self.cluster,
                shown(&cluster),
                self.cluster
            );
            return Err(Failure::failed(text));
        }
        Ok(mode)
    }

    /// A token with a use for each replica: they may all come before the gateway knows the cluster's keys.
    async fn new_token(&self, client: &Client) -> Outcome<String> {
        let asked = json!({"apiVersion": API_VERSION, "kind": "JoinToken",
            "metadata": {"generateName": format!("{}-", self.cluster.chars().take(48).collect::<String>().trim_end_matches('-'))},
            "spec": {"cluster": self.cluster, "uses": self.replicas}});
        let made = client.create("jointokens", &asked).await?;
        let line = made["status"]["token"].as_str();
        let line = line.ok_or_else(|| Failure::failed("the gateway's answer holds no join token"))?;
        output::note(&format!(
            "join token {} made, to be used until {}",
            output::text(&made["metadata"]["name"]),
            output::text(&made["status"]["expires"])
        ));
        Ok(line.to_owned())
    }
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

/// Largest token or key set.
const FILE_MAX: u64 = 64 << 10;

const OWN: &str = "Examples:
  towline gateway manifest gateway.example.com:8443 | kubectl apply -f -
";

#[derive(Args, Debug)]
#[command(before_help = OWN)]
pub(crate) struct OwnManifest {
    /// Where agents and clients reach the gateway.
    #[arg(required = true, value_name = "HOST:PORT")]
    addresses: Vec<PublicAddress>,
    /// The namespace, which the manifest makes.
    #[arg(long)]
    namespace: Option<String>,
    /// The image, by a name under which the cluster's nodes get it.
    #[arg(long)]
    image: Option<String>,
    /// In agents' certificates; it cannot be changed later.
    #[arg(long, default_value = "towline.local")]
    trust_domain: String,
    /// Size of the volume.
    #[arg(long)]
    storage: Option<String>,
    /// Add a NetworkPolicy: in only to the gateway's port, not to the health port; nothing out.
    #[arg(long)]
    network_policy: bool,
}

impl OwnManifest {
    fn run(&self) -> Outcome {
        let domain =
            TrustDomain::new(&self.trust_domain).map_err(|error| Failure::usage(error.to_string()))?;
        let mut manifest = GatewayManifest::new(self.addresses.clone(), domain);
        manifest.network_policy = self.network_policy;
        for (place, given) in [
            (&mut manifest.namespace, &self.namespace),
            (&mut manifest.image, &self.image),
            (&mut manifest.storage, &self.storage),
        ] {
            if let Some(given) = given {
                place.clone_from(given);
            }
        }
        output::bytes(manifest.render()?.as_bytes())
    }
}
