//! The HTTP client of the fleet's API: one kept connection with one request at a time, and a separate connection for each watch.

use super::connection::ConnectionArguments;
use super::failure::{Failure, Outcome, Refusal};
use super::kubeconfig::{Bundle, Context, Kubeconfig, User};
use super::output;
use super::proxy::dial;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::either::Either;
use towline_certs::explain::explain_naming;
use towline_certs::load::{LoadPolicy, Loaded, parse_bundle, parse_credential, system_roots};
use towline_certs::{Credential, FileBytes, ServerName, UpstreamProtocol, tls, tls_error};
use towline_proto::dial::address::Host;
use towline_proto::dial::proxy::Leg;

/// Group and version of everything here.
pub(crate) const API_VERSION: &str = "towline.io/v1alpha1";
const ROOT: &str = "/apis/towline.io/v1alpha1";
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(60);
/// Largest answer: 20,000 objects of the largest kind are less.
const ANSWER_MAX: usize = 512 << 20;
/// Largest event of a watch.
const EVENT_MAX: usize = 16 << 20;
/// A watch without data for this long is restarted: the gateway sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// Largest answer of an error.
const REFUSAL_MAX: usize = 1 << 20;
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
const JSON: &str = "application/json";

/// A gateway and the user's credential.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) context: Context,
    tls: Arc<rustls::ClientConfig>,
    /// For a proxy that speaks TLS.
    proxy_tls: Option<Arc<rustls::ClientConfig>>,
    token: Option<HeaderValue>,
    kept: Mutex<Option<Wire>>,
}

/// One connection.
#[derive(Debug)]
struct Wire {
    sender: SendRequest<Full<Bytes>>,
    _tasks: JoinSet<()>,
}

/// A selection of objects of a kind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Select {
    /// A label selector; all if empty.
    pub(crate) labels: String,
    /// One by its name.
    pub(crate) name: Option<String>,
}

impl Client {
    /// Finds the gateway and the credential from the flags; runs the user's exec plugin if there is one. It does not connect yet.
    pub(crate) fn new(connection: &ConnectionArguments) -> Outcome<Self> {
        Self::of(Kubeconfig::load(connection)?.context(connection)?)
    }

    /// The same for a given context.
    pub(crate) fn of(context: Context) -> Outcome<Self> {
        let (credential, token) = credential(&context)?;
        let roots = match &context.ca {
            Some(bundle) => parse_bundle(&bundle.file()),
            None => system_roots().map(|value| Loaded { value, warnings: Vec::new() }),
        };
        let Loaded { value: roots, warnings } = roots
            .map_err(|error| Failure::usage(format!("the CA of context {:?}: {error}", context.name)))?;
        for warning in warnings {
            output::note(&format!("warning: {warning}"));
        }
        let unusable = |error| Failure::usage(format!("context {:?}: {error}", context.name));
        let config = tls::http_client(&roots, credential.as_ref()).map_err(unusable)?;
        let through_tls = context.proxy.as_ref().is_some_and(|proxy| proxy.speaks_tls());
        let proxy_tls = through_tls.then(|| tls::upstream_client(&roots, None, UpstreamProtocol::Http1));
        let proxy_tls = proxy_tls.transpose().map_err(unusable)?;
        let mut config = rustls::ClientConfig::clone(&config);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let bearer = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
        let mut token = bearer.map_err(|_| {
            Failure::usage(format!(
                "the token of context {:?} contains characters that are not allowed in a token",
                context.name
            ))
        })?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        Ok(Self { context, tls: Arc::new(config), proxy_tls, token, kept: Mutex::new(None) })
    }

    /// One object.
    pub(crate) async fn get(&self, plural: &str, name: &str) -> Outcome<Value> {
        self.json(Method::GET, &path(plural, Some(name)), JSON, None).await
    }

    /// The gateway's version document.
    pub(crate) async fn version(&self) -> Outcome<Value> {
        self.json(Method::GET, "/version", JSON, None).await
    }

