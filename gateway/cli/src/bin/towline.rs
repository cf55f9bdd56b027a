//! The program `towline`: registers clusters, creates join tokens and kubeconfigs, and shows the fleet.

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_cli::main()
}
