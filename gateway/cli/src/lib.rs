//! The program `towline`, also `kubectl towline`: the operator's command line for the fleet.
//!
//! | question | file |
//! |---|---|
//! | which gateway, and as whom? | `kubeconfig` |
//! | how does it send requests, and through which proxy? | `client`, `proxy` |
//! | `towline cluster`, `token`, `status` … | the file of that name |
//! | how are objects printed and watched? | `show`, `describe` |
//! | what is in a kubeconfig entry, and how is it written? | `entries`, `kubefile` |
//! | how does kubectl log in? | `credential` is the plugin that kubectl runs, `cache` keeps its certificates; `exec` runs another's plugin |
//! | why did it fail, with which exit code? | `failure` |
//! | how is output formatted? | `output`, `yaml` |
//! | how does shell completion work? | `complete` |
//! | what does a cluster's owner apply? | `agent`, [`manifest`] |
//!
//! Data goes to stdout, everything else to stderr.

mod agent;
mod cache;
mod client;
mod cluster;
mod complete;
mod connection;
mod credential;
mod describe;
mod entries;
mod exec;
mod failure;
pub mod kubeconfig;
mod kubefile;
pub mod manifest;
mod output;
mod proxy;
mod show;
mod status;
mod token;
mod whoami;
mod yaml;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use connection::{ConnectionArguments, name};
use failure::{Failure, Outcome};
use std::process::ExitCode;

const EXAMPLES: &str = "Examples:
  towline cluster register prod              register the cluster
  towline token create prod > join-token     create a join token for its agent
  towline status                             show which clusters are connected, and why one is not
  towline kubeconfig prod                    use it: kubectl --context towline-prod
  towline cluster revoke prod                revoke its agents within a second
";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the operation failed or was refused; 2 usage or kubeconfig error, no request was sent.
The kubeconfig's context selects the gateway. To create a first kubeconfig: towline-gateway --config FILE admin-kubeconfig --output admin.yaml";

const COMPLETION: &str = "Examples:
  source <(towline completion bash)
  towline completion zsh > \"${fpath[1]}/_towline\"
  towline completion fish > ~/.config/fish/completions/towline.fish
  towline completion kubectl > /usr/local/bin/kubectl_complete-towline    chmod +x it
";

/// Words from other tools, and the corresponding command.
const MEANT: [(&str, &str); 7] = [
    ("login", "kubeconfig CLUSTER"),
    ("doctor", "status"),
    ("join", "agent manifest CLUSTER"),
    ("install", "agent manifest CLUSTER"),
    ("get", "cluster list"),
    ("clusters", "cluster list"),
    ("tokens", "token list"),
];

/// Manage a fleet of Kubernetes clusters behind a Towline gateway.
#[derive(Debug, Parser)]
#[command(name = "towline", version, before_help = EXAMPLES, after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the manifest of a cluster's agent.
    #[command(subcommand)]
    Agent(Box<agent::AgentCommand>),
    /// Print the manifest of a gateway.
    #[command(subcommand)]
    Gateway(Box<agent::GatewayCommand>),
    /// Register, inspect, revoke and delete clusters.
    #[command(subcommand)]
    Cluster(cluster::ClusterCommand),
    /// Create, list and revoke join tokens.
    #[command(subcommand)]
    Token(token::TokenCommand),
    Kubeconfig(entries::Entries),
    Credential(credential::CredentialCommand),
    Status(status::Status),
    /// Show your user and groups as the gateway sees them.
    Whoami(whoami::Whoami),
    /// Show the versions of this program and of the gateway.
    Version(whoami::Version),
    /// Print the completion script of a shell or of kubectl.
    #[command(before_help = COMPLETION)]
    Completion {
        /// bash, zsh or fish; kubectl for the script kubectl_complete-towline.
        #[arg(value_parser = ["bash", "zsh", "fish", "kubectl"])]
        shell: String,
    },
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(complete::WORD) {
        // An incomplete command line cannot be parsed as a whole.
        let asked = block_on(complete::run(&words.collect::<Vec<_>>(), Arguments::command()));
        return asked.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let outcome = match command().try_get_matches() {
        Ok(matches) => match Arguments::from_arg_matches(&matches) {
            Ok(arguments) => run(&arguments),
            Err(error) => return said(error),
        },
        Err(error) => return said(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                eprintln!("{}: {text}", name());
            }
            ExitCode::from(failure.code())
        }
    }
}

