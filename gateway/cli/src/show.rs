//! Prints objects once or while they change, as the server's table or as objects, and suggests names after a typing mistake.

use super::client::{Client, Select};
use super::failure::{Failure, Outcome};
use super::output::{self, Format, Table};
use serde_json::Value;
use std::time::Duration;
use towline_certs::text::human;
use towline_model::Time;

const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// An event for a follower.
pub(crate) enum Seen<'a> {
    /// The complete list, at the start and whenever the watch was lost.
    List(&'a Value),
    /// `ADDED`, `MODIFIED` or `DELETED`, with an object or a table.
    Event(&'a Value),
}

/// Lists the selected objects and reports every change from then on, until a permanent failure.
pub(crate) async fn follow(
    client: &Client,
    plural: &str,
    select: &Select,
    table: bool,
    mut each: impl FnMut(Seen<'_>) -> Outcome,
) -> Outcome {
    let mut pause = PAUSE_MIN;
    // Report an unreachable gateway at once at the start; later it may be restarting.
    let mut list = listed(client, plural, select, table).await?;
    loop {
        each(Seen::List(&list))?;
        let mut version = output::text(&list["metadata"]["resourceVersion"]);
        loop {
            let lost = match client.watch(plural, select, &version, table).await {
                Ok(mut watch) => loop {
                    match watch.next().await {
                        Ok(Some(event)) => {
                            pause = PAUSE_MIN;
                            if let Some(next) = version_of(&event["object"]) {
                                version = next;
                            }
                            if event["type"] != "BOOKMARK" {
                                each(Seen::Event(&event))?;
                            }
                        }
                        Ok(None) => break None,
                        Err(failure) => break Some(failure),
                    }
                },
                Err(failure) => Some(failure),
            };
            match lost {
                None => {}
                // The gateway has restarted, so its versions have changed.
                Some(Failure::Refused(refusal)) if refusal.status == 410 => break,
                Some(Failure::Refused(refusal)) if refusal.status >= 500 => {}
                Some(Failure::Failed(text)) => output::note(&format!("{text}\n(retrying)")),
                Some(failure) => return Err(failure),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        list = loop {
            match listed(client, plural, select, table).await {
                Ok(list) => break list,
                Err(Failure::Failed(text)) => output::note(&format!("{text}\n(retrying)")),
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        };
    }
}

async fn listed(client: &Client, plural: &str, select: &Select, table: bool) -> Outcome<Value> {
    if table { client.table(plural, select).await } else { client.list(plural, select).await }
}

/// The version of an object, or of the one in a table.
fn version_of(object: &Value) -> Option<String> {
    let places = ["/metadata/resourceVersion", "/rows/0/object/metadata/resourceVersion"];
    let texts = places.iter().filter_map(|place| object.pointer(place)?.as_str());
    texts.filter(|text| !text.is_empty()).map(ToOwned::to_owned).next()
}

/// Prints the selected objects for which `keep` is true, once or while they change. Prints `none` if there are none.
pub(crate) async fn print(
    client: &Client,
    plural: &str,
    select: &Select,
    how: (Format, bool),
    keep: impl Fn(&Value) -> bool,
    none: &str,
) -> Outcome {
    let (format, watch) = how;
    let as_table = matches!(format, Format::Table | Format::Wide);
    let mut table = Table::default();
    let mut print = |seen: Seen<'_>| {
        let (content, first) = match seen {
            Seen::List(list) => (list, true),
            Seen::Event(event) => (&event["object"], false),
        };
        let mut content = content.clone();
        let (part, inner) = if as_table { ("rows", "/object") } else { ("items", "") };
        if let Some(parts) = content[part].as_array_mut() {
            parts.retain(|part| part.pointer(inner).is_some_and(&keep));
            if parts.is_empty() && first {
                output::note(none);
            }
            // An empty list is useful only to programs.
            if parts.is_empty() && !matches!(format, Format::Json | Format::Yaml) {
                return Ok(());
            }
        } else if !keep(&content) {
            return Ok(());
        }
        if as_table {
            let rows = output::rows(&content, format == Format::Wide, first);
            output::bytes(table.lines(&rows).as_bytes())
        } else if format == Format::Yaml && watch {
            output::bytes(b"---\n")?;
            output::object(format, &content)
        } else {
            output::object(format, &content)
        }
    };
    if watch {
        return follow(client, plural, select, as_table, print).await;
    }
    print(Seen::List(&listed(client, plural, select, as_table).await?))
}

/// The name of a cluster, also as `-o name` prints it.
pub(crate) fn cluster_name(text: &str) -> Result<String, std::convert::Infallible> {
    Ok(plain(text, "cluster"))
}

/// The name of a join token, also as `-o name` prints it.
pub(crate) fn token_name(text: &str) -> Result<String, std::convert::Infallible> {
    Ok(plain(text, "jointoken"))
}

/// Without `cluster.towline.io/`, `cluster/` or `clusters/` in front: a name has no slash.
fn plain(text: &str, kind: &str) -> String {
    let Some((before, name)) = text.split_once('/') else { return text.to_owned() };
    let word = before.strip_suffix(".towline.io").unwrap_or(before);
    let is_kind = word == kind || word.strip_suffix('s') == Some(kind);
    if is_kind { name.to_owned() } else { text.to_owned() }
}

/// One object; the error for an unknown name suggests similar names.
pub(crate) async fn find(client: &Client, plural: &str, name: &str) -> Outcome<Value> {
    match client.get(plural, name).await {
        Err(failure) if failure.is_not_found() => Err(unknown(client, plural, name).await),
        other => other,
    }
}

async fn unknown(client: &Client, plural: &str, name: &str) -> Failure {
    let word = if plural == "clusters" { "cluster" } else { "token" };
    let list = client.list(plural, &Select::default()).await.unwrap_or_default();
    let names: Vec<&str> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item["metadata"]["name"].as_str())
        .collect();
    let alike = nearest(name, &names);
    let next = if alike.is_empty() {
        format!("List them: {} {word} list", super::connection::name())
    } else {
        format!("Did you mean {}? List them: {} {word} list", alike.join(", "), super::connection::name())
    };
    Failure::failed(format!("no {word} {name:?} found. {next}"))
}

/// Up to three names that differ in two letters (a swap counts as two) or a third of them, or have the same beginning; nearest first.
fn nearest<'a>(name: &str, names: &[&'a str]) -> Vec<&'a str> {
    let letters = name.chars().count();
    let most = letters.div_ceil(3).max(2).min(letters.saturating_sub(1));
    let mut alike: Vec<(usize, &str)> = names
        .iter()
        .map(|known| (distance(name, known), *known))
        .filter(|(distance, known)| *distance <= most || (name.len() > 1 && known.starts_with(name)))
        .collect();
    alike.sort_unstable();
    alike.into_iter().take(3).map(|(_, known)| known).collect()
}

