//! The program `towline` as a plugin of kubectl: `kubectl towline …`.

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_gateway::cli::main()
}
