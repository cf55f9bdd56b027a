//! Whom does the gateway take me for, and does it answer?

use super::Connection;
use super::client::{API_VERSION, Client};
use super::failure::Outcome;
use super::output::{self, Format, Output};
use clap::Args;
use serde_json::{Value, json};

const WHOAMI: &str = "Examples:
  towline whoami
  towline whoami --context prod-gateway -o json
";

#[derive(Args, Debug)]
#[command(before_help = WHOAMI)]
pub(crate) struct Whoami {
    #[command(flatten)]
    output: Output,
}

impl Whoami {
    pub(crate) async fn run(&self, connection: &Connection) -> Outcome {
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

const VERSION: &str = "Examples:
  towline version
  towline version --client
";

#[derive(Args, Debug)]
#[command(before_help = VERSION)]
pub(crate) struct Version {
    /// Only of this program; asks nobody.
    #[arg(long)]
    client: bool,
    #[command(flatten)]
    output: Output,
}

impl Version {
    pub(crate) async fn run(&self, connection: &Connection) -> Outcome {
        let mut told = json!({"clientVersion": env!("CARGO_PKG_VERSION")});
        let mut lines = format!("Client: {}\n", env!("CARGO_PKG_VERSION"));
        if !self.client {
            // The gateway's version stands in its metric build_info, which is on its private port; here it only shows that it is there.
            let (gateway, answers) = match Client::new(connection) {
                Ok(client) => {
                    let answers = review(&client).await;
                    (client.context.gateway.clone(), answers)
                }
                Err(failure) => (String::new(), Err(failure)),
            };
            match answers {
                Ok(_) => {
                    lines.push_str(&format!("Gateway: {gateway} answers (it tells its version on its private port only: towline_gateway_build_info)\n"));
                    told["gateway"] = json!({"url": gateway, "answers": true});
                }
                Err(failure) => {
                    output::note(&format!("the gateway: {}", failure.text().unwrap_or_default()));
                    told["gateway"] = json!({"url": gateway, "answers": false});
                }
            }
        }
        match self.output.output {
            Format::Json | Format::Yaml => output::object(self.output.output, &told),
            _ => output::bytes(lines.as_bytes()),
        }
    }
}
