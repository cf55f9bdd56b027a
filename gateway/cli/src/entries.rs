//! `towline kubeconfig`: writes the kubeconfig entries with which kubectl reaches clusters through the gateway.

use super::client::{Client, Select};
use super::connection::{ConnectionArguments, name};
use super::credential::Source;
use super::exec::GROUP;
use super::failure::{Failure, Outcome};
use super::kubeconfig::{self, Context, Kubeconfig, User};
use super::kubefile::{self, Entry, Origin};
use super::token::duration;
use super::{output, show};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use towline_certs::CertificateFacts;
use towline_certs::load::parse_certificates;
use towline_certs::text::human;
use towline_model::Time;

const EXAMPLES: &str = "Examples:
  towline kubeconfig prod --set-current
  towline kubeconfig prod --wrap -- aws eks get-token --cluster-name prod
  towline kubeconfig --all --output fleet.yaml
  towline kubeconfig prod --output - > prod.yaml
  towline kubeconfig prod --static --token-file token    for Python and Ansible
";

const ABOUT: &str = "The entries are written to --output, or else to --kubeconfig, the first file of $KUBECONFIG, or ~/.kube/config (not $TOWLINE_KUBECONFIG, which kubectl does not read), under kubectl's lock. Comments in the \
file are lost; everything else is kept. An entry of the same name for another cluster or gateway is never overwritten.

kubectl then runs `towline credential`, which requests a certificate from the gateway as the user of the gateway's context. In \
restricted mode the cluster needs its own credential in addition: --wrap runs its exec plugin and returns both, --token-file \
reads a token. A certificate never outlives the credential that requested it: with an admin kubeconfig, a day.

--static writes the certificate and the token themselves instead of a plugin: for clients that take only one of the two from a plugin, such as Python's \
`kubernetes` and therefore Ansible, and for machines without this program. Run the command again before they expire.";

/// Write kubeconfig entries for clusters behind the gateway.
#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = ABOUT)]
pub(crate) struct Entries {
    /// Name of the cluster.
    #[arg(required_unless_present = "all", conflicts_with = "all", value_parser = show::cluster_name)]
    cluster: Option<String>,
    /// Write entries for all clusters of the fleet.
    #[arg(long)]
    all: bool,
    /// With --all: only clusters with these labels.
    #[arg(
        short = 'l',
        long,
        value_name = "SELECTOR",
        requires = "all",
        default_value = "",
        hide_default_value = true
    )]
    selector: String,
    /// Name of the entry [default: prefix and cluster name].
    #[arg(long, conflicts_with = "all")]
    name: Option<String>,
    /// Prefix of the entries' names.
    #[arg(long, default_value = "towline-")]
    prefix: String,
    /// File to write to; - for stdout, with only the new entries.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Make the entry the current context.
    #[arg(long, conflicts_with = "all")]
    set_current: bool,
    /// Namespace of the context.
    #[arg(long)]
    namespace: Option<String>,
    /// Version of the exec API in the entry; kubectl before 1.22 supports only v1beta1.
    #[arg(long, value_enum, default_value_t)]
    exec_api: ExecApi,
    /// Write the certificate and the token themselves instead of a plugin. The file is then a secret.
    #[arg(long = "static", conflicts_with_all = ["all", "exec_api"])]
    fixed: bool,
    /// With --static: lifetime of the certificate to request, 1m to 24h.
    #[arg(long, value_name = "TIME", requires = "fixed", default_value = "24h", value_parser = duration)]
    expires: Duration,
    #[command(flatten)]
    source: Source,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ExecApi {
    #[default]
    V1,
    V1beta1,
}