    /// The selected objects of a kind, as a list.
    pub(crate) async fn list(&self, plural: &str, select: &Select) -> Outcome<Value> {
        self.json(Method::GET, &format!("{}{}", path(plural, None), select.query('?')), JSON, None).await
    }

    /// The same as the server's table, each row with its complete object.
    pub(crate) async fn table(&self, plural: &str, select: &Select) -> Outcome<Value> {
        let query = format!("{}?includeObject=Object{}", path(plural, None), select.query('&'));
        self.json(Method::GET, &query, TABLE, None).await
    }

    /// Creates an object. Only this response contains secrets.
    pub(crate) async fn create(&self, plural: &str, object: &Value) -> Outcome<Value> {
        self.json(Method::POST, &path(plural, None), JSON, Some(object)).await
    }

    /// A dry run of a creation: the gateway checks everything and creates nothing.
    pub(crate) async fn would_create(&self, plural: &str, object: &Value) -> Outcome<Value> {
        self.json(Method::POST, &format!("{}?dryRun=All", path(plural, None)), JSON, Some(object)).await
    }

    /// Merges a patch (RFC 7386) into an object.
    pub(crate) async fn patch(&self, plural: &str, name: &str, patch: &Value) -> Outcome<Value> {
        self.json(Method::PATCH, &path(plural, Some(name)), JSON, Some(patch)).await
    }

