//! The program `towline`: registers clusters, hands out tokens and kubeconfigs, shows the fleet.

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_cli::main()
}
