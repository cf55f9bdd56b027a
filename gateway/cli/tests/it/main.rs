//! Goal: the two programs start, name their commands, and refuse a wrong command line before they ask anybody.
//!
//! What the commands do is tested with a gateway, in the load test's crate.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).env_clear().output().unwrap()
}

#[test]
fn both_names_of_the_program_have_the_same_commands() {
    let [towline, plugin] =
        [env!("CARGO_BIN_EXE_towline"), env!("CARGO_BIN_EXE_kubectl-towline")].map(|program| {
            let output = run(program, &["--help"]);
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        });
    let commands = |help: &str| {
        let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let names =
            listed.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(commands(&towline).iter().any(|name| name == "status"), "{towline}");
    assert_eq!(commands(&towline), commands(&plugin));
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    let output = run(env!("CARGO_BIN_EXE_towline"), &["no-such-command"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no-such-command"), "{output:?}");
}
