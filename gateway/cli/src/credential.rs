//! `towline credential`: the exec plugin in the kubeconfigs that `towline kubeconfig` writes. It returns both credentials at once, the
//! certificate for the gateway and the token for the cluster, because kubectl takes a user's credentials from one source.

use super::cache::{self, KeptCertificate};
use super::client::{API_VERSION, Client};
use super::connection::ConnectionArguments;
use super::exec::{EXEC_INFO, GROUP, Plugin};
use super::failure::{Failure, Outcome};
use super::kubeconfig::Kubeconfig;
use super::output;
use super::token::duration;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use towline_certs::load::{LoadPolicy, parse_credential};
use towline_certs::save::key_pem;
use towline_certs::{AgentKey, FileBytes};
use towline_model::Time;

const EXAMPLES: &str =
    "Examples (kubectl runs this command; `towline kubeconfig` writes it into a kubeconfig):
  towline credential --context towline
  towline credential --context towline --wrap -- aws eks get-token --cluster-name prod
  towline credential --context towline --token-file /var/run/secrets/tokens/prod
";

const LIVES: &str = "The certificate identifies the context's user. It is valid for an hour unless --expires says otherwise, for a day at most, and never \
longer than the context's own certificate or token. An admin kubeconfig, which is valid for a day, is therefore good for a day of \
certificates; the token of an AccessToken is good until it expires. The certificate is cached in $XDG_CACHE_HOME/towline or ~/.cache/towline.";

/// Print an ExecCredential for kubectl.
#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = LIVES)]
pub(crate) struct CredentialCommand {
    #[command(flatten)]
    source: Source,
    /// Lifetime of the certificate to request, 1m to 24h.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    expires: Duration,
    /// Request a new certificate even if the cached one is still valid.
    #[arg(long)]
    no_cache: bool,
}

/// Where the cluster's own credential comes from.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Source {
    /// Run the exec plugin given after --, and return its token together with the certificate.
    #[arg(long, requires = "plugin", conflicts_with = "token_file")]
    wrap: bool,
    /// Read the token from this file on every call, and return it together with the certificate.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Exec plugin to wrap, with its arguments.
    #[arg(last = true, value_name = "PLUGIN", requires = "wrap")]
    plugin: Vec<String>,
}

/// A token for the cluster and when it ends.
struct Token {
    token: String,
    expires: Option<Time>,
}

impl Source {
    /// The arguments of `towline credential`. Paths are absolute, because kubectl may run it from any directory.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let whole =
            |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string();
        let mut arguments = Vec::new();
        if let Some(file) = &self.token_file {
            arguments.extend(["--token-file".to_owned(), whole(file)]);
        }
        if let Some((command, rest)) = self.plugin.split_first() {
            let command = if command.contains('/') { whole(Path::new(command)) } else { command.clone() };
            arguments.extend(["--wrap".to_owned(), "--".to_owned(), command]);
            arguments.extend(rest.iter().cloned());
        }
        arguments
    }

    /// Whether a plugin may ask the user something.
    pub(crate) const fn is_plugin(&self) -> bool {
        self.wrap
    }

    /// Whether the cluster gets its own credential.
    pub(crate) const fn is_something(&self) -> bool {
        self.wrap || self.token_file.is_some()
    }

    fn token(&self) -> Outcome<Option<Token>> {
        if let Some(path) = &self.token_file {
            let text = std::fs::read_to_string(path)
                .map_err(|error| Failure::failed(format!("--token-file {}: {error}", path.display())))?;
            let token = text.trim().to_owned();
            if token.is_empty() {
                return Err(Failure::failed(format!("--token-file {} is empty", path.display())));
            }
            return Ok(Some(Token { expires: jwt_end(&token), token }));
        }
        let Some(plugin) = Plugin::wrapped(&self.plugin) else { return Ok(None) };
        let answer = plugin.run()?;
        let token = answer.token.ok_or_else(|| {
            Failure::failed(format!(
                "the plugin {:?} returned a certificate instead of a token. The gateway forwards only a token to the cluster; the client certificate of the connection is Towline's own",
                plugin.command
            ))
        })?;
        Ok(Some(Token { token, expires: answer.expires }))
    }
}

