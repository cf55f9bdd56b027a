//! `towline token`: create, list and revoke join tokens.

use super::client::{API_VERSION, Client, Select};
use super::connection::{ConnectionArguments, name};
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Output};
use super::show::{self, until};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::time::Duration;

const TOKENS: &str = "jointokens";

const EXAMPLES: &str = "Examples:
  towline token create prod > join-token
  towline token create prod --uses 3 --expires 24h
  towline token list prod
  towline token revoke 3f9a0c12be
";

const CREATE: &str = "Examples:
  towline token create prod > join-token          for one agent, within an hour
  towline token create prod --uses 3 --expires 7d
  towline token create prod -o json
";

const LIFE_MOST: Duration = Duration::from_secs(30 * 86_400);

/// Create, list and revoke join tokens.
#[derive(Debug, Subcommand)]
#[command(before_help = EXAMPLES)]
pub(crate) enum TokenCommand {
    /// Create a join token for a cluster and print it. It is not shown again.
    #[command(before_help = CREATE)]
    Create(Create),
    /// List join tokens, without their secrets.
    #[command(
        visible_alias = "ls",
        before_help = "Examples:\n  towline token list\n  towline token list prod -o wide\n"
    )]
    List(List),
    /// Revoke join tokens. Agents that joined with them stay.
    #[command(before_help = "Examples:\n  towline token revoke 3f9a0c12be\n")]
    Revoke {
        /// Names of the tokens.
        #[arg(value_name = "TOKEN", required = true, value_parser = show::token_name)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Cluster that agents join with the token.
    #[arg(value_parser = show::cluster_name)]
    cluster: String,
    /// Number of agents that may join with the token, 1 to 256. An agent that rejoins with the same key is not counted again.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    uses: u32,
    /// Lifetime, for example 90s, 30m, 24h or 7d; at most 30d.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = life)]
    expires: Duration,
    /// Name of the token [default: generated].
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only tokens of this cluster.
    #[arg(value_parser = show::cluster_name)]
    cluster: Option<String>,
    /// Label selector: list only matching tokens.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    selector: String,
    /// Keep running and print every change.
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    output: Output,
}

/// `90s`, `30m`, `24h`, `7d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration = towline_settings::units::duration(text)?;
    if duration.as_secs() == 0 || duration.subsec_millis() > 0 {
        return Err(format!("{text} is not a number of whole seconds, at least 1s"));
    }
    Ok(duration)
}

/// How long a join token is good: [`duration`], and what the gateway takes.
fn life(text: &str) -> Result<Duration, String> {
    let life = duration(text)?;
    if life > LIFE_MOST {
        return Err(format!("{text} is too long: a join token is valid for at most 30d"));
    }
    Ok(life)
}

impl TokenCommand {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let client = Client::new(connection)?;
        match self {
            Self::Create(create) => create.run(&client).await,
            Self::List(list) => {
                if let Some(cluster) = &list.cluster {
                    show::find(&client, "clusters", cluster).await?;
                }
                let select = Select { labels: list.selector.clone(), name: None };
                let keep = |token: &Value| {
                    list.cluster.as_ref().is_none_or(|cluster| token["spec"]["cluster"] == **cluster)
                };
                let cluster = list.cluster.as_deref().unwrap_or("CLUSTER");
                let none = format!("no join token found. Create one: {} token create {cluster}", name());
                show::print(&client, TOKENS, &select, (list.output.output, list.watch), keep, &none).await
            }
            Self::Revoke { names } => {
                let mut failed = None;
                for token in names {
                    if let Err(failure) = revoke(&client, token).await
                        && let Some(text) = failed.replace(failure).as_ref().and_then(Failure::text)
                    {
                        output::note(&text);
                    }
                }
                failed.map_or(Ok(()), Err)
            }
        }
    }
}

impl Create {
    async fn run(&self, client: &Client) -> Outcome {
        let cluster = show::find(client, "clusters", &self.cluster).await?;
        if cluster["status"]["source"] == "configuration" {
            return Err(Failure::failed(format!(
                "cluster {:?} is defined in the gateway's configuration file, and its agents use certificate files; join tokens are for registered clusters",
                self.cluster
            )));
        }
        let made = create(client, &self.cluster, self.uses, self.expires, self.name.as_deref()).await?;
        match self.output.output {
            Format::Table | Format::Wide => output::line(&output::text(&made["status"]["token"]))?,
            format => output::object(format, &made)?,
        }
        output::note(&format!(
            "The join token {} of cluster {} admits {} and expires {}. It is a secret and is not shown again.\nWrite it to the file that the agent's identity.joinTokenFile names. To revoke it: {} token revoke {}",
            output::text(&made["metadata"]["name"]),
            self.cluster,
            show::count(u64::from(self.uses), "agent"),
            until(&made["status"]["expires"]),
            name(),
            output::text(&made["metadata"]["name"]),
        ));
        Ok(())
    }
}

/// Makes a join token; `status.token` of the answer is the line for the agent.
pub(crate) async fn create(
    client: &Client,
    cluster: &str,
    uses: u32,
    expires: Duration,
    token: Option<&str>,
) -> Outcome<Value> {
    let object = json!({
        "apiVersion": API_VERSION, "kind": "JoinToken", "metadata": {"name": token},
        "spec": {"cluster": cluster, "uses": uses, "expirationSeconds": expires.as_secs()},
    });
    client.create(TOKENS, &object).await
}

async fn revoke(client: &Client, token: &str) -> Outcome {
    let before = show::find(client, TOKENS, token).await?;
    client.delete(TOKENS, &before).await?;
    output::line(&format!("{} revoked", output::name(&before)))?;
    let cluster = output::text(&before["spec"]["cluster"]);
    let used = before["status"]["used"].as_u64().unwrap_or(0);
    let left = before["spec"]["uses"].as_u64().unwrap_or(0).saturating_sub(used);
    output::note(&format!(
        "Ended: {} left for cluster {cluster}. It had admitted {}, which stay connected; to revoke those too: {} cluster revoke {cluster}",
        show::count(left, "use"),
        show::count(used, "agent"),
        name()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: D39: the error for a too long lifetime uses the units of the command line.
    #[test]
    fn d39_a_join_token_lasts_30_days_at_most() {
        assert_eq!(life("30d"), Ok(LIFE_MOST));
        let text = life("31d").unwrap_err();
        assert!(text.contains("at most 30d") && !text.contains("2592000"), "{text}");
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for wrong in ["", "h", "1", "0s", "-1h", "1.5h", "1w", "1é", "99999999999999999999d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
