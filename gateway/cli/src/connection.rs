//! What every command takes: the gateway, the user, and the name of this program in what it says.

use clap::Args;
use std::path::PathBuf;

/// The heading of the options that all commands share.
const CONNECTION: &str = "Connection";

/// The gateway and the user.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConnectionArguments {
    /// Kubeconfig to use instead of $TOWLINE_KUBECONFIG, $KUBECONFIG and ~/.kube/config; several files are merged.
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION)]
    pub(crate) kubeconfig: Vec<PathBuf>,
    /// Context to use instead of the current one. The context of a cluster behind the gateway selects its gateway.
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "TOWLINE_CONTEXT",
        hide_env_values = true,
        help_heading = CONNECTION
    )]
    pub(crate) context: Option<String>,
}

/// The name under which this program was called.
pub(crate) fn name() -> &'static str {
    let first = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    let file = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if file.starts_with("kubectl-") { "kubectl towline" } else { "towline" }
}