    /// Deletes exactly the object that was read before, and no later one of its name.
    pub(crate) async fn delete(&self, plural: &str, object: &Value) -> Outcome<Value> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let options = json!({"preconditions": {"uid": object["metadata"]["uid"]}});
        self.json(Method::DELETE, &path(plural, Some(name)), JSON, Some(&options)).await
    }

    /// Watches the selected objects from the version of a list; events contain objects or tables.
    pub(crate) async fn watch(
        &self,
        plural: &str,
        select: &Select,
        version: &str,
        table: bool,
    ) -> Outcome<Events> {
        let query = format!(
            "{}?watch=1&allowWatchBookmarks=true&includeObject=Object&resourceVersion={}{}",
            path(plural, None),
            encoded(version),
            select.query('&')
        );
        let mut wire = self.connect().await?;
        let request = self.request(Method::GET, &query, if table { TABLE } else { JSON }, None)?;
        let answer = timeout(ANSWER, wire.sender.send_request(request)).await;
        let answer = answer.map_err(|_| self.silent())?.map_err(|error| self.broken(&error))?;
        if !answer.status().is_success() {
            return Err(self.refused(answer).await);
        }
        Ok(Events { body: answer.into_body(), rest: Vec::new(), _wire: wire })
    }

    /// The gateway's response, or its error.
    async fn json(&self, method: Method, path: &str, accept: &str, body: Option<&Value>) -> Outcome<Value> {
        let answer = self.ask(&method, path, accept, body).await?;
        if !answer.status().is_success() {
            return Err(self.refused(answer).await);
        }
        let bytes = self.body(answer, ANSWER_MAX).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::failed(format!("cannot parse the response of {}: {error}", self.context.gateway))
        })
    }

    async fn ask(
        &self,
        method: &Method,
        path: &str,
        accept: &str,
        body: Option<&Value>,
    ) -> Outcome<Response<Incoming>> {
        let mut kept = self.kept.lock().await;
        let mut wire = match kept.take() {
            Some(wire) if !wire.sender.is_closed() => wire,
            _ => self.connect().await?,
        };
        let request = self.request(method.clone(), path, accept, body)?;
        let answer = timeout(ANSWER, async {
            wire.sender.ready().await?;
            wire.sender.send_request(request).await
        });
        let answer = answer.await.map_err(|_| self.silent())?.map_err(|error| self.broken(&error))?;
        *kept = Some(wire);
        Ok(answer)
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<&Value>,
    ) -> Outcome<Request<Full<Bytes>>> {
        let media = if method == Method::PATCH { "application/merge-patch+json" } else { JSON };
        let authority = self.context.gateway.trim_start_matches("https://");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, authority)
            .header(ACCEPT, accept)
            .header(USER_AGENT, concat!("towline/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        let mut bytes = Bytes::new();
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, media);
            bytes = body.to_string().into();
        }
        request
            .body(Full::new(bytes))
            .map_err(|error| Failure::usage(format!("cannot build a request: {error}")))
    }

    async fn body(&self, answer: Response<Incoming>, most: usize) -> Outcome<Bytes> {
        let body = timeout(ANSWER, Limited::new(answer.into_body(), most).collect());
        let body = body.await.map_err(|_| self.silent())?;
        let body = body.map_err(|error| {
            Failure::failed(format!("the response of {} was cut off: {error}. Retry", self.way()))
        })?;
        Ok(body.to_bytes())
    }

    async fn refused(&self, answer: Response<Incoming>) -> Failure {
        let status = answer.status().as_u16();
        match self.body(answer, REFUSAL_MAX).await {
            Ok(body) => {
                let with_token = self.token.is_some();
                Failure::Refused(Refusal { with_token, ..Refusal::new(status, &body) })
            }
            Err(failure) => failure,
        }
    }

    fn silent(&self) -> Failure {
        Failure::failed(format!("{} did not answer within {} s. Retry", self.way(), ANSWER.as_secs()))
    }

    fn broken(&self, error: &hyper::Error) -> Failure {
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let tls = cause.downcast_ref::<std::io::Error>().and_then(tls_error);
            if let Some(tls) = tls {
                return self.unreachable(&self.explain(tls));
            }
            source = cause.source();
        }
        Failure::failed(format!("the connection to {} was lost: {error}. Retry", self.way()))
    }

    /// The gateway and its proxy, for messages.
    fn way(&self) -> String {
        let Context { gateway, proxy, .. } = &self.context;
        proxy.as_ref().map_or_else(|| gateway.clone(), |proxy| format!("{gateway} through {proxy}"))
    }

    fn explain(&self, error: &rustls::Error) -> String {
        explain_naming(error, &self.bundle())
    }

    /// The name of the CA bundle in errors.
    fn bundle(&self) -> String {
        let from = self.context.ca.as_ref().map(|ca| ca.from.display().to_string());
        from.unwrap_or_else(|| "the system's trust store".to_owned())
    }

    fn unreachable(&self, why: &str) -> Failure {
        let (way, Context { name, .. }) = (self.way(), &self.context);
        Failure::failed(format!(
            "cannot reach {way} (context {name:?}): {why}.\nCheck that the gateway runs and that this machine can connect to it, or choose another context with --context NAME"
        ))
    }

    async fn connect(&self) -> Outcome<Wire> {
        let Context { address, proxy, server_name, .. } = &self.context;
        let name = match (server_name, &address.host) {
            (Some(name), _) => ServerName::try_from(name.clone()).ok(),
            (None, Host::Ip(ip)) => Some(ServerName::from(*ip)),
            (None, Host::Name(name)) => ServerName::try_from(name.to_string()).ok(),
        };
        let name = name.ok_or_else(|| {
            let text = server_name.clone().unwrap_or_else(|| address.host.to_string());
            Failure::usage(format!("{text:?} is not a host name"))
        })?;
        let attempt = timeout(CONNECT, async {
            let leg = match proxy {
                None => Leg::direct(Either::Left(dial(address).await.map_err(|error| error.to_string())?)),
                Some(proxy) => proxy.connect(address, self.proxy_tls.as_ref(), &self.bundle()).await?,
            };
            let shaken = TlsConnector::from(Arc::clone(&self.tls)).connect(name, leg).await;
            shaken.map_err(|error| {
                tls_error(&error).map_or_else(|| error.to_string(), |error| self.explain(error))
            })
        });
        let io = match attempt.await {
            Err(_) => return Err(self.unreachable(&format!("no answer within {} s", CONNECT.as_secs()))),
            Ok(Err(why)) => return Err(self.unreachable(&why)),
            Ok(Ok(io)) => io,
        };
        let (sender, connection) =
            http1::handshake(TokioIo::new(io)).await.map_err(|error| self.broken(&error))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Ok(Wire { sender, _tasks: tasks })
    }
}

