//! How fast is the tunnel? A first set of figures, each beside the same request without the tunnel in the same run.
//!
//! Client, API server, gateway and agent share the machine, so figures compare only within one run: rounds are interleaved
//! (direct, tunnel, direct, tunnel …) and medians are shown. CPU is that of gateway and agent together.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use http::Method;
use http_body_util::BodyExt;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::client::{Target, Version, empty, full};
use crate::stack::{CLIENT, Mode, Options, Stack, Upstream};

/// Requests per second of the probe.
const PROBE_RATE: u32 = 200;
/// Bytes of a small answer.
const SMALL: usize = 1200;
/// Bytes of one bulk body; it is asked for again until the time is up.
const BULK: usize = 64 << 20;

/// How long and how often to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of each scenario.
    pub duration: Duration,
    /// Interleaved rounds.
    pub rounds: usize,
    /// Only scenarios whose name contains this.
    pub only: String,
}

/// One measured figure.
struct Figure {
    name: &'static str,
    unit: &'static str,
    direct: Vec<f64>,
    tunnel: Vec<f64>,
}

/// What one scenario yields.
type Sample = Vec<(&'static str, &'static str, f64)>;

/// Measures and prints a table.
///
/// # Errors
/// Something did not start, or a request failed.
#[expect(clippy::print_stdout, reason = "the table is this command's output")]
pub async fn run(plan: Plan) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (_api, upstream) = start_api(directory.path()).await?;
    let stack = Stack::start(Options::new(directory.path(), Mode::Impersonate), upstream).await?;
    let tunnel = stack.target(Some(CLIENT))?;
    let direct = direct_target(&stack.upstream)?;

    let mut figures: Vec<Figure> = Vec::new();
    for round in 1..=plan.rounds {
        eprintln!("round {round} of {}", plan.rounds);
        for through in [false, true] {
            let target = if through { &tunnel } else { &direct };
            let sample = scenarios(target, through.then_some(&stack), &plan).await;
            let way = if through { "through the tunnel" } else { "direct" };
            for (name, unit, value) in sample.context(way)? {
                let at = figures.iter().position(|figure| figure.name == name).unwrap_or_else(|| {
                    figures.push(Figure { name, unit, direct: Vec::new(), tunnel: Vec::new() });
                    figures.len() - 1
                });
                let values = if through { &mut figures[at].tunnel } else { &mut figures[at].direct };
                values.push(value);
            }
        }
    }
    println!("| figure | unit | direct | tunnel | ratio |\n|---|---|---:|---:|---:|");
    for figure in &mut figures {
        let (direct, tunnel) = (median(&mut figure.direct), median(&mut figure.tunnel));
        let show = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let ratio = direct.zip(tunnel).map(|(direct, tunnel)| tunnel / direct);
        println!(
            "| {} | {} | {} | {} | {} |",
            figure.name,
            figure.unit,
            show(direct),
            show(tunnel),
            show(ratio)
        );
    }
    Ok(())
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The fake API server in a process of its own, so that its work is not the client's.
async fn start_api(directory: &Path) -> anyhow::Result<(Child, Upstream)> {
    let certs = directory.join("api");
    let mut child = Command::new(std::env::current_exe()?)
        .args(["fake-apiserver", "--load", "--cert-dir"])
        .arg(&certs)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let output = child.stdout.take().context("no output")?;
    let line = BufReader::new(output).lines().next_line().await?.context("the API server ended")?;
    let url = line.strip_prefix("listening on ").context("odd first line")?.to_owned();
    let upstream = Upstream {
        url,
        ca_pem: std::fs::read_to_string(certs.join("ca.crt"))?,
        agent_token: crate::fakeapi::AGENT_TOKEN.to_owned(),
        client_token: crate::fakeapi::USER_TOKEN.to_owned(),
    };
    Ok((child, upstream))
}

/// The API server itself, with the same client.
fn direct_target(upstream: &Upstream) -> anyhow::Result<Target> {
    let file =
        towline_certs::FileBytes::from_memory(Path::new("api-ca.crt"), upstream.ca_pem.clone().into_bytes());
    let roots = towline_certs::load::parse_roots(&file)?;
    let address = upstream.url.strip_prefix("https://").context("not https")?.parse()?;
    let mut headers = http::HeaderMap::new();
    headers.insert(http::header::AUTHORIZATION, format!("Bearer {}", upstream.client_token).parse()?);
    Ok(Target {
        address,
        host: "localhost".to_owned(),
        prefix: String::new(),
        headers,
        tls: towline_certs::tls::http_client(&roots, None)?,
    })
}

