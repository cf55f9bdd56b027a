//! `towline cluster`: make clusters known, look at them, cut them off.

use super::client::{API_VERSION, Client, Select};
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Output};
use super::{Connection, describe, name, show};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

const CLUSTERS: &str = "clusters";

const EXAMPLES: &str = "Examples:
  towline cluster register prod
  towline cluster list -l tier=gold -o wide
  towline cluster describe prod                   what is wrong with it
  towline cluster label prod tier=silver --overwrite
  towline cluster revoke prod                     its agents count no more; it stays registered
  towline cluster delete prod                     it is forgotten
";

/// Register clusters, look at them, cut them off.
#[derive(Debug, Subcommand)]
#[command(before_help = EXAMPLES)]
pub(crate) enum Cluster {
    /// Make a cluster known, so that its agents can join.
    #[command(before_help = REGISTER)]
    Register(Register),
    /// List clusters.
    #[command(visible_alias = "ls", before_help = LIST)]
    List(List),
    /// Show one cluster.
    #[command(before_help = GET)]
    Get(Get),
    /// Tell everything about a cluster: conditions and since when, agents, join tokens, revocations.
    #[command(before_help = "Examples:\n  towline cluster describe prod\n")]
    Describe {
        /// The cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
    },
    /// Set or remove labels.
    #[command(before_help = LABEL)]
    Label(Label),
    /// Protect a cluster against deletion, or lift that.
    #[command(
        before_help = "Examples:\n  towline cluster protect prod\n  towline cluster protect prod --off\n"
    )]
    Protect {
        /// The cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
        /// Lift the protection.
        #[arg(long)]
        off: bool,
    },
    /// End all that agents of a cluster may: sessions, certificates, join tokens. The cluster stays registered.
    #[command(
        before_help = "Examples:\n  towline cluster revoke prod\n  towline token create prod > join-token     to let it back in\n"
    )]
    Revoke {
        /// The cluster.
        #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
        name: String,
    },
    /// Forget clusters, with their agents and join tokens.
    #[command(
        before_help = "Examples:\n  towline cluster delete prod\n  towline cluster delete test-1 test-2\n"
    )]
    Delete {
        /// The clusters.
        #[arg(value_name = "CLUSTER", required = true, value_parser = show::cluster_name)]
        names: Vec<String>,
    },
}

const REGISTER: &str = "Examples:
  towline cluster register prod
  towline cluster register prod --mode impersonate --label tier=gold --protect
  towline cluster register prod --if-missing      no error if there is one
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

#[derive(Args, Debug)]
pub(crate) struct Register {
    /// Its name, for ever: 1 to 63 of a-z, 0-9 and, between them, -.
    #[arg(value_name = "CLUSTER")]
    name: String,
    /// How requests authenticate to it.
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// To whom it belongs; never changes.
    #[arg(long)]
    account: Option<String>,
    /// A label; may be repeated.
    #[arg(short, long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Free-form description: one line of at most 1024 bytes.
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Agents with a valid certificate at a time, 1 to 256 [default: 16].
    #[arg(long, value_name = "NUMBER")]
    max_agents: Option<u32>,
    /// Protect it against deletion.
    #[arg(long)]
    protect: bool,
    /// One that is registered already is left as it is, and is no error.
    #[arg(long)]
    if_missing: bool,
    #[command(flatten)]
    output: Output,
}

/// As in the specification of a cluster.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Mode {
    /// The caller's own credential goes through; the agent has no right.
    #[default]
    Restricted,
    /// The agent acts in the caller's name.
    Impersonate,
}