/// Certificate and token together.
pub(crate) struct Both {
    certificate: KeptCertificate,
    token: Option<Token>,
}

impl Both {
    /// When the first of them ends.
    pub(crate) fn expires(&self) -> Time {
        let token = self.token.as_ref().and_then(|token| token.expires);
        token.map_or(self.certificate.expires, |token| token.min(self.certificate.expires))
    }

    /// In the form of a kubeconfig user.
    pub(crate) fn user(&self) -> Value {
        let KeptCertificate { chain, key, .. } = &self.certificate;
        let mut user = json!({"client-certificate-data": STANDARD.encode(chain), "client-key-data": STANDARD.encode(key)});
        if let Some(token) = &self.token {
            user["token"] = token.token.clone().into();
        }
        user
    }
}

impl Source {
    /// Obtains both credentials.
    pub(crate) async fn both(&self, client: &Client, life: Duration) -> Outcome<Both> {
        let token = self.token()?;
        Ok(Both { certificate: request(client, life).await?, token })
    }
}

impl CredentialCommand {
    pub(crate) async fn run(&self, connection: &ConnectionArguments) -> Outcome {
        let version = asked_version(std::env::var(EXEC_INFO).ok().as_deref())?;
        let certificate = self.certificate(connection).await?;
        let both = Both { certificate, token: self.source.token()? };
        output::line(&answer(&version, &both).to_string())
    }

    async fn certificate(&self, connection: &ConnectionArguments) -> Outcome<KeptCertificate> {
        let context = Kubeconfig::load(connection)?.context(connection)?;
        let place = cache::place(&context, self.expires);
        if !self.no_cache
            && let Some(kept) = place.as_deref().and_then(cache::read)
            && kept.is_fresh(Time::now())
        {
            return Ok(kept);
        }
        let certificate = request(&Client::of(context)?, self.expires).await?;
        if let Some(place) = &place
            && let Err(error) = cache::write(place, &certificate)
        {
            output::note(&format!("cannot cache the certificate, so every call requests a new one: {error}"));
        }
        Ok(certificate)
    }
}

/// Requests a certificate from the gateway for a new key.
async fn request(client: &Client, life: Duration) -> Outcome<KeptCertificate> {
    let key = AgentKey::generate().map_err(|error| Failure::failed(error.to_string()))?;
    let request = key.csr_der().map_err(|error| Failure::failed(error.to_string()))?;
    let object = json!({
        "apiVersion": API_VERSION, "kind": "CredentialRequest", "metadata": {},
        "spec": {"request": STANDARD.encode(pem_request(&request)), "expirationSeconds": life.as_secs()},
    });
    let issued = Time::now();
    let made = client.create("credentialrequests", &object).await?;
    let odd = |what: &str| Failure::failed(format!("{} answered {what}", client.context.gateway));
    let chain = made["status"]["certificate"].as_str().and_then(|text| STANDARD.decode(text).ok());
    let chain = chain.ok_or_else(|| odd("without a certificate"))?;
    let expires = made["status"]["expires"].as_str().and_then(Time::parse);
    let expires = expires.ok_or_else(|| odd("without the expiry of the certificate"))?;
    let key = key_pem(&key.private_key()).to_string();
    // Check that key and certificate match: kubectl's error would say less.
    let file = |name: &str, bytes: &[u8]| FileBytes::from_memory(Path::new(name), bytes.to_vec());
    let (chain_file, key_file) =
        (file("the gateway's response", &chain), file("the new key", key.as_bytes()));
    parse_credential(&chain_file, &key_file, LoadPolicy::LENIENT, SystemTime::now())
        .map_err(|error| odd(&format!("a certificate for another key than the requested one: {error}")))?;
    let chain = String::from_utf8(chain).map_err(|_| odd("a certificate that is not PEM"))?;
    Ok(KeptCertificate { chain, key, issued, expires })
}

