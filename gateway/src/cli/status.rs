//! `towline status`: the fleet at a glance, what is broken first.

use super::client::{Client, Select};
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Output, Table, text};
use super::show::{self, Seen, ago, condition, until};
use super::{Connection, name};
use clap::Args;
use serde_json::Value;
use std::collections::BTreeMap;

const EXAMPLES: &str = "Examples:
  towline status
  towline status -w -l tier=gold
  towline status --check || page-somebody
";

/// Which clusters are connected, and why one is not: one line each, what is broken first.
#[derive(Args, Debug)]
#[command(before_help = EXAMPLES)]
pub(crate) struct Status {
    /// Only clusters with these labels.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    selector: String,
    /// Go on with a line for each change.
    #[arg(short, long, conflicts_with = "check")]
    watch: bool,
    /// Exit code 1 if a cluster is not connected; without it the code only tells whether the gateway could be asked.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    output: Output,
}

/// How a cluster is, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Down,
    Overdue,
    Outdated,
    Well,
}

impl Health {
    fn of(cluster: &Value) -> Self {
        let is = |kind: &str, status: &str| condition(cluster, kind)["status"] == status;
        if !is("Connected", "True") {
            Self::Down
        } else if is("CertificateCurrent", "False") {
            Self::Overdue
        } else if is("AgentOutdated", "True") {
            Self::Outdated
        } else {
            Self::Well
        }
    }

    /// The condition that says why.
    const fn reason(self) -> Option<&'static str> {
        match self {
            Self::Down => Some("Connected"),
            Self::Overdue => Some("CertificateCurrent"),
            Self::Outdated => Some("AgentOutdated"),
            Self::Well => None,
        }
    }
}

impl Status {
    pub(crate) async fn run(&self, connection: &Connection) -> Outcome {
        let client = Client::new(connection)?;
        let select = Select { labels: self.selector.clone(), name: None };
        if self.watch {
            return self.follow(&client, &select).await;
        }
        let list = client.list("clusters", &select).await?;
        self.print(&list, &mut Table::default())?;
        let down: Vec<String> = items(&list)
            .iter()
            .filter(|cluster| Health::of(cluster) == Health::Down)
            .map(|cluster| text(&cluster["metadata"]["name"]))
            .collect();
        if self.check && !down.is_empty() {
            let many = down.len().try_into().unwrap_or(u64::MAX);
            return Err(Failure::failed(format!(
                "{} not connected: {}. Why: {} cluster describe {}",
                show::count(many, "cluster"),
                down.join(", "),
                name(),
                down[0]
            )));
        }
        Ok(())
    }

    async fn follow(&self, client: &Client, select: &Select) -> Outcome {
        let mut table = Table::default();
        // What was last told of each: times that pass are no change.
        let mut told: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        let essence = |cluster: &Value| {
            let status = &cluster["status"];
            let mut parts: Vec<Value> = ["Connected", "CertificateCurrent", "AgentOutdated"]
                .iter()
                .map(|kind| condition(cluster, kind)["reason"].clone())
                .collect();
            parts.extend(
                ["sessions", "transport", "agentVersion", "since"].map(|field| status[field].clone()),
            );
            parts
        };
        show::follow(client, "clusters", select, false, |seen| match seen {
            Seen::List(list) => {
                told = items(list)
                    .iter()
                    .map(|cluster| (text(&cluster["metadata"]["name"]), essence(cluster)))
                    .collect();
                self.print(list, &mut table)
            }
            Seen::Event(event) => {
                let cluster = &event["object"];
                let name = text(&cluster["metadata"]["name"]);
                if event["type"] == "DELETED" {
                    told.remove(&name);
                    output::note(&format!("{name} was deleted"));
                    return Ok(());
                }
                let now = essence(cluster);
                if told.get(&name) == Some(&now) {
                    return Ok(());
                }
                told.insert(name, now);
                match self.output.output {
                    Format::Table | Format::Wide => {
                        output::bytes(table.lines(&[self.row(cluster)]).as_bytes())
                    }
                    format => output::object(format, cluster),
                }
            }
        })
        .await
    }

