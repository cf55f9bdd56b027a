//! The program `towline`, also `kubectl towline`: what an operator of the fleet types.
//!
//! | question | file |
//! |---|---|
//! | which gateway, and as whom? | `kubeconfig` |
//! | how is its API asked? | `client` |
//! | `towline cluster`, `token`, `status` … | the file of that name |
//! | how are objects shown and followed? | `show`, `describe` |
//! | what stands in a kubeconfig, and how does it get there? | `entries`, `kubefile` |
//! | how does kubectl log in? | `credential`, `cache`, `exec` |
//! | why did it fail, with which exit code? | `failure` |
//! | what is printed, and how? | `output`, `yaml` |
//! | what does a cluster's owner apply? | `agent`, [`manifest`] |
//!
//! Data goes to stdout, words to stderr.

mod agent;
mod cache;
mod client;
mod cluster;
mod credential;
mod describe;
mod entries;
mod exec;
mod failure;
mod kubeconfig;
mod kubefile;
pub mod manifest;
mod output;
mod show;
mod status;
mod token;
mod whoami;
mod yaml;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use clap_complete::Shell;
use failure::{Failure, Outcome};
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "Examples:
  towline cluster register prod              make the cluster known
  towline token create prod > join-token     let its agent join
  towline status                             which clusters are connected, and why one is not
  towline kubeconfig prod                    reach it with kubectl --context towline-prod
  towline cluster revoke prod                cut it off within a second
";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the operation failed or was refused; 2 the command line or the kubeconfig is wrong.
The gateway is that of the kubeconfig's context; a first one: towline-gateway --config FILE admin-kubeconfig --output admin.yaml";

/// Manage a fleet of Kubernetes clusters behind a Towline gateway.
#[derive(Debug, Parser)]
#[command(name = "towline", version, before_help = EXAMPLES, after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

/// Which gateway, and as whom.
#[derive(Args, Clone, Debug)]
pub(crate) struct Connection {
    /// Kubeconfig to use instead of $TOWLINE_KUBECONFIG, $KUBECONFIG and ~/.kube/config; more than one are merged.
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Vec<PathBuf>,
    /// Context to use instead of the current one. One of a single cluster leads to its gateway, too.
    #[arg(long, global = true, value_name = "NAME", env = "TOWLINE_CONTEXT", hide_env_values = true)]
    context: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The agent of a cluster.
    #[command(subcommand)]
    Agent(agent::AgentCommand),
    /// A gateway in a cluster.
    #[command(subcommand)]
    Gateway(agent::GatewayCommand),
    /// Register clusters, look at them, cut them off.
    #[command(subcommand)]
    Cluster(cluster::Cluster),
    /// Make, list and revoke join tokens.
    #[command(subcommand)]
    Token(token::Token),
    Kubeconfig(entries::Entries),
    Credential(credential::Credential),
    Status(status::Status),
    /// Whom the gateway takes you for.
    Whoami(whoami::Whoami),
    /// The version of this program, and whether the gateway answers.
    Version(whoami::Version),
    /// Print the completion script of a shell.
    #[command(before_help = COMPLETION)]
    Completion {
        /// bash, zsh or fish.
        #[arg(value_parser = ["bash", "zsh", "fish"])]
        shell: String,
    },
}

const COMPLETION: &str = "Examples:
  source <(towline completion bash)
  towline completion zsh > \"${fpath[1]}/_towline\"
  towline completion fish > ~/.config/fish/completions/towline.fish
";

/// What this program was called as.
pub(crate) fn name() -> &'static str {
    let first = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let file = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if file.starts_with("kubectl-") { "kubectl towline" } else { "towline" }
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let outcome = match command().try_get_matches() {
        Ok(matches) => match Arguments::from_arg_matches(&matches) {
            Ok(arguments) => run(&arguments),
            Err(error) => return said(&error),
        },
        Err(error) => return said(&error),
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

/// What clap has to say: help on stdout, mistakes on stderr.
fn said(error: &clap::Error) -> ExitCode {
    let told = error.print().is_ok();
    if error.use_stderr() || !told { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

/// The definition of the command line, by the name that was called.
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("cannot start: {error}")))?;
    let connection = &arguments.connection;
    match &arguments.command {
        Command::Agent(command) => runtime.block_on(command.run(connection)),
        Command::Gateway(command) => command.run(),
        Command::Cluster(cluster) => runtime.block_on(cluster.run(connection)),
        Command::Token(token) => runtime.block_on(token.run(connection)),
        Command::Kubeconfig(entries) => runtime.block_on(entries.run(connection)),
        Command::Credential(credential) => runtime.block_on(credential.run(connection)),
        Command::Status(status) => runtime.block_on(status.run(connection)),
        Command::Whoami(whoami) => runtime.block_on(whoami.run(connection)),
        Command::Version(version) => runtime.block_on(version.run(connection)),
        Command::Completion { shell } => complete(shell),
    }
}

fn complete(shell: &str) -> Outcome {
    let shell: Shell = shell.parse().map_err(Failure::usage)?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "towline", &mut script);
    output::bytes(&script)
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
