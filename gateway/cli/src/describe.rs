//! `towline cluster describe`: everything that the API knows about a cluster, for finding out what is wrong.

use super::client::{Client, Select};
use super::failure::Outcome;
use super::output::{self, Table, text};
use super::show::{self, ago, or_none, relative, until};
use serde_json::Value;
use std::fmt::Write as _;

pub(crate) async fn cluster(client: &Client, name: &str) -> Outcome {
    let cluster = show::find(client, "clusters", name).await?;
    let tokens = tokens_of(client, name).await?;
    let revocations = client.list("revocations", &Select::default()).await?;
    let revocations = revocations["items"].as_array().cloned().unwrap_or_default();
    let revoked = revocations.iter().find(|item| item["spec"]["cluster"]["name"] == name);
    output::bytes(page(&cluster, &tokens, revoked).as_bytes())
}

fn page(cluster: &Value, tokens: &[Value], revoked: Option<&Value>) -> String {
    let (spec, status, metadata) = (&cluster["spec"], &cluster["status"], &cluster["metadata"]);
    let mut page = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a text cannot fail.
        writeln!(page, "{:<20}{value}", format!("{name}:")).ok();
    };
    line("Name", text(&metadata["name"]));
    line("UID", or_none(&status["uid"]));
    line("Source", or_none(&status["source"]));
    line("Mode", or_none(&spec["mode"]));
    line("Account", or_none(&spec["account"]));
    line("Description", or_none(&spec["description"]));
    let labels = metadata["labels"].as_object();
    let labels: Vec<_> =
        labels.into_iter().flatten().map(|(key, value)| format!("{key}={}", text(value))).collect();
    line("Labels", if labels.is_empty() { "<none>".to_owned() } else { labels.join(", ") });
    line("Protected", if spec["deletionProtection"] == true { "yes" } else { "no" }.to_owned());
    line("Registered", moment(&metadata["creationTimestamp"]));
    let connected = show::condition(cluster, "Connected");
    let state = match connected["status"].as_str() {
        Some("True") => format!("yes, since {}", moment(&status["since"])),
        _ => format!("no, since {}", moment(&connected["lastTransitionTime"])),
    };
    line("Connected", state);
    if status["lastSeen"].is_string() {
        line("Last seen", moment(&status["lastSeen"]));
    }
    let sessions = status["sessions"].as_u64().unwrap_or(0);
    let over = status["transport"].as_str().map(|transport| format!(" over {transport}")).unwrap_or_default();
    line("Sessions", format!("{sessions}{over}"));
    let most =
        spec["maxAgents"].as_u64().map(|most| format!(" on record, {most} at most")).unwrap_or_default();
    line("Agents", format!("{}{most}", status["agents"].as_u64().unwrap_or(0)));
    line("Agent version", or_none(&status["agentVersion"]));
    line("Kubernetes version", or_none(&status["kubernetesVersion"]));
    let certificate = match status["certificateExpires"].as_str() {
        Some(_) => format!("the newest expires {}", when(&status["certificateExpires"])),
        None => "<none>".to_owned(),
    };
    line("Certificate", certificate);
    if let Some(revoked) = revoked {
        line("Revoked", moment(&revoked["metadata"]["creationTimestamp"]));
    }
    page.push_str("Conditions:\n");
    let mut rows = vec![cells(&["  TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"])];
    for condition in status["conditions"].as_array().into_iter().flatten() {
        rows.push(vec![
            format!("  {}", text(&condition["type"])),
            text(&condition["status"]),
            ago(&condition["lastTransitionTime"]),
            text(&condition["reason"]),
            relative(&text(&condition["message"])),
        ]);
    }
    page.push_str(&Table::default().lines(&rows));
    page.push_str(&agents(status));
    if tokens.is_empty() {
        page.push_str("Join tokens:  <none>\n");
        return page;
    }
    page.push_str("Join tokens:\n");
    let mut rows = vec![cells(&["  NAME", "USED", "USES", "EXPIRES", "LET IN"])];
    for token in tokens {
        let instances: Vec<_> =
            token["status"]["instances"].as_array().into_iter().flatten().map(text).collect();
        rows.push(vec![
            format!("  {}", text(&token["metadata"]["name"])),
            text(&token["status"]["used"]),
            text(&token["spec"]["uses"]),
            until(&token["status"]["expires"]),
            if instances.is_empty() { "<nobody>".to_owned() } else { instances.join(", ") },
        ]);
    }
    page.push_str(&Table::default().lines(&rows));
    page
}

/// Each agent: a line for each of its sessions, or one that says that it has none.
fn agents(status: &Value) -> String {
    let instances = status["instances"].as_array().map_or(&[][..], Vec::as_slice);
    if instances.is_empty() {
        return String::new();
    }
    let mut rows =
        vec![cells(&["  INSTANCE", "ADDRESS", "TRANSPORT", "VERSION", "CONNECTED", "CERTIFICATE"])];
    for instance in instances {
        let ends = &instance["certificateExpires"];
        let none = [Value::Null];
        let sessions = instance["sessions"].as_array().filter(|sessions| !sessions.is_empty());
        let sessions = sessions.map_or(&none[..], Vec::as_slice);
        for session in sessions {
            let since = &session["since"];
            rows.push(vec![
                format!("  {}", text(&instance["name"])),
                or_none(&session["address"]),
                or_none(&session["transport"]),
                or_none(&session["version"]),
                if since.is_string() { format!("for {}", ago(since)) } else { "no".to_owned() },
                until(ends),
            ]);
        }
    }
    format!("Instances:\n{}", Table::default().lines(&rows))
}

fn cells(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// `2026-01-02T03:04:05Z (3h 12m ago)`.
fn moment(time: &Value) -> String {
    format!("{} ({} ago)", text(time), ago(time))
}

fn when(time: &Value) -> String {
    format!("{} ({})", text(time), until(time))
}

/// The join tokens of a cluster.
pub(crate) async fn tokens_of(client: &Client, cluster: &str) -> Outcome<Vec<Value>> {
    let mut list = client.list("jointokens", &Select::default()).await?;
    let tokens = list["items"].as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok(tokens.into_iter().filter(|token| token["spec"]["cluster"] == cluster).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: D31: each agent is shown with address, transport, start and expiry of its certificate, also a disconnected one.
    #[test]
    fn d31_each_agent_is_shown() {
        let session = json!({"address": "203.0.113.7:4000", "transport": "quic", "version": "0.1.0",
            "since": "2026-01-01T00:00:00Z"});
        let status = json!({"instances": [
            {"name": "a1", "certificateExpires": "2026-01-01T00:00:00Z", "sessions": [session]},
            {"name": "a2", "sessions": []},
        ]});
        let text = agents(&status);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("INSTANCE") && lines[1].contains("CERTIFICATE"), "{text}");
        for part in ["a1", "203.0.113.7:4000", "quic", "0.1.0", "for ", " ago"] {
            assert!(lines[2].contains(part), "{part}: {text}");
        }
        assert!(lines[3].contains("a2") && lines[3].contains("no") && lines[3].contains("<none>"), "{text}");
    }
}