async fn scenarios(target: &Target, stack: Option<&Stack>, plan: &Plan) -> anyhow::Result<Sample> {
    let duration = plan.duration;
    let wanted = |name: &str| name.contains(&plan.only);
    let mut sample = Sample::new();
    let cpu = || -> anyhow::Result<f64> {
        let Some(stack) = stack else { return Ok(0.0) };
        Ok((stack.gateway().cpu()? + stack.agent().cpu()?).as_secs_f64())
    };
    for (name, cpu_name, streams, up) in [
        ("down, 1 stream", "down, 1 stream: CPU", 1, false),
        ("down, 16 streams", "down, 16 streams: CPU", 16, false),
        ("up, 1 stream", "up, 1 stream: CPU", 1, true),
        ("up, 16 streams", "up, 16 streams: CPU", 16, true),
    ] {
        if !wanted(name) {
            continue;
        }
        let before = cpu()?;
        let (bytes, seconds) = bulk(target, streams, up, duration).await.with_context(|| name.to_owned())?;
        sample.push((name, "MB/s", bytes / 1e6 / seconds));
        if stack.is_some() {
            sample.push((cpu_name, "s/GiB", (cpu()? - before) / (bytes / (1u64 << 30) as f64)));
        }
    }
    for (name, cpu_name, connections) in
        [("requests, 1 connection", "", 1), ("requests, 64 connections", "requests, 64 connections: CPU", 64)]
    {
        if !wanted(name) {
            continue;
        }
        let before = cpu()?;
        let (requests, seconds) =
            closed_loop(target, connections, duration).await.with_context(|| name.to_owned())?;
        sample.push((name, "1/s", requests / seconds));
        if stack.is_some() && !cpu_name.is_empty() {
            sample.push((cpu_name, "s/100k", (cpu()? - before) / requests * 1e5));
        }
    }
    if wanted("probe idle") {
        let idle = probe(target, duration).await?;
        sample.push(("probe idle p50", "ms", idle.0));
        sample.push(("probe idle p99", "ms", idle.1));
    }
    if !wanted("probe beside 4 downloads") {
        return Ok(sample);
    }
    let busy = tokio::try_join!(probe(target, duration), bulk(target, 4, false, duration))?.0;
    sample.push(("probe beside 4 downloads p50", "ms", busy.0));
    sample.push(("probe beside 4 downloads p99", "ms", busy.1));
    Ok(sample)
}

/// Moves bodies on `streams` connections until the time is up: bytes and seconds.
async fn bulk(target: &Target, streams: usize, up: bool, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..streams {
        let target = target.clone();
        tasks.spawn(async move {
            let mut client = target.connect(Version::Http1).await?;
            let mut moved = 0u64;
            while started.elapsed() < duration {
                moved += if up {
                    upload(&mut client).await?
                } else {
                    download(&mut client, started, duration).await?
                };
            }
            anyhow::Ok(moved)
        });
    }
    let mut total = 0;
    while let Some(moved) = tasks.join_next().await {
        total += moved??;
    }
    #[expect(clippy::cast_precision_loss, reason = "a measurement")]
    let total = total as f64;
    Ok((total, started.elapsed().as_secs_f64()))
}

/// One download; given up when the time is over.
async fn download(
    client: &mut crate::client::Client,
    started: Instant,
    duration: Duration,
) -> anyhow::Result<u64> {
    let request = client.request(Method::GET, &format!("/towline-test/bytes?n={BULK}"), empty())?;
    let mut body = client.send(request).await?.into_body();
    let mut moved = 0;
    while let Some(frame) = body.frame().await {
        moved += frame?.data_ref().map_or(0, bytes::Bytes::len) as u64;
        if started.elapsed() > duration * 2 {
            break;
        }
    }
    Ok(moved)
}

/// One upload.
async fn upload(client: &mut crate::client::Client) -> anyhow::Result<u64> {
    let request = client.request(Method::POST, "/towline-test/sink", full(vec![7; BULK / 4]))?;
    let answer = client.send(request).await?;
    ensure!(answer.status() == 200, "POST: {}", answer.status());
    answer.into_body().collect().await?;
    Ok(BULK as u64 / 4)
}

/// Requests one after the other on each of `connections`: requests and seconds.
async fn closed_loop(target: &Target, connections: usize, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        let mut client = target.connect(Version::Http1).await?;
        client.get(&format!("/towline-test/bytes?n={SMALL}")).await?;
        clients.push(client);
    }
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            let mut requests = 0u32;
            while started.elapsed() < duration {
                let answer = client.get(&format!("/towline-test/bytes?n={SMALL}")).await?;
                ensure!(answer.body().len() == SMALL, "{} bytes", answer.body().len());
                requests += 1;
            }
            anyhow::Ok(requests)
        });
    }
    let mut total = 0;
    while let Some(requests) = tasks.join_next().await {
        total += requests??;
    }
    Ok((f64::from(total), started.elapsed().as_secs_f64()))
}

/// Requests at a fixed rate, whatever the answers do; times are from the intended start: p50 and p99 in ms.
async fn probe(target: &Target, duration: Duration) -> anyhow::Result<(f64, f64)> {
    let interval = Duration::from_secs(1) / PROBE_RATE;
    let mut client = target.connect(Version::Http1).await?;
    client.get("/version").await?;
    let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3)?;
    let started = Instant::now();
    let mut intended = started;
    while started.elapsed() < duration {
        tokio::time::sleep_until(intended.into()).await;
        client.get(&format!("/towline-test/bytes?n={SMALL}")).await?;
        times.saturating_record(u64::try_from(intended.elapsed().as_micros()).unwrap_or(u64::MAX));
        intended += interval;
    }
    #[expect(clippy::cast_precision_loss, reason = "a measurement")]
    let at = |quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    Ok((at(0.5), at(0.99)))
}
