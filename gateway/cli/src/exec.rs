//! Runs an exec plugin as kubectl does, with the user's terminal and environment, and parses the `ExecCredential` on its stdout.

use super::failure::{Failure, Outcome};
use serde_json::{Value, json};
use std::io::IsTerminal as _;
use std::process::{Command, Stdio};
use towline_model::Time;

/// The API group of exec plugins.
pub(crate) const GROUP: &str = "client.authentication.k8s.io";
/// The variable with the caller's information for a plugin.
pub(crate) const EXEC_INFO: &str = "KUBERNETES_EXEC_INFO";
/// The variable that counts nested calls of this plugin.
const DEPTH: &str = "TOWLINE_CREDENTIAL_DEPTH";

/// Prevents endless recursion of a context whose user is this plugin with the same context.
const DEPTH_MOST: u32 = 4;

/// A program with its arguments and environment.
#[derive(Debug)]
pub(crate) struct Plugin {
    pub(crate) command: String,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    /// `client.authentication.k8s.io/v1` or another version.
    version: String,
}

/// The plugin's response.
pub(crate) struct Answer {
    pub(crate) token: Option<String>,
    /// Chain and key, PEM.
    pub(crate) certificate: Option<(String, String)>,
    pub(crate) expires: Option<Time>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("expires", &self.expires).finish_non_exhaustive()
    }
}

impl Plugin {
    /// The `exec` of a kubeconfig's user.
    pub(crate) fn from_kubeconfig(exec: &Value) -> Option<Self> {
        let texts = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(ToOwned::to_owned).collect()
        };
        let pair = |entry: &Value| {
            Some((entry["name"].as_str()?.to_owned(), entry["value"].as_str().unwrap_or_default().to_owned()))
        };
        Some(Self {
            command: exec["command"].as_str().filter(|command| !command.is_empty())?.to_owned(),
            arguments: texts(&exec["args"]),
            environment: exec["env"].as_array().into_iter().flatten().filter_map(pair).collect(),
            version: exec["apiVersion"].as_str().unwrap_or_default().to_owned(),
        })
    }

    /// A command line whose program gets the caller's information unchanged.
    pub(crate) fn wrapped(words: &[String]) -> Option<Self> {
        let (command, arguments) = words.split_first()?;
        Some(Self {
            command: command.clone(),
            arguments: arguments.to_vec(),
            environment: Vec::new(),
            version: String::new(),
        })
    }

    /// Runs it to its end.
    pub(crate) fn run(&self) -> Outcome<Answer> {
        let Self { command, arguments, environment, version } = self;
        let depth = std::env::var(DEPTH).ok().and_then(|depth| depth.parse::<u32>().ok()).unwrap_or(0);
        if depth >= DEPTH_MOST {
            return Err(Failure::usage(
                "the contexts of the kubeconfig form a loop: each runs a plugin that asks another context. Name the gateway's own context with --context",
            ));
        }
        let mut process = Command::new(command);
        process.env(DEPTH, (depth + 1).to_string());
        process.args(arguments).stdin(Stdio::inherit()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        process.envs(environment.iter().map(|(name, value)| (name, value)));
        // A wrapped plugin gets kubectl's information; a kubeconfig's plugin is asked in the version of its entry.
        let told = std::env::var(EXEC_INFO).ok().filter(|text| version.is_empty() && !text.is_empty());
        if told.is_none() {
            let version = if version.is_empty() { format!("{GROUP}/v1") } else { version.clone() };
            let interactive = std::io::stdin().is_terminal();
            let info = json!({"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": interactive}});
            process.env(EXEC_INFO, info.to_string());
        }
        let output = process.output().map_err(|error| {
            Failure::failed(format!(
                "cannot run the plugin {command:?}: {error}. Check that it is installed and in $PATH"
            ))
        })?;
        if !output.status.success() {
            // Its message is already on stderr.
            let how = output
                .status
                .code()
                .map_or_else(|| output.status.to_string(), |code| format!("exit code {code}"));
            return Err(Failure::failed(format!("the plugin {command:?} failed: {how}")));
        }
        Answer::parse(&output.stdout).map_err(|why| {
            Failure::failed(format!("the plugin {command:?} returned no ExecCredential: {why}"))
        })
    }
}

impl Answer {
    /// The error never quotes the text, which may contain a secret.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let object: Value =
            serde_json::from_slice(text).map_err(|error| format!("line {} is not JSON", error.line()))?;
        let version = object["apiVersion"].as_str().unwrap_or_default();
        if object["kind"] != "ExecCredential" || version.split('/').next() != Some(GROUP) {
            return Err(format!("it is not an ExecCredential of {GROUP}"));
        }
        let status = &object["status"];
        let text =
            |field: &str| status[field].as_str().filter(|text| !text.is_empty()).map(ToOwned::to_owned);
        let expires = match text("expirationTimestamp") {
            None => None,
            Some(time) => {
                Some(Time::parse(&time).ok_or("its expirationTimestamp is not an RFC 3339 timestamp")?)
            }
        };
        let certificate = text("clientCertificateData").zip(text("clientKeyData"));
        let token = text("token");
        if token.is_none() && certificate.is_none() {
            return Err("it has neither a token nor a certificate with its key".to_owned());
        }
        Ok(Self { token, certificate, expires })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Outcome<Answer> {
        Plugin::wrapped(&["sh".into(), "-c".into(), script.into()]).unwrap().run()
    }

    #[test]
    fn a_plugin_is_told_and_answers() {
        let answer = shell(r#"echo "$KUBERNETES_EXEC_INFO" | grep -q '"interactive"' || exit 9
            echo '{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential","status":{"token":"t","expirationTimestamp":"2030-01-01T00:00:00Z"}}'"#).unwrap();
        assert_eq!(
            (answer.token.as_deref(), answer.expires),
            (Some("t"), Time::parse("2030-01-01T00:00:00Z"))
        );
    }

    #[test]
    fn a_plugin_that_fails_is_named_and_its_secrets_are_not() {
        for (script, wanted) in [
            ("exit 7", "\"sh\" failed: exit code 7"),
            ("kill -9 $$", "signal"),
            ("echo s3cret", "not JSON"),
            (r#"echo '{"token":"s3cret"}'"#, "not an ExecCredential"),
            (
                r#"echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"clientKeyData":"s3cret"}}'"#,
                "neither a token",
            ),
            (
                r#"echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"s3cret","expirationTimestamp":"soon"}}'"#,
                "RFC 3339",
            ),
        ] {
            let text = shell(script).unwrap_err().text().unwrap();
            assert!(text.contains(wanted) && !text.contains("s3cret"), "{script}: {text}");
        }
        let missing = Plugin::wrapped(&["/nowhere/plugin".into()]).unwrap().run().unwrap_err();
        assert!(missing.text().unwrap().contains("/nowhere/plugin"), "{missing:?}");
    }
}