/// Prints clap's message: help on stdout, errors on stderr. For a word that is a command elsewhere, suggests that command.
fn said(mut error: clap::Error) -> ExitCode {
    let word = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(word)) => word.clone(),
        _ => String::new(),
    };
    let meant = elsewhere(&word);
    if !meant.is_empty() {
        error.remove(ContextKind::SuggestedSubcommand);
    }
    let told = error.print().is_ok();
    if !meant.is_empty() {
        eprintln!("Did you mean: {}", meant.join(", or: "));
    }
    if error.use_stderr() || !told { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

/// The subcommands of this name, and the commands that do what the word means.
fn elsewhere(word: &str) -> Vec<String> {
    let mut found: Vec<String> = MEANT
        .iter()
        .filter(|(other, _)| *other == word)
        .map(|(_, command)| format!("{} {command}", name()))
        .collect();
    for group in Arguments::command().get_subcommands().filter(|group| group.has_subcommands()) {
        if group.get_subcommands().any(|command| command.get_name() == word) {
            found.push(format!("{} {} {word}", name(), group.get_name()));
        }
    }
    found
}

/// The command line's definition, under the called name.
fn command() -> clap::Command {
    named(Arguments::command().bin_name(name()))
}

fn named(command: clap::Command) -> clap::Command {
    let examples = command
        .get_before_help()
        .map(|text| text.to_string().replace("  towline ", &format!("  {} ", name())));
    let command = match examples {
        Some(examples) => command.before_help(examples),
        None => command,
    };
    command.mut_subcommands(named)
}

fn run(arguments: &Arguments) -> Outcome {
    let connection = &arguments.connection;
    match &arguments.command {
        Command::Agent(command) => block_on(command.run(connection)),
        Command::Gateway(command) => command.run(),
        Command::Cluster(cluster) => block_on(cluster.run(connection)),
        Command::Token(token) => block_on(token.run(connection)),
        Command::Kubeconfig(entries) => block_on(entries.run(connection)),
        Command::Credential(credential) => block_on(credential.run(connection)),
        Command::Status(status) => block_on(status.run(connection)),
        Command::Whoami(whoami) => block_on(whoami.run(connection)),
        Command::Version(version) => block_on(version.run(connection)),
        Command::Completion { shell } => output::bytes(complete::script(shell).as_bytes()),
    }
}

/// Runs the command on its own runtime.
fn block_on(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::failed(format!("cannot start: {error}")))?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of a command's help that show how it is used, and of those below it.
    fn examples(command: &clap::Command, found: &mut Vec<String>) {
        let help = command.get_before_help().map(ToString::to_string);
        let help = help.unwrap_or_else(|| panic!("{} begins with no examples", command.get_name()));
        assert!(help.starts_with("Examples"), "{help}");
        let lines = help.lines().filter(|line| line.starts_with("  towline "));
        found.extend(lines.map(|line| line.trim().to_owned()));
        let known = command.get_subcommands().filter(|command| command.get_name() != "help");
        known.for_each(|command| examples(command, found));
    }

    /// What stands in a line before a comment, a pipe or a redirection, as a shell would take it apart.
    fn words(line: &str) -> Vec<String> {
        let line = line.split("   ").next().unwrap();
        let line = [" > ", " | ", " || "].iter().fold(line, |line, end| line.split(end).next().unwrap());
        line.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect()
    }

    /// Goal: P3: for a word that is a subcommand elsewhere, or a command of other tools, the error suggests the right command.
    #[test]
    fn p3_a_misplaced_command_gets_a_suggestion() {
        assert_eq!(elsewhere("register"), ["towline cluster register"]);
        assert_eq!(elsewhere("revoke"), ["towline cluster revoke", "towline token revoke"]);
        assert_eq!(elsewhere("doctor"), ["towline status"]);
        assert!(elsewhere("nonsense").is_empty() && elsewhere("").is_empty());
        let definition = Arguments::command();
        for (_, command) in MEANT {
            let words = std::iter::once("towline").chain(command.split(' '));
            assert!(definition.clone().try_get_matches_from(words).is_ok(), "{command}");
        }
    }

    /// Goal: P3: no line of an example is broken in the middle: they fit the 100 columns that help has at most.
    #[test]
    fn p3_examples_are_not_broken() {
        fn check(command: &clap::Command) {
            let help = command.get_before_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines() {
                assert!(line.chars().count() <= 100, "{line}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
    }

    /// Goal: the first screen of every help is examples, and each of them is understood.
    #[test]
    fn every_example_is_understood() {
        let (mut found, definition) = (Vec::new(), Arguments::command());
        examples(&definition, &mut found);
        assert!(found.len() > 40, "{found:?}");
        for line in found {
            let parsed = definition.clone().try_get_matches_from(words(&line));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
        definition.debug_assert();
    }
}
