//! `towline cluster`: register, inspect, revoke and delete clusters.

use super::client::{API_VERSION, Client, Select};
use super::connection::{ConnectionArguments, name};
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Output};
use super::{describe, show};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

const CLUSTERS: &str = "clusters";

const EXAMPLES: &str = "Examples:
  towline cluster register prod
  towline cluster list -l tier=gold -o wide
  towline cluster describe prod                   show what is wrong
  towline cluster label prod tier=silver --overwrite
  towline cluster revoke prod                     revoke its agents; it stays registered
  towline cluster delete prod                     remove it from the fleet
";

const REGISTER: &str = "Examples:
  towline cluster register prod
  towline cluster register prod --mode impersonate --label tier=gold --protect
  towline cluster register prod --if-missing      succeed if it exists
";
const LIST: &str = "Examples:
  towline cluster list
  towline cluster list -w -l tier=gold
  towline cluster list -o name
";
const GET: &str = "Examples:
  towline cluster get prod -o yaml
  towline cluster get prod -w
";
const LABEL: &str = "Examples:
  towline cluster label prod tier=gold region=eu
  towline cluster label prod tier=silver --overwrite
  towline cluster label prod tier-                remove it
";

/// Register, inspect, revoke and delete clusters.
#[derive(Debug, Subcommand)]
#[command(before_help = EXAMPLES)]
pub(crate) enum ClusterCommand {
    /// Register a cluster so that its agents can join.
    #[command(before_help = REGISTER)]
    Register(Register),
    /// List clusters.
    #[command(visible_alias = "ls", before_help = LIST)]
    List(List),
    /// Show one cluster.
    #[command(before_help = GET)]
    Get(Get),
    /// Show the details of a cluster: conditions, agents, join tokens and revocations.
    #[command(before_help = "Examples:\n  towline cluster describe prod\n")]
    Describe {
        /// Name of the cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
    },
    /// Set or remove labels.
    #[command(before_help = LABEL)]
    Label(Label),
    /// Protect a cluster against deletion, or lift the protection.
    #[command(
        before_help = "Examples:\n  towline cluster protect prod\n  towline cluster protect prod --off\n"
    )]
    Protect {
        /// Name of the cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
        /// Lift the protection.
        #[arg(long)]
        off: bool,
    },
    /// Revoke a cluster's agents: end their sessions, certificates and join tokens. The cluster stays registered.
    #[command(
        before_help = "Examples:\n  towline cluster revoke prod\n  towline token create prod > join-token     to readmit it\n"
    )]
    Revoke {
        /// Name of the cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
    },
    /// Delete clusters, with their agents and join tokens.
    #[command(
        before_help = "Examples:\n  towline cluster delete prod\n  towline cluster delete test-1 test-2\n"
    )]
    Delete {
        /// Names of the clusters.
        #[arg(value_name = "CLUSTER", required = true, value_parser = show::cluster_name)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Register {
    /// Cluster name (immutable): 1-63 characters, a-z, 0-9 and inner hyphens.
    #[arg(value_name = "CLUSTER")]
    name: String,
    /// How callers are authenticated to the cluster.
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// Owning account (immutable).
    #[arg(long)]
    account: Option<String>,
    /// Label; repeatable.
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Free-form description: one line of at most 1024 bytes.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Most agents that may hold a valid certificate at the same time, 1 to 256 [default: 16].
    #[arg(long, value_name = "NUMBER")]
    max_agents: Option<u32>,
    /// Protect the cluster against deletion.
    #[arg(long)]
    protect: bool,
    /// Do nothing if the cluster is already registered.
    #[arg(long)]
    if_missing: bool,
    #[command(flatten)]
    output: Output,
}

/// As in the specification of a cluster.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Mode {
    /// The gateway forwards the caller's own credential for the cluster; the agent has no permissions.
    #[default]
    Restricted,
    /// The agent impersonates the caller.
    Impersonate,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Label selector: tier=gold, tier!=gold, 'tier in (gold,silver)', tier, !tier.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    selector: String,
    /// Keep running and print every change.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Name of the cluster.
    #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
    name: String,
    /// Keep running and print every change.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct Label {
    /// Name of the cluster.
    #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
    name: String,
    /// KEY=VALUE to set a label, KEY- to remove it.
    #[arg(value_name = "KEY=VALUE|KEY-", required = true)]
    labels: Vec<String>,
    /// Overwrite labels that have another value.
    #[arg(long)]
    overwrite: bool,
}

