//! Shell completion: `towline __complete WORDS…` prints the candidates for the last word with descriptions, and a directive for the
//! shell. The format is that of Cobra, which kubectl and Helm use; kubectl asks in the same way as the shells.

use super::client::{Client, Select};
use super::connection::ConnectionArguments;
use super::failure::{Failure, Outcome};
use super::kubeconfig::{Kubeconfig, User};
use super::output;
use clap::{Arg, ArgAction, Command};
use std::path::PathBuf;
use std::time::Duration;

/// The hidden command for completion.
pub(crate) const WORD: &str = "__complete";

/// How long to wait for the gateway.
const PATIENCE: Duration = Duration::from_secs(2);
/// Cobra's directives: only these words, or files.
const NO_FILES: u8 = 4;
const FILES: u8 = 0;

const BASH: &str = r#"# bash completion of towline
_towline() {
    local out directive word
    out=$(towline __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null) || return
    directive=${out##*:}
    COMPREPLY=()
    while IFS=$'\t' read -r word _; do
        if [[ -n $word && $word != :* ]]; then COMPREPLY+=("$word"); fi
    done <<<"$out"
    if [[ $directive == 0 ]]; then compopt -o default; fi
}
complete -F _towline towline
"#;

const ZSH: &str = r#"#compdef towline
# zsh completion of towline
_towline() {
    local -a found
    local out line
    out=$(towline __complete "${(@)words[2,CURRENT]}" 2>/dev/null) || return
    for line in ${(f)out}; do
        if [[ $line != :* ]]; then found+=("${${line//:/\\:}/$'\t'/:}"); fi
    done
    if [[ ${out##*:} == 0 ]]; then _files; else _describe towline found; fi
}
compdef _towline towline
"#;

const FISH: &str = r"# fish completion of towline
function __towline_complete
    set -l words (commandline -opc)[2..] (commandline -ct)
    towline __complete $words 2>/dev/null | string match -rv '^:\d+$'
end
function __towline_files
    set -l words (commandline -opc)[2..] (commandline -ct)
    towline __complete $words 2>/dev/null | string match -q ':0'
end
complete -c towline -f -a '(__towline_complete)'
complete -c towline -F -n __towline_files
";

const KUBECTL: &str = r#"#!/bin/sh
# kubectl runs this for "kubectl towline": in $PATH as kubectl_complete-towline, executable.
exec towline __complete "$@"
"#;

/// What may be completed at a position of the command line.
#[derive(Debug, PartialEq, Eq)]
enum Candidates {
    /// One of these words, each with a description.
    Words(Vec<(String, String)>),
    Files,
    Clusters,
    Tokens,
}

/// Prints the candidates for the last of the words after the program's name.
pub(crate) async fn run(words: &[String], definition: Command) -> Outcome {
    let (before, typed) = match words.split_last() {
        Some((typed, before)) => (before, typed.as_str()),
        None => (&[][..], ""),
    };
    let (place, connection) = place(definition, before, typed);
    let mut directive = NO_FILES;
    let words = match place {
        Candidates::Words(words) => words,
        Candidates::Files => {
            directive = FILES;
            Vec::new()
        }
        Candidates::Clusters => names(&connection, "clusters").await,
        Candidates::Tokens => names(&connection, "jointokens").await,
    };
    let mut text = String::new();
    for (word, about) in words.iter().filter(|(word, _)| word.starts_with(typed)) {
        let about = about.lines().next().unwrap_or_default();
        text.push_str(&if about.is_empty() { format!("{word}\n") } else { format!("{word}\t{about}\n") });
    }
    output::bytes(format!("{text}:{directive}\n").as_bytes())
}

/// The names of objects; empty if the gateway does not answer at once, because the user is waiting.
async fn names(connection: &ConnectionArguments, plural: &str) -> Vec<(String, String)> {
    let list = async {
        let context = Kubeconfig::gateways(connection)?;
        // An exec plugin may ask for a password or open a browser, which completion must not do.
        if matches!(context.user, User::Plugin(_)) {
            return Err(Failure::failed("a plugin is not run here"));
        }
        Client::of(context)?.list(plural, &Select::default()).await
    };
    let list = tokio::time::timeout(PATIENCE, list).await;
    let list = list.unwrap_or_else(|_| Err(Failure::failed("late"))).unwrap_or_default();
    let about = |item: &serde_json::Value| match plural {
        "clusters" => output::text(&item["spec"]["description"]),
        _ => output::text(&item["spec"]["cluster"]),
    };
    let items = list["items"].as_array().into_iter().flatten();
    items.map(|item| (output::text(&item["metadata"]["name"]), about(item))).collect()
}

/// What may follow these words, and the gateway that they select.
fn place(mut definition: Command, before: &[String], typed: &str) -> (Candidates, ConnectionArguments) {
    definition.build();
    let mut command = &definition;
    let mut connection = ConnectionArguments { kubeconfig: Vec::new(), context: None };
    let (mut given, mut words, mut open) = (0, before.iter(), None);
    while let Some(word) = words.next() {
        if word == "--" {
            // A plugin and its arguments.
            return (Candidates::Files, connection);
        }
        if let Some(flag) = flag(command, word) {
            let inline = word.split_once('=').map(|(_, value)| value.to_owned());
            if !takes_value(flag) {
                continue;
            }
            let Some(value) = inline.or_else(|| words.next().cloned()) else {
                open = Some(flag);
                break;
            };
            match flag.get_id().as_str() {
                "kubeconfig" => connection.kubeconfig.push(PathBuf::from(value)),
                "context" => connection.context = Some(value),
                _ => {}
            }
        } else if let Some(next) = command.find_subcommand(word) {
            command = next;
        } else {
            given += 1;
        }
    }
    (open.map_or_else(|| after(command, given, typed), values), connection)
}

/// What may follow if no flag expects a value.
fn after(command: &Command, given: usize, typed: &str) -> Candidates {
    let about = |text: Option<&clap::builder::StyledStr>| text.map(ToString::to_string).unwrap_or_default();
    if typed.starts_with('-') {
        let flags = command.get_arguments().filter(|arg| !arg.is_hide_set());
        let flags = flags.filter_map(|arg| Some((format!("--{}", arg.get_long()?), about(arg.get_help()))));
        return Candidates::Words(flags.collect());
    }
    if command.has_subcommands() {
        let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
        let named = commands.map(|command| (command.get_name().to_owned(), about(command.get_about())));
        return Candidates::Words(named.collect());
    }
    let positional: Vec<_> = command.get_positionals().filter(|arg| !arg.is_last_set()).collect();
    // The last one may be repeated.
    let repeats = |arg: &&&Arg| matches!(arg.get_action(), ArgAction::Append);
    let arg = positional.get(given).or_else(|| positional.last().filter(repeats));
    arg.map_or_else(|| Candidates::Words(Vec::new()), |arg| values(arg))
}

/// The candidates for an argument.
fn values(arg: &Arg) -> Candidates {
    let possible = arg.get_possible_values();
    if !possible.is_empty() {
        let about = |value: &clap::builder::PossibleValue| {
            value.get_help().map(ToString::to_string).unwrap_or_default()
        };
        return Candidates::Words(
            possible.iter().map(|value| (value.get_name().to_owned(), about(value))).collect(),
        );
    }
    let name = arg.get_value_names().and_then(<[_]>::first).map(ToString::to_string).unwrap_or_default();
    match name.to_ascii_uppercase().as_str() {
        "CLUSTER" => Candidates::Clusters,
        "TOKEN" => Candidates::Tokens,
        "FILE" => Candidates::Files,
        _ => Candidates::Words(Vec::new()),
    }
}

fn flag<'a>(command: &'a Command, word: &str) -> Option<&'a Arg> {
    let name = word.split_once('=').map_or(word, |(name, _)| name);
    let mut flags = command.get_arguments();
    match name.strip_prefix("--") {
        Some(long) => flags.find(|arg| arg.get_long() == Some(long)),
        None => {
            let letter = name.strip_prefix('-')?.chars().next()?;
            flags.find(|arg| arg.get_short() == Some(letter))
        }
    }
}

fn takes_value(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

/// The script of a shell, or what kubectl runs as `kubectl_complete-towline`.
pub(crate) fn script(shell: &str) -> &'static str {
    match shell {
        "bash" => BASH,
        "zsh" => ZSH,
        "fish" => FISH,
        _ => KUBECTL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn at(words: &[&str]) -> Candidates {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let (typed, before) = words.split_last().unwrap();
        place(super::super::Arguments::command(), before, typed).0
    }

    fn words(place: Candidates) -> Vec<String> {
        let Candidates::Words(words) = place else { panic!("{place:?}") };
        words.into_iter().map(|(word, _)| word).collect()
    }

    /// Goal: D43: a shell completes commands, flags and their values, and names of clusters and tokens where they are expected.
    #[test]
    fn d43_names_are_completed_where_they_are_wanted() {
        for line in [
            &["cluster", "describe", ""][..],
            &["--context", "x", "cluster", "delete", "one", "t"],
            &["kubeconfig", "--name", "n", "p"],
            &["agent", "manifest", "p"],
            &["token", "create", "--uses=3", ""],
        ] {
            assert_eq!(at(line), Candidates::Clusters, "{line:?}");
        }
        assert_eq!(at(&["token", "revoke", ""]), Candidates::Tokens);
        assert_eq!(at(&["--kubeconfig", ""]), Candidates::Files);
        assert_eq!(at(&["kubeconfig", "prod", "--wrap", "--", "aw"]), Candidates::Files);
        assert_eq!(words(at(&["agent", "manifest", "p", "--mode", ""])), ["restricted", "impersonate"]);
        assert!(words(at(&["cluster", "describe", "one", ""])).is_empty(), "it takes one");
        let top = words(at(&[""]));
        assert!(
            top.contains(&"status".to_owned()) && !top.iter().any(|word| word.starts_with('_')),
            "{top:?}"
        );
        assert!(words(at(&["status", "--"])).contains(&"--check".to_owned()));
        let line: Vec<String> = ["--context", "x", "cluster", "get"].map(ToOwned::to_owned).to_vec();
        assert_eq!(place(super::super::Arguments::command(), &line, "").1.context.as_deref(), Some("x"));
        for shell in ["bash", "zsh", "fish", "kubectl"] {
            assert!(script(shell).contains("towline __complete"), "{shell}");
        }
    }

    /// Goal: D43: completion never starts a log-in: it runs no exec plugin of a kubeconfig.
    #[tokio::test]
    async fn d43_completion_runs_no_plugin() {
        let directory = tempfile::tempdir().unwrap();
        let (file, mark) = (directory.path().join("config"), directory.path().join("mark"));
        let config = serde_json::json!({
            "clusters": [{"name": "gw", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [{"name": "u", "user": {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "touch", "args": [mark]}}}],
            "contexts": [{"name": "gw", "context": {"cluster": "gw", "user": "u"}}],
            "current-context": "gw",
        });
        std::fs::write(&file, config.to_string()).unwrap();
        let connection = ConnectionArguments { kubeconfig: vec![file], context: None };
        assert!(names(&connection, "clusters").await.is_empty() && !mark.exists());
    }
}