    fn print(&self, list: &Value, table: &mut Table) -> Outcome {
        let mut clusters = items(list).to_vec();
        clusters.sort_by_key(|cluster| (Health::of(cluster), text(&cluster["metadata"]["name"])));
        match self.output.output {
            Format::Table | Format::Wide if clusters.is_empty() => {}
            Format::Table | Format::Wide => {
                let wide = self.output.output == Format::Wide;
                let headings =
                    ["NAME", "CONNECTED", "SINCE", "TRANSPORT", "SESSIONS", "AGENT", "CERTIFICATE", "WHY"];
                let mut headings: Vec<String> = headings.map(ToOwned::to_owned).to_vec();
                if wide {
                    headings.splice(7..7, ["KUBERNETES", "MODE", "ACCOUNT"].map(ToOwned::to_owned));
                }
                let rows: Vec<_> = std::iter::once(headings)
                    .chain(clusters.iter().map(|cluster| self.row(cluster)))
                    .collect();
                output::bytes(table.lines(&rows).as_bytes())?;
            }
            format => {
                let mut sorted = list.clone();
                sorted["items"] = clusters.clone().into();
                output::object(format, &sorted)?;
            }
        }
        output::note(&summary(&clusters));
        Ok(())
    }

    fn row(&self, cluster: &Value) -> Vec<String> {
        let status = &cluster["status"];
        let connected = condition(cluster, "Connected");
        let health = Health::of(cluster);
        let up = health != Health::Down;
        let since = if up { &status["since"] } else { &connected["lastTransitionTime"] };
        let or_dash = |value: &Value| match text(value) {
            empty if empty.is_empty() => "-".to_owned(),
            text => text,
        };
        let why = health.reason().map(|kind| condition(cluster, kind));
        let why = why.map(|why| format!("{}: {}", text(&why["reason"]), text(&why["message"])));
        let certificate = &status["certificateExpires"];
        let mut row = vec![
            text(&cluster["metadata"]["name"]),
            if up { "yes" } else { "no" }.to_owned(),
            ago(since),
            or_dash(&status["transport"]),
            or_dash(&status["sessions"]),
            or_dash(&status["agentVersion"]),
            if certificate.is_string() { until(certificate) } else { "-".to_owned() },
            why.unwrap_or_default(),
        ];
        if self.output.output == Format::Wide {
            let wide = [&status["kubernetesVersion"], &cluster["spec"]["mode"], &cluster["spec"]["account"]];
            row.splice(7..7, wide.map(or_dash));
        }
        row
    }
}

fn items(list: &Value) -> &[Value] {
    list["items"].as_array().map_or(&[], Vec::as_slice)
}

fn summary(clusters: &[Value]) -> String {
    let of = |health: Health| clusters.iter().filter(|cluster| Health::of(cluster) == health).count();
    let total = clusters.len().try_into().unwrap_or(u64::MAX);
    if total == 0 {
        return format!("no clusters. Register one: {} cluster register NAME", name());
    }
    let down = of(Health::Down);
    let mut text =
        format!("{}: {} connected, {down} not", show::count(total, "cluster"), clusters.len() - down);
    for (health, words) in [
        (Health::Overdue, "with a certificate that was not renewed"),
        (Health::Outdated, "with an agent to upgrade"),
    ] {
        match of(health) {
            0 => {}
            many => text.push_str(&format!("; {many} {words}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster(name: &str, connected: &str, certificate: &str, outdated: &str) -> Value {
        let one = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R", "message": format!("m-{kind}"), "lastTransitionTime": "2026-01-01T00:00:00Z"});
        json!({"metadata": {"name": name}, "status": {"conditions": [
            one("Connected", connected), one("CertificateCurrent", certificate), one("AgentOutdated", outdated),
        ]}})
    }

    #[test]
    fn what_is_broken_comes_first_and_says_why() {
        let mut clusters = vec![
            cluster("a", "True", "True", "False"),
            cluster("b", "True", "Unknown", "True"),
            cluster("c", "True", "False", "False"),
            cluster("d", "False", "True", "False"),
        ];
        clusters.sort_by_key(Health::of);
        let names: Vec<_> = clusters.iter().map(|cluster| text(&cluster["metadata"]["name"])).collect();
        assert_eq!(names, ["d", "c", "b", "a"]);
        let status = Status {
            selector: String::new(),
            watch: false,
            check: false,
            output: Output { output: Format::Table },
        };
        let why: Vec<_> = clusters.iter().map(|cluster| status.row(cluster)[7].clone()).collect();
        assert_eq!(why, ["R: m-Connected", "R: m-CertificateCurrent", "R: m-AgentOutdated", ""]);
        let said = summary(&clusters);
        assert!(
            said.starts_with("4 clusters: 3 connected, 1 not; 1 with a certificate")
                && said.ends_with("to upgrade"),
            "{said}"
        );
    }
}
