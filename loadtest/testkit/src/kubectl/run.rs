//! Runs one `kubectl`, with its own cache directory, a kubeconfig, a deadline, and none of the user's files.

use super::find::Kubectl;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// A kubectl takes less than a second, but many run concurrently on machines that may be ten times slower.
const RUN_DEADLINE: Duration = Duration::from_secs(120);
const LINE_DEADLINE: Duration = Duration::from_secs(60);

/// A `kubectl` together with the kubeconfig it uses, and a directory for its cache and its files.
#[derive(Debug)]
pub struct Run {
    kubectl: Kubectl,
    kubeconfig: PathBuf,
    directory: TempDir,
    environment: Vec<(String, String)>,
    names: AtomicU64,
}

/// How a `kubectl` ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Its output.
    pub stdout: Vec<u8>,
    /// Its errors.
    pub stderr: String,
}

impl Finished {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Run {
    /// Prepares a fresh directory.
    pub fn new(kubectl: &Kubectl, kubeconfig: &Path) -> std::io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("towline-kubectl-").tempdir()?;
        Ok(Self {
            kubectl: kubectl.clone(),
            kubeconfig: kubeconfig.to_owned(),
            directory,
            environment: Vec::new(),
            names: AtomicU64::new(0),
        })
    }

    /// Sets an environment variable for every `kubectl` run after this.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The binary in use.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// A scratch directory that lives as long as this.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A unique name for an object.
    pub fn unique(&self, prefix: &str) -> String {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let place = self.directory.path().file_name().and_then(OsStr::to_str).unwrap_or_default();
        let place: String = place.chars().rev().take(6).collect();
        format!("{prefix}-{}-{number}-{}", std::process::id(), towline_certs::hex(place.as_bytes()))
    }

    /// Runs to the end; any exit code is a success. An error means that it did not start or took too long.
    pub async fn run(&self, arguments: &[&str], stdin: &[u8]) -> Result<Finished, String> {
        let line = format!("{} {}", self.kubectl, arguments.join(" "));
        self.finish(self.command(arguments), &line, stdin).await
    }

    /// Like [`Run::run`], in a terminal of its own where the machine has `script`; else without a terminal.
    pub async fn run_in_terminal(&self, arguments: &[&str]) -> Result<Finished, String> {
        let line = format!("{} {}", self.kubectl, arguments.join(" "));
        let plain = self.command(arguments);
        let words = std::iter::once(plain.as_std().get_program()).chain(plain.as_std().get_args());
        let quoted = words.map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")));
        let quoted = quoted.collect::<Vec<_>>().join(" ");
        let mut command = self.wrap("script");
        command.args(["--quiet", "--return", "--flush", "--command", &quoted, "/dev/null"]);
        match self.finish(command, &line, b"").await {
            Err(_) => self.finish(plain, &line, b"").await,
            finished => finished,
        }
    }

    async fn finish(&self, mut command: Command, line: &str, stdin: &[u8]) -> Result<Finished, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{line}: {error}"))?;
        let mut input = child.stdin.take();
        let feed = async {
            if let Some(input) = &mut input {
                // It may end without reading everything; its exit code shows the result.
                input.write_all(stdin).await.ok();
            }
            drop(input.take());
        };
        let done = timeout(RUN_DEADLINE, async { tokio::join!(feed, child.wait_with_output()).1 });
        let output = done.await.map_err(|_| format!("{line}: not finished after {RUN_DEADLINE:?}"))?;
        let output = output.map_err(|error| format!("{line}: {error}"))?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(Finished { code: output.status.code(), stdout: output.stdout, stderr })
    }

    /// Runs and expects exit code 0; returns the output as text.
    pub async fn ok(&self, arguments: &[&str]) -> Result<String, String> {
        self.ok_with(arguments, b"").await
    }

    /// Like [`Run::ok`], with bytes for stdin.
    pub async fn ok_with(&self, arguments: &[&str], stdin: &[u8]) -> Result<String, String> {
        let finished = self.run(arguments, stdin).await?;
        if finished.code == Some(0) {
            return Ok(finished.text());
        }
        let line = arguments.join(" ");
        Err(format!("{} {line}: exit code {:?}: {}", self.kubectl, finished.code, finished.stderr.trim()))
    }

    /// Starts one that runs until it is dropped; its output is read line by line.
    pub fn stream(&self, arguments: &[&str]) -> Result<Streaming, String> {
        let line = format!("{} {}", self.kubectl, arguments.join(" "));
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| format!("{line}: {error}"))?;
        let stdout = child.stdout.take().ok_or_else(|| format!("{line}: no stdout"))?;
        Ok(Streaming { child, lines: BufReader::new(stdout).lines(), line })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.wrap(&self.kubectl.path);
        command.arg("--cache-dir").arg(self.directory.path().join("cache"));
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(arguments);
        command
    }

    /// A program with the environment that a `kubectl` gets.
    fn wrap(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("HOME", self.directory.path()).current_dir(self.directory.path()).kill_on_drop(true);
        for variable in ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "ALL_PROXY", "KUBECONFIG"]
        {
            command.env_remove(variable);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

/// A running `kubectl`; dropping it kills it.
#[derive(Debug)]
pub struct Streaming {
    child: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
    line: String,
}

impl Streaming {
    /// Reads until a line contains this text, and returns the line.
    pub async fn line_with(&mut self, text: &str) -> Result<String, String> {
        let mut seen = Vec::new();
        let search = async {
            while let Ok(Some(line)) = self.lines.next_line().await {
                if line.contains(text) {
                    return Some(line);
                }
                seen.push(line);
            }
            None
        };
        let found = timeout(LINE_DEADLINE, search).await;
        found.ok().flatten().ok_or_else(|| format!("{}: no line with {text:?} among {seen:?}", self.line))
    }

    /// Ends it and waits for it.
    pub async fn stop(mut self) {
        // It may have ended by itself.
        self.child.kill().await.ok();
    }
}
