//! Commands in a container: a real process group in the pod's scratch directory, killed when the stream that requested it
//! ends.

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::time::sleep;

const CHUNK_BYTES: usize = 32 * 1024;

/// A piece of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

/// The process at the other end of exec or attach.
#[derive(Debug)]
pub(crate) enum Work {
    /// exec: a process.
    Process { arguments: Vec<String>, directory: PathBuf, tty: bool, running: Arc<AtomicUsize> },
    /// attach: echoes its input; without input it writes a line from time to time.
    Echo { pause: Duration },
}

impl Work {
    /// Runs to the end and returns the result as a `metav1.Status`. The sender of `stdin` is dropped at its end.
    /// Dropping the future kills the process and its group.
    pub(crate) async fn run(
        self,
        stdin: Option<mpsc::Receiver<Bytes>>,
        output: mpsc::Sender<(Output, Bytes)>,
    ) -> Value {
        match self {
            Self::Process { arguments, directory, tty, running } => {
                let done = process(&arguments, directory, tty, running, stdin, output).await;
                done.map_or_else(|error| not_started(&arguments, &error), ended)
            }
            Self::Echo { pause } => echo(pause, stdin, output).await,
        }
    }
}

async fn echo(
    pause: Duration,
    stdin: Option<mpsc::Receiver<Bytes>>,
    output: mpsc::Sender<(Output, Bytes)>,
) -> Value {
    if let Some(mut stdin) = stdin {
        while let Some(bytes) = stdin.recv().await {
            if output.send((Output::Stdout, bytes)).await.is_err() {
                break;
            }
        }
        return success();
    }
    let mut count = 0;
    while output.send((Output::Stdout, Bytes::from(format!("tick {count}\n")))).await.is_ok() {
        count += 1;
        sleep(pause).await;
    }
    success()
}

async fn process(
    arguments: &[String],
    directory: PathBuf,
    tty: bool,
    running: Arc<AtomicUsize>,
    stdin: Option<mpsc::Receiver<Bytes>>,
    output: mpsc::Sender<(Output, Bytes)>,
) -> io::Result<ExitStatus> {
    let (program, rest) = arguments.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(rest).current_dir(&directory).env("HOME", &directory).process_group(0).kill_on_drop(true);
    command.stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut group = Group::new(child.id(), running);
    let errors = if tty { Output::Stdout } else { Output::Stderr };
    let (out, err, input) = (child.stdout.take(), child.stderr.take(), child.stdin.take());
    let ended = async {
        let copied = tokio::join!(copy_out(out, Output::Stdout, &output), copy_out(err, errors, &output));
        copied.0?;
        copied.1?;
        child.wait().await
    };
    let status = tokio::select! {
        status = ended => status?,
        never = feed(stdin, input) => match never {},
    };
    group.ended();
    Ok(status)
}

/// Writes stdin and closes it at its end. Once the process reads no more, the rest is swallowed: the connection that
/// carries it must not block. Never returns.
async fn feed(stdin: Option<mpsc::Receiver<Bytes>>, input: Option<ChildStdin>) -> std::convert::Infallible {
    if let (Some(mut stdin), Some(mut input)) = (stdin, input) {
        let mut closed = false;
        while let Some(bytes) = stdin.recv().await {
            closed = closed || input.write_all(&bytes).await.is_err();
        }
        drop(input);
    }
    std::future::pending().await
}

async fn copy_out(
    from: Option<impl AsyncRead + Unpin>,
    kind: Output,
    to: &mpsc::Sender<(Output, Bytes)>,
) -> io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        if from.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        let bytes = buffer.split().freeze();
        to.send((kind, bytes)).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
    }
}

/// Counts a running process and kills its whole group if it is dropped before the end.
struct Group {
    id: Option<u32>,
    running: Arc<AtomicUsize>,
}

impl Group {
    fn new(id: Option<u32>, running: Arc<AtomicUsize>) -> Self {
        running.fetch_add(1, Ordering::Relaxed);
        Self { id, running }
    }

    fn ended(&mut self) {
        self.id = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
        if let Some(id) = self.id {
            // The leader is not reaped yet, so its number cannot belong to anyone else. This blocks for a moment, and
            // works also while the runtime is going down.
            let group = format!("-{id}");
            let kill = std::process::Command::new("kill")
                .args(["-KILL", "--", &group])
                .stderr(Stdio::null())
                .status();
            if let Err(error) = kill {
                tracing::warn!(%error, "cannot kill the process group {id}");
            }
        }
    }
}

fn success() -> Value {
    json!({"metadata": {}, "status": "Success"})
}

fn ended(status: ExitStatus) -> Value {
    if status.success() {
        return success();
    }
    // A shell reports a signal as 128 + its number; the fake knows no more than "killed".
    let code = status.code().unwrap_or(137);
    json!({
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

fn not_started(arguments: &[String], error: &io::Error) -> Value {
    let program = arguments.first().map_or("", String::as_str);
    json!({
        "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
        "message": format!("Internal error occurred: error executing command in container: exec: \"{program}\": {error}"),
    })
}
