//! `towline-certs`: creates development certificates and shows what a certificate contains.

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use towline_certs::devset::{DevCluster, DevSet, parse_client};
use towline_certs::explain::once;
use towline_certs::facts::{Validity, host_names};
use towline_certs::load::{FileBytes, parse_certificates};
use towline_certs::profile::kind_of;
use towline_certs::text::{human, rfc3339};
use towline_certs::{AgentIdentity, CertificateDer, CertificateFacts, ClientIdentity, HostName, TrustDomain};

const EXAMPLES: &str = "\
Examples:
  Create a set for one machine: two clusters, an administrator and a developer
    towline-certs dev --out dev --gateway-host localhost --gateway-host 127.0.0.1 \\
      --cluster east --cluster west --client admin:platform:admins --client alice:dev,ops

  Show the identity, validity and pin of a certificate
    towline-certs show dev/agent-east.crt";

/// Create development certificates for Towline, and show what a certificate contains.
#[derive(Debug, Parser)]
#[command(name = "towline-certs", version, before_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create or complete a development set of CAs and certificates
    Dev(Dev),
    /// Print identity, validity and pin of each certificate in a PEM file
    Show {
        /// PEM file with one or more certificates
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Dev {
    /// Directory of the set; created if missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// DNS name or IP address of the gateway; repeat for several
    #[arg(long, value_name = "HOST", required = true)]
    gateway_host: Vec<HostName>,
    /// Cluster that gets an agent certificate; the uid defaults to the name; repeat for several
    #[arg(long, value_name = "NAME[=UID]")]
    cluster: Vec<DevCluster>,
    /// Client that gets a certificate; the first colon separates the name from its groups; repeat for several
    #[arg(long, value_name = "CN[:GROUP,GROUP]", value_parser = parse_client)]
    client: Vec<ClientIdentity>,
    /// Trust domain in the agents' identities
    #[arg(long, value_name = "DOMAIN", default_value = "towline.local")]
    trust_domain: TrustDomain,
    /// Lifetime of agent and client certificates in days, 1 to 3650
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3650))]
    days: u64,
    /// Create new CAs and replace every file
    #[arg(long)]
    force: bool,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Dev(dev) => write_set(dev),
        Command::Show { file } => show(&file),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("towline-certs: {}", once(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn write_set(dev: Dev) -> anyhow::Result<()> {
    let set = DevSet {
        directory: dev.out,
        gateway_hosts: dev.gateway_host,
        clusters: dev.cluster,
        clients: dev.client,
        trust_domain: dev.trust_domain,
        leaf_lifetime: Duration::from_secs(dev.days * 86_400),
        force: dev.force,
    };
    let files = set
        .write(SystemTime::now())
        .with_context(|| format!("cannot complete the development set in {}", set.directory.display()))?;
    let mut out = io::stdout().lock();
    for file in &files {
        let state = if file.written { "wrote" } else { "kept " };
        writeln!(out, "{state}  {}  ({})", file.path.display(), file.what)?;
    }
    Ok(())
}

fn show(path: &Path) -> anyhow::Result<()> {
    let certificates = parse_certificates(&FileBytes::read(path)?)?;
    let mut out = io::stdout().lock();
    for (index, certificate) in certificates.iter().enumerate() {
        let facts = CertificateFacts::of(certificate)?;
        let state = match facts.validity_at(SystemTime::now()) {
            Validity::EndsIn(left) => format!("{} left", human(left)),
            Validity::EndedAgo(gap) => format!("EXPIRED {} ago", human(gap)),
            Validity::StartsIn(gap) => format!("NOT YET VALID, starts in {}", human(gap)),
        };
        if index > 0 {
            writeln!(out)?;
        }
        writeln!(out, "certificate  {} of {} in {}", index + 1, certificates.len(), path.display())?;
        writeln!(out, "identity     {}", identity(certificate, &facts))?;
        writeln!(out, "issuer       {}", facts.issuer)?;
        writeln!(
            out,
            "valid        {} to {} ({state})",
            rfc3339(facts.not_before),
            rfc3339(facts.not_after)
        )?;
        writeln!(out, "serial       {}", facts.serial)?;
        writeln!(out, "fingerprint  sha256 {}", facts.fingerprint)?;
        writeln!(out, "pin          {}", facts.pin)?;
    }
    Ok(())
}

/// The identity that the certificate would have if the right CA had issued it.
fn identity(certificate: &CertificateDer<'_>, facts: &CertificateFacts) -> String {
    if facts.is_ca {
        let kind = kind_of(certificate).map_or_else(|| "CA".to_owned(), |kind| kind.to_string());
        return format!("{kind}: {}", facts.subject);
    }
    if let Ok(agent) = AgentIdentity::from_verified_certificate(certificate) {
        return format!("agent {agent}");
    }
    if let Ok(client) = ClientIdentity::from_verified_certificate(certificate) {
        return format!("client {client}");
    }
    let hosts: Vec<String> = host_names(certificate).iter().map(ToString::to_string).collect();
    if hosts.is_empty() {
        format!("other: {}", facts.subject)
    } else {
        format!("server {}", hosts.join(", "))
    }
}