/// Certificate or token of the context's user. With a certificate no token is sent, because a plugin's token is for a cluster.
fn credential(context: &Context) -> Outcome<(Option<Credential>, Option<String>)> {
    let Context { name, user, .. } = context;
    match user {
        User::Certificate { chain, key } => Ok((Some(pair(name, chain, key)?), None)),
        User::Token(token) => Ok((None, Some(token.clone()))),
        User::Nobody => Err(Failure::usage(format!(
            "context {name:?} has no user with a client certificate, a token or an exec plugin. Create an admin kubeconfig: towline-gateway --config FILE admin-kubeconfig --output admin.yaml"
        ))),
        User::Plugin(plugin) => {
            let answer = plugin.run()?;
            match answer.certificate {
                Some((chain, key)) => {
                    let from = Path::new(&plugin.command);
                    let bundle = |pem: String| Bundle { pem: pem.into_bytes(), from: from.to_owned() };
                    Ok((Some(pair(name, &bundle(chain), &bundle(key))?), None))
                }
                None => Ok((None, answer.token)),
            }
        }
    }
}

fn pair(context: &str, chain: &Bundle, key: &Bundle) -> Outcome<Credential> {
    // The mode of a kubeconfig file is not checked here; kubectl warns about it.
    let policy = LoadPolicy::STRICT;
    let (chain, key): (FileBytes, FileBytes) = (chain.file(), key.file());
    let loaded = parse_credential(&chain, &key, policy, SystemTime::now()).map_err(|error| {
        Failure::usage(format!(
            "the client certificate of context {context:?}: {error}.\nAn admin certificate is valid for one day. Create a new one: towline-gateway --config FILE admin-kubeconfig --output admin.yaml"
        ))
    })?;
    Ok(loaded.value)
}

fn path(plural: &str, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{ROOT}/{plural}/{}", encoded(name)),
        None => format!("{ROOT}/{plural}"),
    }
}

impl Select {
    /// One by its name.
    pub(crate) fn one(name: &str) -> Self {
        Self { labels: String::new(), name: Some(name.to_owned()) }
    }

    fn query(&self, mut before: char) -> String {
        let mut query = String::new();
        let fields = self.name.as_ref().map(|name| format!("metadata.name={name}")).unwrap_or_default();
        for (name, value) in [("labelSelector", &self.labels), ("fieldSelector", &fields)] {
            if !value.is_empty() {
                query.push_str(&format!("{before}{name}={}", encoded(value)));
                before = '&';
            }
        }
        query
    }
}

/// Percent-encoded for a path or a query.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

/// Events, one after another.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    rest: Vec<u8>,
    _wire: Wire,
}

impl Events {
    /// The next event; `None` when the watch has ended, which is not a failure: start again.
    pub(crate) async fn next(&mut self) -> Outcome<Option<Value>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).map_err(|error| {
                    Failure::failed(format!("cannot parse an event of the watch: {error}"))
                })?;
                if event["type"] == "ERROR" {
                    let status = event["object"]["code"].as_u64().and_then(|code| u16::try_from(code).ok());
                    let body = event["object"].to_string();
                    return Err(Failure::Refused(Refusal::new(status.unwrap_or(500), body.as_bytes())));
                }
                return Ok(Some(event));
            }
            if self.rest.len() > EVENT_MAX {
                return Err(Failure::failed("an event of the watch exceeds the size limit"));
            }
            match timeout(SILENCE, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.rest.extend_from_slice(data);
                    }
                }
                Ok(Some(Err(_)) | None) | Err(_) => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_selectors_stay_inside_their_place() {
        assert_eq!(path("clusters", Some("../x?y")), "/apis/towline.io/v1alpha1/clusters/..%2Fx%3Fy");
        let select = Select { labels: "a in (b,c)".to_owned(), name: Some("n".to_owned()) };
        assert_eq!(select.query('?'), "?labelSelector=a%20in%20%28b%2Cc%29&fieldSelector=metadata.name%3Dn");
    }
}
