//! `towline whoami` and `towline version`: the caller's identity at the gateway, and the versions of both programs.

use super::client::{API_VERSION, Client};
use super::connection::ConnectionArguments;
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Output};
use clap::Args;
use serde_json::{Value, json};

const WHOAMI: &str = "Examples:
  towline whoami
  towline whoami --context prod-gateway -o json
";

const VERSION: &str = "Examples:
  towline version
  towline version --client
";

#[derive(Debug, Args)]
#[command(before_help = WHOAMI)]
pub(crate) struct Whoami {
    #[command(flatten)]
    output: Output,
}

impl Whoami {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let client = Client::new(connection)?;
        let review = review(&client).await?;
        match self.output.output {
            Format::Json | Format::Yaml => output::object(self.output.output, &review),
            Format::Name => output::line(&output::text(&review["status"]["userInfo"]["username"])),
            Format::Table | Format::Wide => {
                let info = &review["status"]["userInfo"];
                output::line(&format!("User:      {}", output::text(&info["username"])))?;
                output::line(&format!("Groups:    {}", groups(info)))?;
                output::line(&format!(
                    "Gateway:   {} (context {})",
                    client.context.gateway, client.context.name
                ))
            }
        }
    }
}

fn groups(info: &Value) -> String {
    let groups: Vec<_> = info["groups"].as_array().into_iter().flatten().map(output::text).collect();
    if groups.is_empty() { "<none>".to_owned() } else { groups.join(", ") }
}

async fn review(client: &Client) -> Outcome<Value> {
    let asked = json!({"apiVersion": API_VERSION, "kind": "SelfSubjectReview"});
    client.create("selfsubjectreviews", &asked).await
}

/// The gateway's version; none of one that answers, and says none.
async fn version(client: &Client) -> Outcome<Option<String>> {
    match client.version().await {
        Ok(told) => Ok(own(&told)),
        Err(Failure::Refused(refusal)) if refusal.status == 404 => review(client).await.map(|_| None),
        Err(failure) => Err(failure),
    }
}

/// The version in what a gateway answers: `v1.2.3+towline`. Of an API server it would be another one's.
fn own(told: &Value) -> Option<String> {
    let version = told["gitVersion"].as_str()?.strip_suffix("+towline")?;
    Some(output::text(&version.trim_start_matches('v').into()))
}

#[derive(Debug, Args)]
#[command(before_help = VERSION)]
pub(crate) struct Version {
    /// Show only the version of this program; contact no gateway.
    #[arg(long)]
    client: bool,
    #[command(flatten)]
    output: Output,
}

impl Version {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let mut told = json!({"clientVersion": env!("CARGO_PKG_VERSION")});
        let mut lines = format!("Client: {}\n", env!("CARGO_PKG_VERSION"));
        if !self.client {
            let (gateway, answers) = match Client::new(connection) {
                Ok(client) => (client.context.gateway.clone(), version(&client).await),
                Err(failure) => (String::new(), Err(failure)),
            };
            told["gateway"] = json!({"url": gateway, "answers": answers.is_ok()});
            match answers {
                Ok(Some(version)) => {
                    lines.push_str(&format!("Gateway: {version} at {gateway}\n"));
                    told["gateway"]["version"] = version.into();
                }
                Ok(None) => {
                    lines.push_str(&format!("Gateway: {gateway} answers but does not report its version\n"))
                }
                Err(failure) => {
                    output::note(&format!("the gateway: {}", failure.text().unwrap_or_default()));
                }
            }
        }
        match self.output.output {
            Format::Json | Format::Yaml => output::object(self.output.output, &told),
            _ => output::bytes(lines.as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: D32, M13: the version is the gateway's own, and not an API server's.
    #[test]
    fn d32_the_version_is_the_gateways() {
        assert_eq!(own(&json!({"gitVersion": "v1.2.3+towline"})).as_deref(), Some("1.2.3"));
        assert_eq!(own(&json!({"gitVersion": "v1.34.2"})), None);
        assert_eq!(own(&json!({})), None);
    }
}
