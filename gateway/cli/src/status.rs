//! `towline status`: one line for each cluster, problems first.

use super::client::{Client, Select};
use super::connection::{ConnectionArguments, name};
use super::failure::{Failure, Outcome};
use super::output::{self, Colour, Format, Output, Screen, Table, text};
use super::show::{self, Seen, ago, condition, or_none, relative, until};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use towline_model::Time;

const EXAMPLES: &str = "Examples:
  towline status
  towline status -w -l tier=gold
  towline status --check || page-somebody
";

/// Show which clusters are connected, and why one is not: one line each, problems first.
#[derive(Debug, Args)]
#[command(before_help = EXAMPLES)]
pub(crate) struct Status {
    /// Label selector: show only matching clusters.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    selector: String,
    /// Keep running and print a line for each change.
    #[arg(short, long, conflicts_with = "check")]
    watch: bool,
    /// Exit with code 1 if a cluster has a problem. A cluster that no agent has joined yet is not a problem, nor is an agent that is
    /// only older than the gateway. Without this option the exit code only tells whether the gateway could be reached.
    #[arg(long)]
    check: bool,
    /// Do not colour the output, as with $NO_COLOR.
    #[arg(long)]
    no_color: bool,
    #[command(flatten)]
    output: Output,
}

/// The health of a cluster, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Down,
    /// Connected, and no agent can use the API server.
    Unusable,
    Overdue,
    /// Connected, but agents that restart may not be able to rejoin.
    Unissued,
    Outdated,
    /// Registered, and no agent has joined yet.
    Pending,
    Well,
}

impl Health {
    fn of(cluster: &Value) -> Self {
        let is = |kind: &str, status: &str| condition(cluster, kind)["status"] == status;
        if !is("Connected", "True") {
            let joined = condition(cluster, "Joined");
            let is_pending = joined["status"] == "False" && joined["reason"] == "Pending";
            if is_pending && !is("JoinRefused", "True") { Self::Pending } else { Self::Down }
        } else if is("APIServerReachable", "False") {
            Self::Unusable
        } else if is("CertificateCurrent", "False") {
            Self::Overdue
        } else if is("IssuerCurrent", "False") {
            Self::Unissued
        } else if is("AgentOutdated", "True") {
            Self::Outdated
        } else {
            Self::Well
        }
    }

    const fn is_connected(self) -> bool {
        !matches!(self, Self::Down | Self::Pending)
    }

    /// The connection state as a word and a colour.
    const fn word(self) -> (&'static str, Colour) {
        match self {
            Self::Down => ("no", Colour::Red),
            Self::Pending => ("never", Colour::Yellow),
            Self::Unusable => ("yes", Colour::Red),
            Self::Overdue | Self::Unissued | Self::Outdated => ("yes", Colour::Yellow),
            Self::Well => ("yes", Colour::Green),
        }
    }

    /// The condition that says why.
    fn reason(self, cluster: &Value) -> Option<&'static str> {
        match self {
            Self::Down => Some(why_down(cluster)),
            Self::Unusable => Some("APIServerReachable"),
            Self::Pending => Some("Joined"),
            Self::Overdue => Some("CertificateCurrent"),
            Self::Unissued => Some("IssuerCurrent"),
            Self::Outdated => Some("AgentOutdated"),
            Self::Well => None,
        }
    }
}

/// The most important condition of a cluster that is not connected: a refused agent or the revocation of all, whichever was
/// later; then that no agent has joined; then the end of the last session.
fn why_down(cluster: &Value) -> &'static str {
    let when = |kind: &str| {
        let condition = condition(cluster, kind);
        (condition["status"] == "True").then(|| text(&condition["lastTransitionTime"]))
    };
    match (when("Revoked"), when("JoinRefused")) {
        (Some(revoked), Some(refused)) if refused >= revoked => "JoinRefused",
        (Some(_), _) => "Revoked",
        (None, Some(_)) => "JoinRefused",
        (None, None) if condition(cluster, "Joined")["status"] == "False" => "Joined",
        (None, None) => "Connected",
    }
}

/// The reason for a cluster's health, `NoSession: ...`, with the time if the table does not show it: `Revoked 2s ago: ...`.
fn why(cluster: &Value) -> String {
    let Some(kind) = Health::of(cluster).reason(cluster) else { return String::new() };
    let condition = condition(cluster, kind);
    let when = match kind {
        "Revoked" | "JoinRefused" => format!(" {} ago", ago(&condition["lastTransitionTime"])),
        _ => String::new(),
    };
    format!("{}{when}: {}", text(&condition["reason"]), relative(&text(&condition["message"])))
}