/// Letters to change, add or remove (Levenshtein distance).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.chars().enumerate() {
        let mut before = row[0];
        row[0] = index + 1;
        for (column, wanted) in other.iter().enumerate() {
            let replaced = before + usize::from(letter != *wanted);
            before = row[column + 1];
            row[column + 1] = replaced.min(before + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

/// `3h 12m` since a time; `<unknown>` if it is not a time.
pub(crate) fn ago(time: &Value) -> String {
    parsed(time).map_or_else(|| "<unknown>".to_owned(), |time| human(Time::now().since(time)))
}

/// `in 3h 12m`, or `3h 12m ago`.
pub(crate) fn until(time: &Value) -> String {
    let now = Time::now();
    match parsed(time) {
        None => "<none>".to_owned(),
        Some(time) if time > now => format!("in {}", human(time.since(now))),
        Some(time) => format!("{} ago", human(now.since(time))),
    }
}

/// Replaces timestamps in a text by times relative to now: `expires in 48m`.
pub(crate) fn relative(text: &str) -> String {
    let told = |word: &str| {
        let (time, rest) = word.split_at(word.find(',').or_else(|| word.find(';')).unwrap_or(word.len()));
        let is_moment = time.contains('T') && time.ends_with('Z') && Time::parse(time).is_some();
        if is_moment { until(&time.into()) + rest } else { word.to_owned() }
    };
    text.split(' ').map(told).collect::<Vec<_>>().join(" ")
}

/// A value as a cell: `<none>` if there is none, like kubectl.
pub(crate) fn or_none(value: &Value) -> String {
    match output::text(value) {
        empty if empty.is_empty() => "<none>".to_owned(),
        text => text,
    }
}

fn parsed(time: &Value) -> Option<Time> {
    Time::parse(time.as_str()?)
}

/// A condition of an object.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

/// `1 agent`, `2 agents`.
pub(crate) fn count(number: u64, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_times_are_counted_from_now() {
        let later = Time::now().after(Duration::from_secs(3630));
        assert_eq!(
            relative(&format!("token t-Z; ends {later}; and more")),
            "token t-Z; ends in 1h; and more"
        );
        assert_eq!(relative("a  b Z 2026-01-01"), "a  b Z 2026-01-01");
    }

    /// Goal: D30: every name argument accepts the form that `-o name` prints, as in kubectl.
    #[test]
    fn d30_printed_names_are_taken() {
        for text in
            ["prod", "cluster.towline.io/prod", "cluster/prod", "clusters/prod", "clusters.towline.io/prod"]
        {
            assert_eq!(cluster_name(text), Ok("prod".to_owned()), "{text}");
        }
        assert_eq!(token_name("jointoken.towline.io/t1"), Ok("t1".to_owned()));
        for text in ["jointoken/t", "pod/x", "cluster.example.com/x"] {
            assert_eq!(cluster_name(text), Ok(text.to_owned()));
        }
    }

    #[test]
    fn names_that_are_alike_are_found() {
        let names = ["prod", "prod-eu", "staging", "test"];
        assert_eq!(nearest("prdo", &names), ["prod"]);
        assert_eq!(nearest("pr", &names), ["prod", "prod-eu"]);
        assert_eq!(nearest("stagin", &names), ["staging"]);
        assert_eq!(nearest("etst", &names), ["test"]);
        assert!(nearest("x", &["y"]).is_empty());
        assert!(nearest("mars", &names).is_empty());
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