impl ClusterCommand {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let client = Client::new(connection)?;
        match self {
            Self::Register(register) => register.run(&client).await,
            Self::List(List { selector, watch, output }) => {
                let select = Select { labels: selector.clone(), name: None };
                let none = if selector.is_empty() {
                    format!("no cluster is registered. Register one: {} cluster register NAME", name())
                } else {
                    format!("no cluster matches the label selector: {selector}")
                };
                show::print(&client, CLUSTERS, &select, (output.output, *watch), |_| true, &none).await
            }
            Self::Get(Get { name, watch, output }) => {
                let object = show::find(&client, CLUSTERS, name).await?;
                if !watch && matches!(output.output, Format::Json | Format::Yaml | Format::Name) {
                    return output::object(output.output, &object);
                }
                show::print(
                    &client,
                    CLUSTERS,
                    &Select::one(name),
                    (output.output, *watch),
                    |_| true,
                    "it was deleted",
                )
                .await
            }
            Self::Describe { name } => describe::cluster(&client, name).await,
            Self::Label(label) => label.run(&client).await,
            Self::Protect { name, off } => protect(&client, name, *off).await,
            Self::Revoke { name } => revoke(&client, name).await,
            Self::Delete { names } => delete(&client, names).await,
        }
    }
}

impl Register {
    async fn run(&self, client: &Client) -> Outcome {
        let mode = match self.mode {
            Mode::Restricted => "restricted",
            Mode::Impersonate => "impersonate",
        };
        let mut spec = json!({"mode": mode, "deletionProtection": self.protect});
        if let Some(account) = &self.account {
            spec["account"] = account.clone().into();
        }
        if let Some(description) = &self.description {
            spec["description"] = description.clone().into();
        }
        if let Some(most) = self.max_agents {
            spec["maxAgents"] = most.into();
        }
        let labels = self.labels.iter().map(|label| match label.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), Value::from(value))),
            None => Err(Failure::usage(format!("--label {label:?} is not KEY=VALUE"))),
        });
        let labels: Map<String, Value> = labels.collect::<Outcome<_>>()?;
        let object = json!({
            "apiVersion": API_VERSION, "kind": "Cluster", "spec": spec,
            "metadata": {"name": self.name, "labels": labels},
        });
        let (object, word) = match client.create(CLUSTERS, &object).await {
            Ok(made) => (made, "registered"),
            Err(Failure::Refused(refusal)) if refusal.reason == "AlreadyExists" => {
                if !self.if_missing {
                    return Err(Failure::failed(format!(
                        "cluster {0:?} is already registered (AlreadyExists).\nShow it: {1} cluster describe {0}. To ignore this, use --if-missing",
                        self.name,
                        name()
                    )));
                }
                (client.get(CLUSTERS, &self.name).await?, "unchanged: already registered")
            }
            Err(failure) => return Err(failure),
        };
        self.print(&object, word)?;
        let (program, cluster) = (name(), &self.name);
        output::note(&format!(
            "Next steps (start its agent, see it connect, use it):\n  {program} agent manifest {cluster} | kubectl --context ITS-OWN-CONTEXT apply -f -\n  {program} status -w\n  {program} kubeconfig {cluster}\n(for an agent that you install in another way, create a join token: {program} token create {cluster})"
        ));
        Ok(())
    }

    fn print(&self, object: &Value, word: &str) -> Outcome {
        match self.output.output {
            Format::Table | Format::Wide => output::line(&format!("{} {word}", output::name(object))),
            format => output::object(format, object),
        }
    }
}

