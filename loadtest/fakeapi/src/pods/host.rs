//! The [`PodHost`] that pods run on: a scratch directory, real processes and two small servers.

use super::servers;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The machine that all pods share: a scratch directory, running processes, two small servers.
pub(crate) struct PodHost {
    scratch: TempDir,
    pub(super) processes: Arc<AtomicUsize>,
    web: SocketAddr,
    echo: SocketAddr,
}

impl PodHost {
    pub(crate) async fn start(tasks: &TaskTracker, stop: &CancellationToken) -> std::io::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("towline-fake-pods-").tempdir()?;
        let web = servers::web(tasks, stop).await?;
        let echo = servers::echo(tasks, stop).await?;
        Ok(Self { scratch, processes: Arc::default(), web, echo })
    }

    pub(crate) fn processes(&self) -> usize {
        self.processes.load(Ordering::Relaxed)
    }

    /// Where a container port of a pod really is: port 80 is a web server in `web`, port 7 an echo in every pod.
    pub(crate) fn port(&self, pod: &str, port: u16) -> Option<SocketAddr> {
        match (pod, port) {
            ("web", 80) => Some(self.web),
            (_, 7) => Some(self.echo),
            _ => None,
        }
    }

    /// The directory in which a pod's processes run; names were checked when the pod was made.
    pub(super) fn directory(&self, namespace: &str, pod: &str) -> std::io::Result<PathBuf> {
        let directory = self.scratch.path().join(namespace).join(pod);
        std::fs::create_dir_all(&directory)?;
        Ok(directory)
    }
}