impl Status {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let client = Client::new(connection)?;
        let select = Select { labels: self.selector.clone(), name: None };
        if self.watch {
            return self.follow(&client, &select).await;
        }
        let list = client.list("clusters", &select).await?;
        self.print(&list, &mut Table::on(self.screen()))?;
        match failing(items(&list)) {
            Some(failing) if self.check => Err(Failure::failed(failing)),
            _ => Ok(()),
        }
    }

    /// With -o wide nothing is cut off, whatever the terminal's width.
    fn screen(&self) -> Screen {
        let screen = Screen::of_stdout(self.no_color);
        if self.output.output == Format::Wide { Screen { width: None, ..screen } } else { screen }
    }

    async fn follow(&self, client: &Client, select: &Select) -> Outcome {
        let mut table = Table::on(self.screen());
        // The last printed state of each cluster: passing time is not a change.
        let mut told: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        let essence = |cluster: &Value| {
            let status = &cluster["status"];
            let mut parts: Vec<Value> =
                ["Connected", "APIServerReachable", "CertificateCurrent", "IssuerCurrent", "AgentOutdated"]
                    .iter()
                    .map(|kind| condition(cluster, kind)["reason"].clone())
                    .collect();
            let health = Health::of(cluster);
            if !health.is_connected() {
                let why = health.reason(cluster).map(|kind| condition(cluster, kind));
                parts.extend(why.map(|why| json!([why["reason"], why["message"]])));
            }
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
        let mut is_told = false;
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
                if self.watch {
                    headings.insert(0, "TIME".to_owned());
                }
                // A long table is read from its end; the problems, which come first, have scrolled away by then.
                if table.is_longer_than_screen(clusters.len() + 2) {
                    output::note(&summary(&clusters));
                    is_told = true;
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
        if !is_told {
            output::note(&summary(&clusters));
        }
        Ok(())
    }

    fn row(&self, cluster: &Value) -> Vec<String> {
        let status = &cluster["status"];
        let connected = condition(cluster, "Connected");
        let health = Health::of(cluster);
        let up = health.is_connected();
        let since = if up { &status["since"] } else { &connected["lastTransitionTime"] };
        let (word, colour) = health.word();
        let certificate = &status["certificateExpires"];
        let mut row = vec![
            text(&cluster["metadata"]["name"]),
            self.screen().paint(word, colour),
            ago(since),
            or_none(&status["transport"]),
            or_none(&status["sessions"]),
            or_none(&status["agentVersion"]),
            until(certificate),
            why(cluster),
        ];
        if self.output.output == Format::Wide {
            let wide = [&status["kubernetesVersion"], &cluster["spec"]["mode"], &cluster["spec"]["account"]];
            row.splice(7..7, wide.map(or_none));
        }
        if self.watch {
            // Only the time of day: a watching user knows the date.
            let now = Time::now().to_string();
            row.insert(0, now.split_once('T').map_or(&*now, |(_, time)| time).to_owned());
        }
        row
    }
}

fn items(list: &Value) -> &[Value] {
    list["items"].as_array().map_or(&[], Vec::as_slice)
}

/// The phrase for clusters with this health; `None` for healthy ones.
const fn words(health: Health) -> &'static str {
    match health {
        Health::Down => "not connected",
        Health::Unusable => "with an unusable API server",
        Health::Overdue => "with an overdue certificate renewal",
        Health::Unissued => "with unverified issuer keys",
        Health::Outdated => "with an agent to upgrade",
        Health::Pending => "never joined",
        Health::Well => "",
    }
}

/// The problems for which `--check` fails: those that need action soon. Not clusters that only wait for their first agent, and not agents
/// older than the gateway: they work, and after each upgrade of the gateway all of them are.
fn failing(clusters: &[Value]) -> Option<String> {
    let mut parts = Vec::new();
    let mut first = None;
    for health in [Health::Down, Health::Unusable, Health::Overdue, Health::Unissued] {
        let what = words(health);
        let names: Vec<String> = clusters
            .iter()
            .filter(|cluster| Health::of(cluster) == health)
            .map(|cluster| text(&cluster["metadata"]["name"]))
            .collect();
        if names.is_empty() {
            continue;
        }
        let many = names.len().try_into().unwrap_or(u64::MAX);
        parts.push(format!("{} {what}: {}", show::count(many, "cluster"), names.join(", ")));
        first = first.or_else(|| names.into_iter().next());
    }
    Some(format!("{}. Why: {} cluster describe {}", parts.join("; "), name(), first?))
}