impl Label {
    async fn run(&self, client: &Client) -> Outcome {
        let before = show::find(client, CLUSTERS, &self.name).await?;
        let mut labels = Map::new();
        for label in &self.labels {
            match (label.split_once('='), label.strip_suffix('-')) {
                (Some((key, value)), _) => {
                    let had = before["metadata"]["labels"][key].as_str();
                    if let Some(had) = had.filter(|had| *had != value && !self.overwrite) {
                        return Err(Failure::failed(format!(
                            "{} already has the label {key}={had}; use --overwrite to change it to {value}",
                            self.name
                        )));
                    }
                    labels.insert(key.to_owned(), value.into());
                }
                (None, Some(key)) if !key.is_empty() => {
                    labels.insert(key.to_owned(), Value::Null);
                }
                _ => {
                    return Err(Failure::usage(format!(
                        "{label:?} is neither KEY=VALUE nor KEY- (to remove the label)"
                    )));
                }
            }
        }
        // If the object was changed since, the labels checked above are not those that would be overwritten.
        let version = &before["metadata"]["resourceVersion"];
        let patch = json!({"metadata": {"labels": labels, "resourceVersion": version}});
        let after = client.patch(CLUSTERS, &self.name, &patch).await?;
        let word =
            if after["metadata"]["labels"] == before["metadata"]["labels"] { "unchanged" } else { "labeled" };
        output::line(&format!("{} {word}", output::name(&after)))
    }
}

async fn protect(client: &Client, cluster: &str, off: bool) -> Outcome {
    show::find(client, CLUSTERS, cluster).await?;
    let after = client.patch(CLUSTERS, cluster, &json!({"spec": {"deletionProtection": !off}})).await?;
    let word = if off { "is no longer protected against deletion" } else { "is protected against deletion" };
    output::line(&format!("{} {word}", output::name(&after)))
}

async fn revoke(client: &Client, cluster: &str) -> Outcome {
    let before = show::find(client, CLUSTERS, cluster).await?;
    let tokens = describe::tokens_of(client, cluster).await?;
    let spec = json!({"cluster": {"name": cluster}});
    client
        .create("revocations", &json!({"apiVersion": API_VERSION, "kind": "Revocation", "spec": spec}))
        .await?;
    output::line(&format!("{} revoked", output::name(&before)))?;
    output::note(&format!(
        "Ended: {}, and its ServiceAccount's permission to join. The cluster stays registered.\nTo readmit its agents: {} token create {cluster}",
        ended(&before, &tokens),
        name()
    ));
    Ok(())
}

async fn delete(client: &Client, names: &[String]) -> Outcome {
    let mut failed = None;
    for cluster in names {
        if let Err(failure) = delete_one(client, cluster).await {
            // A failure does not prevent the others.
            if let Some(before) = failed.replace(failure)
                && let Some(text) = before.text()
            {
                output::note(&text);
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

async fn delete_one(client: &Client, cluster: &str) -> Outcome {
    let before = show::find(client, CLUSTERS, cluster).await?;
    let tokens = describe::tokens_of(client, cluster).await?;
    match client.delete(CLUSTERS, &before).await {
        Ok(_) => {}
        Err(failure) if failure.is_forbidden() && before["spec"]["deletionProtection"] == true => {
            return Err(Failure::failed(format!(
                "cluster {cluster:?} is protected against deletion; nothing was deleted.\nTo lift the protection: {} cluster protect {cluster} --off",
                name()
            )));
        }
        Err(failure) => return Err(failure),
    }
    output::line(&format!("{} deleted", output::name(&before)))?;
    output::note(&format!(
        "Ended with it: {}. A cluster that is registered under this name later is a new one: its agents must join again.",
        ended(&before, &tokens)
    ));
    Ok(())
}

/// What ended, from the state before.
fn ended(cluster: &Value, tokens: &[Value]) -> String {
    let number = |field: &str| cluster["status"][field].as_u64().unwrap_or(0);
    let (sessions, agents) = (number("sessions"), number("agents"));
    let tokens = tokens.len().try_into().unwrap_or(u64::MAX);
    format!(
        "{}, {} on record with their certificates, {}",
        show::count(sessions, "session"),
        show::count(agents, "agent"),
        show::count(tokens, "join token")
    )
}