impl Entries {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        self.check(std::io::stdout().is_terminal())?;
        // Use the gateway's own context, not an entry that was written from it.
        let client = Client::of(Kubeconfig::gateways(connection)?)?;
        let clusters = self.clusters(&client).await?;
        if clusters.is_empty() {
            return Err(Failure::failed(format!(
                "no cluster to write. Register one: {} cluster register NAME",
                name()
            )));
        }
        let both = if self.fixed { Some(self.source.both(&client, self.expires).await?) } else { None };
        let user = match &both {
            Some(both) => both.user(),
            None => self.plugin(&client.context),
        };
        let entries: Vec<Entry> =
            clusters.iter().map(|cluster| self.entry(&client.context, &cluster.name, &user)).collect();
        let to_stdout = self.to_stdout();
        let current = (self.set_current || (to_stdout && !self.all)).then(|| entries[0].name.as_str());
        if to_stdout {
            output::bytes(kubefile::alone(&entries, current)?.as_bytes())?;
        } else {
            let path = self.place(connection)?;
            kubefile::write(&path, &entries, current)?;
            for entry in &entries {
                output::line(&entry.name)?;
            }
            output::note(&format!(
                "written to {}. Next: kubectl --context {} get nodes",
                path.display(),
                entries[0].name
            ));
        }
        self.advise(&client.context, &clusters);
        if let Some(both) = both {
            output::note(&format!(
                "The file is a secret, and its credentials expire in {}. Run this command again before that",
                human(both.expires().since(Time::now()))
            ));
        }
        Ok(())
    }

    fn to_stdout(&self) -> bool {
        self.output.as_deref() == Some(Path::new("-"))
    }

    /// Before anything is asked for.
    fn check(&self, terminal: bool) -> Outcome {
        if self.fixed && self.to_stdout() && terminal {
            return Err(Failure::usage(
                "refusing to print a private key on the terminal: write it to a file with --output FILE, or pipe it",
            ));
        }
        Ok(())
    }

    /// Additional hints.
    fn advise(&self, context: &Context, clusters: &[Meant]) {
        let restricted: Vec<_> =
            clusters.iter().filter(|cluster| cluster.mode.as_deref() == Some("restricted")).collect();
        if let Some(first) = restricted.first()
            && !self.source.is_something()
        {
            output::note(&format!(
                "{} in restricted mode and also needs the cluster's own credential. With an exec plugin: {} kubeconfig {} --wrap -- PLUGIN ARGUMENTS…; with a token in a file: --token-file FILE",
                if restricted.len() == 1 {
                    format!("{} is", first.name)
                } else {
                    format!("{} clusters are", restricted.len())
                },
                name(),
                first.name
            ));
        }
        if !self.fixed
            && let User::Certificate { chain, .. } = &context.user
            && let Ok(certificates) = parse_certificates(&chain.file())
            && let Some(facts) = certificates.first().and_then(|leaf| CertificateFacts::of(leaf).ok())
        {
            let left = facts.not_after.duration_since(SystemTime::now()).unwrap_or_default();
            output::note(&format!(
                "This access expires in {}, with the certificate of context {:?}. For longer access use an AccessToken (docs/cli.md#longer-than-a-day)",
                human(left),
                context.name
            ));
        }
    }

    async fn clusters(&self, client: &Client) -> Outcome<Vec<Meant>> {
        let meant = |object: &Value| Meant {
            name: output::text(&object["metadata"]["name"]),
            mode: object["spec"]["mode"].as_str().map(ToOwned::to_owned),
        };
        let Some(cluster) = &self.cluster else {
            let select = Select { labels: self.selector.clone(), name: None };
            let list = client.list("clusters", &select).await?;
            // A name becomes part of a URL.
            let all = list["items"].as_array().into_iter().flatten().map(meant);
            return Ok(all.filter(|cluster| is_name(&cluster.name)).collect());
        };
        match show::find(client, "clusters", cluster).await {
            Ok(object) => Ok(vec![meant(&object)]),
            // A user of a cluster need not be allowed to list the fleet.
            Err(failure) if failure.is_forbidden() && is_name(cluster) => {
                output::note(&format!(
                    "cannot check whether cluster {cluster:?} exists: you are not allowed to list the fleet"
                ));
                Ok(vec![Meant { name: cluster.clone(), mode: None }])
            }
            Err(failure) => Err(failure),
        }
    }

    fn entry(&self, context: &Context, cluster: &str, user: &Value) -> Entry {
        let mut server = json!({"server": format!("{}/clusters/{cluster}", context.gateway)});
        if let Some(ca) = &context.ca {
            server["certificate-authority-data"] = STANDARD.encode(&ca.pem).into();
        }
        if let Some(server_name) = &context.server_name {
            server["tls-server-name"] = server_name.clone().into();
        }
        if let Some(proxy_url) = &context.proxy_url {
            server["proxy-url"] = proxy_url.clone().into();
        }
        Entry {
            name: self.name.clone().unwrap_or_else(|| format!("{}{cluster}", self.prefix)),
            cluster: server,
            user: user.clone(),
            namespace: self.namespace.clone(),
            origin: Origin {
                gateway: context.gateway.clone(),
                cluster: cluster.to_owned(),
                context: context.name.clone(),
                files: context.files.clone(),
            },
        }
    }

    /// A kubeconfig user whose exec plugin is this program.
    fn plugin(&self, context: &Context) -> Value {
        let mut arguments = vec!["credential".to_owned()];
        for file in &context.files {
            arguments.extend(["--kubeconfig".to_owned(), file.display().to_string()]);
        }
        arguments.extend(["--context".to_owned(), context.name.clone()]);
        arguments.extend(self.source.arguments());
        let version = match self.exec_api {
            ExecApi::V1 => "v1",
            ExecApi::V1beta1 => "v1beta1",
        };
        json!({"exec": {
            "apiVersion": format!("{GROUP}/{version}"),
            "command": command(),
            "args": arguments,
            // Only a wrapped plugin may need to ask the user.
            "interactiveMode": if self.source.is_plugin() { "IfAvailable" } else { "Never" },
            "provideClusterInfo": false,
            "installHint": concat!(
                "Install the program towline, version ", env!("CARGO_PKG_VERSION"),
                " as the gateway's, and put it in $PATH (docs/cli.md). Without it: towline kubeconfig --static"
            ),
        }})
    }

    /// The target file.
    fn place(&self, connection: &ConnectionArguments) -> Outcome<PathBuf> {
        if let Some(file) = &self.output {
            return Ok(file.clone());
        }
        let first = connection.kubeconfig.first().cloned().or_else(kubeconfig::kubectls);
        first.ok_or_else(|| Failure::usage("no home directory found; name a file with --output FILE"))
    }
}