fn summary(clusters: &[Value]) -> String {
    let of = |health: Health| clusters.iter().filter(|cluster| Health::of(cluster) == health).count();
    let total = clusters.len().try_into().unwrap_or(u64::MAX);
    if total == 0 {
        return format!("no clusters. Register one: {} cluster register NAME", name());
    }
    let (down, connected) =
        (of(Health::Down), clusters.iter().filter(|cluster| Health::of(cluster).is_connected()));
    let mut text = format!("{}: {} connected, {down} not", show::count(total, "cluster"), connected.count());
    for health in [Health::Unusable, Health::Pending, Health::Overdue, Health::Unissued, Health::Outdated] {
        match of(health) {
            0 => {}
            many => text.push_str(&format!("; {many} {}", words(health))),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unusable(name: &str) -> Value {
        let mut cluster = cluster(name, "True", "True", "False");
        let unusable = json!({"type": "APIServerReachable", "status": "False", "reason": "Refused", "message": "nothing listens"});
        cluster["status"]["conditions"].as_array_mut().unwrap().push(unusable);
        cluster
    }

    /// D4, K3: a connected but unusable cluster shows the reason and fails the check; one whose agent has not reported does not.
    #[test]
    fn k3_a_cluster_without_an_api_server_fails_the_check() {
        let well = cluster("a", "True", "True", "False");
        assert_eq!(failing(std::slice::from_ref(&well)), None);
        let said = failing(&[well.clone(), unusable("b"), cluster("c", "False", "True", "False")]).unwrap();
        assert!(
            said.starts_with("1 cluster not connected: c; 1 cluster with an unusable API server: b. Why: ")
                && said.ends_with("describe c"),
            "{said}"
        );
        let status = Status {
            selector: String::new(),
            watch: false,
            check: true,
            no_color: true,
            output: Output { output: Format::Table },
        };
        let row = status.row(&unusable("b"));
        assert_eq!((&*row[1], &*row[7]), ("yes", "Refused: nothing listens"));
        assert!(Health::of(&unusable("b")) < Health::of(&well));
        assert!(
            summary(&[unusable("b")]).contains("1 connected, 0 not; 1 with an unusable API server"),
            "{}",
            summary(&[unusable("b")])
        );
    }

    /// Goal: D5, S5: a check fails for problems that need action, and not for a cluster that waits for its first agent or can be upgraded.
    #[test]
    fn d5_a_check_fails_for_problems_that_need_action() {
        let with = |kind: &str, status: &str, reason: &str| {
            let mut cluster = cluster("a", if kind == "Joined" { "False" } else { "True" }, "True", "False");
            let more = json!({"type": kind, "status": status, "reason": reason, "message": "m"});
            let conditions = cluster["status"]["conditions"].as_array_mut().unwrap();
            conditions.retain(|condition| condition["type"] != kind);
            conditions.push(more);
            cluster
        };
        for (kind, status, what) in [
            ("Connected", "False", "1 cluster not connected: a"),
            ("APIServerReachable", "False", "1 cluster with an unusable API server: a"),
            ("CertificateCurrent", "False", "1 cluster with an overdue certificate renewal: a"),
            ("IssuerCurrent", "False", "1 cluster with unverified issuer keys: a"),
        ] {
            let said = failing(&[with(kind, status, "R")]).unwrap_or_default();
            assert!(said.starts_with(what), "{kind}: {said}");
            assert!(why(&with(kind, status, "R")).starts_with("R: m"), "{kind}");
        }
        for (kind, status, reason) in [
            ("Joined", "False", "Pending"),
            ("IssuerCurrent", "Unknown", "NotTold"),
            ("APIServerReachable", "Unknown", "R"),
        ] {
            assert_eq!(failing(&[with(kind, status, reason)]), None, "{kind}");
        }
    }

    fn cluster(name: &str, connected: &str, certificate: &str, outdated: &str) -> Value {
        let one = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R", "message": format!("m-{kind}"), "lastTransitionTime": "2026-01-01T00:00:00Z"});
        json!({"metadata": {"name": name}, "status": {"conditions": [
            one("Connected", connected), one("CertificateCurrent", certificate), one("AgentOutdated", outdated),
        ]}})
    }

    /// D5: the most important reason is shown with its time; a cluster that no agent has joined is not down.
    #[test]
    fn d5_the_most_telling_reason_is_said() {
        let ago =
            |seconds| Time::from(std::time::SystemTime::now() - std::time::Duration::from_secs(seconds));
        let one = |kind: &str, status: &str, reason: &str, message: &str, seconds: u64| json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": ago(seconds)});
        let of = |more: &[Value]| {
            let mut conditions = vec![one("Connected", "False", "NoSession", "the last session ended", 60)];
            conditions.extend_from_slice(more);
            json!({"metadata": {"name": "prod"}, "status": {"conditions": conditions}})
        };
        let said = |more: &[Value]| {
            let cluster = of(more);
            (Health::of(&cluster), why(&cluster))
        };
        let joined = one("Joined", "True", "AgentOnRecord", "", 90);
        let gone = |reason: &str, message: &str| one("Joined", "False", reason, message, 90);
        let refused = |status: &str, seconds| one("JoinRefused", status, "JoinRefused", "too late", seconds);
        let revoked = one("Revoked", "True", "Revoked", "towline token create prod", 30);
        let ends = Time::now().after(std::time::Duration::from_secs(48 * 60 + 30));
        let pending =
            gone("Pending", &format!("no agent has joined yet; token a is unused and expires {ends}"));
        assert_eq!(
            said(std::slice::from_ref(&joined)),
            (Health::Down, "NoSession: the last session ended".to_owned())
        );
        let (health, text) = said(&[joined.clone(), refused("True", 3)]);
        assert!(health == Health::Down && text.starts_with("JoinRefused 3s ago: too late"), "{text}");
        assert!(said(&[joined, refused("False", 3)]).1.starts_with("NoSession"));
        let anew = gone("Revoked", "");
        let (_, text) = said(&[anew.clone(), revoked.clone(), refused("True", 40)]);
        assert_eq!(text, "Revoked 30s ago: towline token create prod");
        assert!(said(&[anew, revoked, refused("True", 3)]).1.starts_with("JoinRefused"), "the later one");
        assert!(said(&[gone("JoinAnew", "m")]) == (Health::Down, "JoinAnew: m".to_owned()));
        let (health, text) = said(std::slice::from_ref(&pending));
        assert!(
            health == Health::Pending
                && text.starts_with("Pending: no agent has joined yet; token a is unused and expires in 48m"),
            "{text}"
        );
        assert_eq!(said(&[pending, refused("True", 3)]).0, Health::Down);
    }

    /// Goal: D28, D29: a cluster that no agent has joined looks different from a lost one, watched lines have a time, and there is one word for
    /// nothing, kubectl's.
    #[test]
    fn d28_a_line_tells_what_it_is() {
        let pending = json!({"metadata": {"name": "p"}, "status": {"conditions": [
            {"type": "Connected", "status": "False"}, {"type": "Joined", "status": "False", "reason": "Pending"},
        ]}});
        let mut status = Status {
            selector: String::new(),
            watch: false,
            check: false,
            no_color: true,
            output: Output { output: Format::Table },
        };
        let row = status.row(&pending);
        assert_eq!((&*row[1], &*row[3], &*row[6]), ("never", "<none>", "<none>"));
        assert_eq!(status.row(&cluster("d", "False", "True", "False"))[1], "no");
        status.watch = true;
        let row = status.row(&pending);
        assert!(row[0].len() == 9 && row[0].ends_with('Z') && row[1] == "p", "{row:?}");
    }

    #[test]
    fn problems_come_first_with_their_reason() {
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
            no_color: true,
            output: Output { output: Format::Table },
        };
        let why: Vec<_> = clusters.iter().map(|cluster| status.row(cluster)[7].clone()).collect();
        assert_eq!(why, ["R: m-Connected", "R: m-CertificateCurrent", "R: m-AgentOutdated", ""]);
        let said = summary(&clusters);
        assert!(
            said.starts_with("4 clusters: 3 connected, 1 not; 1 with an overdue certificate")
                && said.ends_with("to upgrade"),
            "{said}"
        );
    }
}