#[derive(Args, Debug)]
pub(crate) struct List {
    /// Only those with these labels: tier=gold, tier!=gold, 'tier in (gold,silver)', tier, !tier.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    selector: String,
    /// Go on with every change.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args, Debug)]
pub(crate) struct Get {
    /// The cluster.
    #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
    name: String,
    /// Go on with every change.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args, Debug)]
pub(crate) struct Label {
    /// The cluster.
    #[arg(value_name = "CLUSTER", value_parser = show::cluster_name)]
    name: String,
    /// KEY=VALUE to set one, KEY- to remove one.
    #[arg(value_name = "KEY=VALUE|KEY-", required = true)]
    labels: Vec<String>,
    /// Labels that have another value are changed.
    #[arg(long)]
    overwrite: bool,
}

impl Cluster {
    pub(crate) async fn run(&self, connection: &Connection) -> Outcome {
        let client = Client::new(connection)?;
        match self {
            Self::Register(register) => register.run(&client).await,
            Self::List(List { selector, watch, output }) => {
                let select = Select { labels: selector.clone(), name: None };
                let none = if selector.is_empty() {
                    format!("no cluster is registered. Register one: {} cluster register NAME", name())
                } else {
                    format!("no cluster has these labels: {selector}")
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
                    "it is gone",
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
            None => Err(Failure::usage(format!("--label {label:?}: write KEY=VALUE"))),
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
                        "the cluster {0:?} is registered already (AlreadyExists).\nLook at it: {1} cluster describe {0}. With --if-missing it is left as it is, and is no error",
                        self.name,
                        name()
                    )));
                }
                (client.get(CLUSTERS, &self.name).await?, "unchanged: it is registered already")
            }
            Err(failure) => return Err(failure),
        };
        self.print(&object, word)?;
        let (program, cluster) = (name(), &self.name);
        output::note(&format!(
            "Next, let its agent join, see it connect, reach it:\n  {program} agent manifest {cluster} | kubectl --context ITS-OWN-CONTEXT apply -f -\n  {program} status -w\n  {program} kubeconfig {cluster}\n(an agent that is set up in another way joins with: {program} token create {cluster})"
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
                            "{} has the label {key}={had} already; with --overwrite it becomes {value}",
                            self.name
                        )));
                    }
                    labels.insert(key.to_owned(), value.into());
                }
                (None, Some(key)) if !key.is_empty() => {
                    labels.insert(key.to_owned(), Value::Null);
                }
                _ => return Err(Failure::usage(format!("{label:?}: write KEY=VALUE, or KEY- to remove it"))),
            }
        }
        // If somebody has changed it since, what was looked at above is not what would be overwritten.
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
    let word = if off { "can be deleted now" } else { "is protected against deletion" };
    output::line(&format!("{} {word}", output::name(&after)))
}

async fn revoke(client: &Client, cluster: &str) -> Outcome {
    let before = show::find(client, CLUSTERS, cluster).await?;
    let tokens = tokens_of(client, cluster).await?;
    let spec = json!({"cluster": {"name": cluster}});
    client
        .create("revocations", &json!({"apiVersion": API_VERSION, "kind": "Revocation", "spec": spec}))
        .await?;
    output::line(&format!("{} revoked", output::name(&before)))?;
    output::note(&format!(
        "Ended: {}, the right of its ServiceAccount to join. It stays registered.\nTo let it back in: {} token create {cluster}",
        ended(&before, &tokens),
        name()
    ));
    Ok(())
}

async fn delete(client: &Client, names: &[String]) -> Outcome {
    let mut failed = None;
    for cluster in names {
        if let Err(failure) = delete_one(client, cluster).await {
            // One that fails does not keep the others.
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
    let tokens = tokens_of(client, cluster).await?;
    match client.delete(CLUSTERS, &before).await {
        Ok(_) => {}
        Err(failure) if failure.is_forbidden() && before["spec"]["deletionProtection"] == true => {
            return Err(Failure::failed(format!(
                "the cluster {cluster:?} is protected against deletion, and nothing was deleted.\nTo lift that: {} cluster protect {cluster} --off",
                name()
            )));
        }
        Err(failure) => return Err(failure),
    }
    output::line(&format!("{} deleted", output::name(&before)))?;
    output::note(&format!(
        "Ended with it: {}. One that is registered again under this name is another cluster: its agents join anew.",
        ended(&before, &tokens)
    ));
    Ok(())
}

/// The join tokens of a cluster.
pub(crate) async fn tokens_of(client: &Client, cluster: &str) -> Outcome<Vec<Value>> {
    let mut list = client.list("jointokens", &Select::default()).await?;
    let tokens = list["items"].as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok(tokens.into_iter().filter(|token| token["spec"]["cluster"] == cluster).collect())
}

/// What ended, by what was there before.
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