/// A cluster to write an entry for.
struct Meant {
    name: String,
    mode: Option<String>,
}

/// Whether the name can be part of a URL unchanged.
fn is_name(cluster: &str) -> bool {
    towline_model::ClusterName::new(cluster).is_ok()
}

/// The command for kubectl: this program's name if `$PATH` resolves to it, else its path.
fn command() -> String {
    let Ok(here) = std::env::current_exe() else { return "towline".to_owned() };
    let places = std::env::var_os("PATH").unwrap_or_default();
    let mut found =
        std::env::split_paths(&places).map(|place| place.join("towline")).filter(|path| path.is_file());
    let whole = |path: &Path| path.canonicalize().ok();
    match found.next() {
        Some(first) if whole(&first).is_some() && whole(&first) == whole(&here) => "towline".to_owned(),
        _ => here.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches as _;

    /// Goal: D43: a private key is never printed on a terminal; output without a secret may be.
    #[test]
    fn d43_no_private_key_on_a_terminal() {
        let of = |words: &[&str]| {
            let command = Entries::augment_args(clap::Command::new("towline"));
            let words = ["towline", "prod"].iter().chain(words);
            Entries::from_arg_matches(&command.try_get_matches_from(words).unwrap()).unwrap()
        };
        let fixed = of(&["--static", "--output", "-"]);
        assert_eq!(fixed.check(true).unwrap_err().code(), 2);
        for (entries, terminal) in [
            (fixed, false),
            (of(&["--static", "--output", "file"]), true),
            (of(&["--static"]), true),
            (of(&["--output", "-"]), true),
        ] {
            assert!(entries.check(terminal).is_ok(), "{entries:?}");
        }
    }
}
