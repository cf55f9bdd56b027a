//! The kubectl plugin `kubectl towline …`: the program `towline` under another name.

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_cli::main()
}