fn pem_request(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = "-----BEGIN CERTIFICATE REQUEST-----\n".to_owned();
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE REQUEST-----\n");
    pem
}

/// The version that kubectl requests; the newest by default.
fn asked_version(info: Option<&str>) -> Outcome<String> {
    let newest = format!("{GROUP}/v1");
    let Some(info) = info.filter(|info| !info.is_empty()) else { return Ok(newest) };
    let info: Value = serde_json::from_str(info)
        .map_err(|error| Failure::usage(format!("cannot parse {EXEC_INFO}: {error}")))?;
    match info["apiVersion"].as_str() {
        Some(version) if version == newest || version == format!("{GROUP}/v1beta1") => Ok(version.to_owned()),
        other => Err(Failure::usage(format!(
            "{EXEC_INFO} asks for {}, but this plugin supports {GROUP}/v1 and v1beta1. Write the kubeconfig entry again: towline kubeconfig CLUSTER",
            other.unwrap_or("no version")
        ))),
    }
}

/// Both credentials, valid until the earlier expiry.
fn answer(version: &str, both: &Both) -> Value {
    let KeptCertificate { chain, key, .. } = &both.certificate;
    let mut status = json!({
        "clientCertificateData": chain, "clientKeyData": key, "expirationTimestamp": both.expires(),
    });
    if let Some(token) = &both.token {
        status["token"] = token.token.clone().into();
    }
    json!({"apiVersion": version, "kind": "ExecCredential", "status": status})
}

/// The `exp` of a JWT; nothing else of it is used, and it is not verified.
fn jwt_end(token: &str) -> Option<Time> {
    let mut parts = token.split('.');
    let (_, claims, _) = (parts.next()?, parts.next()?, parts.next()?);
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    let end = Duration::from_secs(claims["exp"].as_u64()?);
    SystemTime::UNIX_EPOCH.checked_add(end).map(Time::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Time {
        Time::parse(text).unwrap()
    }

    /// Goal: both credentials come from one source, and are requested again when the first of them expires.
    #[test]
    fn an_answer_holds_both_and_ends_with_the_first() {
        let both = |token: Option<Token>| Both {
            certificate: KeptCertificate {
                chain: "CHAIN".to_owned(),
                key: "KEY".to_owned(),
                issued: time("2030-01-01T00:00:00Z"),
                expires: time("2030-01-01T01:00:00Z"),
            },
            token,
        };
        for (token_ends, ends) in [
            (Some("2030-01-01T00:15:00Z"), "2030-01-01T00:15:00Z"),
            (Some("2030-01-01T02:00:00Z"), "2030-01-01T01:00:00Z"),
            (None, "2030-01-01T01:00:00Z"),
        ] {
            let both = both(Some(Token { token: "T".to_owned(), expires: token_ends.map(time) }));
            let told = answer("client.authentication.k8s.io/v1beta1", &both);
            assert_eq!(told["apiVersion"], "client.authentication.k8s.io/v1beta1");
            let status = json!({
                "clientCertificateData": "CHAIN", "clientKeyData": "KEY", "token": "T", "expirationTimestamp": ends,
            });
            assert_eq!(told["status"], status);
        }
        assert!(answer("v", &both(None))["status"].get("token").is_none());
    }

    #[test]
    fn versions_are_those_that_kubectl_asks_for() {
        let ask = |version: &str| asked_version(Some(&json!({"apiVersion": version}).to_string()));
        assert_eq!(asked_version(None).unwrap(), "client.authentication.k8s.io/v1");
        for version in ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"] {
            assert_eq!(ask(version).unwrap(), version);
        }
        assert!(ask("client.authentication.k8s.io/v1alpha1").is_err() && asked_version(Some("{")).is_err());
    }

    #[test]
    fn the_end_of_a_jwt_is_read() {
        let token = format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(r#"{"exp":1893456000}"#));
        assert_eq!(jwt_end(&token), Some(time("2030-01-01T00:00:00Z")));
        for other in ["opaque", "a.b.c", "e30.e30.x"] {
            assert_eq!(jwt_end(other), None, "{other}");
        }
    }
}
