//! The private port: a plain-HTTP listener for probes and Prometheus. It serves GET only, and refuses browsers.
//!
//! Ready means that this process can serve: it accepts, a TLS handshake with its own port succeeds, and it is not draining. Readiness does
//! not depend on agents: an absent fleet is no reason to restart its gateway.
//!
//! A connection carries one request. It waits in one room until its head is complete and in another one while it is answered; probes
//! have a room of their own. Neither silent connections nor scrapes therefore delay a probe.

mod room;

use crate::access::Access;
use crate::config::ClusterRoute;
use crate::context::Context;
use crate::listener::self_checks::SelfChecks;
use crate::metrics::{Limit, Metrics, Surface, TlCode};
use crate::registry::Registry;
use crate::registry::trust::{TrustBoard, TrustState};
use crate::shares::Shares;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use room::{Place, Room};
use rustls::CertificateError;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use towline_certs::text::human;
use towline_certs::{ClusterUid, ServerName, tls_error};

/// Limits for connections without a complete request, for probes being answered, and for other requests: in total, and for
/// one address. Beyond a limit the oldest connection is closed.
const SILENT_MAX: (usize, usize) = (64, 16);
const PROBES_MAX: (usize, usize) = (64, 16);
const SCRAPES_MAX: (usize, usize) = (8, 4);
/// All of them.
pub(crate) const CONNECTIONS_MOST: usize = SILENT_MAX.0 + PROBES_MAX.0 + SCRAPES_MAX.0;
/// Time limits for a request's head, and for the whole connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The self-check handshake: its time limit, and how long its result is valid.
const SELF_CHECK_TIMEOUT: Duration = Duration::from_secs(2);
const SELF_CHECK_FRESH: Duration = Duration::from_secs(5);

/// What the admin listener needs.
#[derive(Debug)]
pub(crate) struct Admin {
    context: Arc<Context>,
    registry: Arc<Registry>,
    trust: Arc<TrustBoard>,
    /// Receive memory of the sessions.
    memory: Arc<Shares<ClusterUid>>,
    access: Arc<Access>,
    self_checks: Arc<SelfChecks>,
    public: SocketAddr,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
    silent: Arc<Room>,
    probes: Arc<Room>,
    scrapes: Arc<Room>,
    /// Permits one rendering of the metrics at a time.
    rendering: Arc<Semaphore>,
}

impl Admin {
    pub(crate) fn new(
        context: &Arc<Context>,
        registry: &Arc<Registry>,
        trust: &Arc<TrustBoard>,
        memory: &Arc<Shares<ClusterUid>>,
        access: &Arc<Access>,
        self_checks: &Arc<SelfChecks>,
        public: SocketAddr,
    ) -> Arc<Self> {
        let room = |(places, per_address)| Room::new(places, per_address);
        let (silent, probes, scrapes) = (room(SILENT_MAX), room(PROBES_MAX), room(SCRAPES_MAX));
        let rendering = Arc::new(Semaphore::new(1));
        Arc::new(Self {
            context: Arc::clone(context),
            registry: Arc::clone(registry),
            trust: Arc::clone(trust),
            memory: Arc::clone(memory),
            access: Arc::clone(access),
            self_checks: Arc::clone(self_checks),
            public,
            last: Mutex::new(None),
            silent,
            probes,
            scrapes,
            rendering,
        })
    }

    /// Serves until the gateway has stopped.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener) {
        let tracker = self.context.tasks.house.clone();
        let abort = self.context.stages.abort.clone();
        let accept = async {
            loop {
                match listener.accept().await {
                    Ok((socket, peer)) => {
                        let (this, leave) = (Arc::clone(&self), abort.child_token());
                        let place = this.enter(&this.silent, peer.ip(), &leave);
                        tracker.spawn(leave.clone().run_until_cancelled_owned(async move {
                            drop(timeout(CONNECTION_TIMEOUT, this.serve(socket, peer, place, leave)).await);
                        }));
                    }
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            }
        };
        tokio::select! {
            () = accept => {}
            () = abort.cancelled() => {}
        }
    }

    fn enter(&self, room: &Arc<Room>, address: IpAddr, leave: &CancellationToken) -> Place {
        let (place, displaced) = room.enter(address, leave.clone());
        if displaced {
            self.context.metrics.limit_reached(Limit::AdminConnections);
        }
        place
    }

    /// Answers one request. When its head is complete, `place` is exchanged for one in another room.
    async fn serve(
        self: &Arc<Self>,
        socket: TcpStream,
        peer: SocketAddr,
        place: Place,
        leave: CancellationToken,
    ) {
        let local = socket.local_addr().ok();
        let place = Arc::new(std::sync::Mutex::new(place));
        let service = service_fn(|request: Request<Incoming>| {
            let is_probe = request.uri().path() != "/metrics" && request.uri().path() != "/tunnel-ca";
            let room = if is_probe { &self.probes } else { &self.scrapes };
            *place.lock().unwrap_or_else(PoisonError::into_inner) = self.enter(room, peer.ip(), &leave);
            let this = Arc::clone(self);
            async move { Ok::<_, Infallible>(this.answer(&request, local, peer).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .keep_alive(false)
            .max_headers(64)
            .max_buf_size(16 * 1024)
            .serve_connection(TokioIo::new(socket), service);
        if let Err(error) = connection.await {
            tracing::debug!(%error, "admin connection ended");
        }
    }

    async fn answer<B>(
        self: &Arc<Self>,
        request: &Request<B>,
        local: Option<SocketAddr>,
        peer: SocketAddr,
    ) -> Response<Full<Bytes>> {
        if let Err(why) = is_for_us(request.headers(), local) {
            self.context.metrics.rejected(Surface::Admin, TlCode::Forbidden);
            return text(StatusCode::FORBIDDEN, why);
        }
        let path = request.uri().path();
        let known = matches!(path, "/livez" | "/healthz" | "/readyz" | "/metrics" | "/tunnel-ca")
            || path.strip_prefix("/readyz/").is_some();
        if !known {
            return text(
                StatusCode::NOT_FOUND,
                "not found; there are /livez, /readyz, /healthz, /metrics and /tunnel-ca\n",
            );
        }
        if request.method() != Method::GET {
            self.context.metrics.rejected(Surface::Admin, TlCode::BadFraming);
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
            return response;
        }
        match path {
            "/livez" | "/healthz" => text(StatusCode::OK, "ok"),
            "/metrics" => self.metrics(self.names_clusters_to(local, peer)).await,
            "/tunnel-ca" if !self.names_clusters_to(local, peer) => text(
                StatusCode::FORBIDDEN,
                "cluster names are shown only to this machine: ask from it, or set admin.clusterNames\n",
            ),
            "/tunnel-ca" => text(StatusCode::OK, self.tunnel_ca()),
            "/readyz" => self.ready(request.uri().query().unwrap_or_default()).await,
            path => self.ready_one(path.trim_start_matches("/readyz/")).await,
        }
    }

    /// Whether the caller may see cluster names: a process on this machine can learn them in other ways, a pod that can connect to
    /// the port cannot.
    fn names_clusters_to(&self, local: Option<SocketAddr>, peer: SocketAddr) -> bool {
        let is_own = peer.ip().to_canonical().is_loopback() || local.is_some_and(|at| at.ip() == peer.ip());
        is_own || self.context.config.admin.cluster_names
    }

    /// Renders the metrics on a separate thread: with ten thousand clusters it takes longer than a probe should wait.
    async fn metrics(self: &Arc<Self>, named: bool) -> Response<Full<Bytes>> {
        let Ok(turn) = Arc::clone(&self.rendering).acquire_owned().await else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the gateway stops\n");
        };
        let this = Arc::clone(self);
        let rendered = spawn_blocking(move || {
            let _turn = turn;
            let Self { context, registry, memory, access, .. } = &*this;
            registry.count_bytes();
            context.metrics.memory(memory.used(), access.unread_bytes());
            context.metrics.tasks(context.shards.tasks());
            let live = context.live();
            let connected = |uid| registry.presence(uid).sessions > 0;
            let clusters = context.clusters(&live);
            context.metrics.clusters(clusters.iter().map(|c| (c.name.as_str(), connected(&c.uid))));
            if named { context.metrics.render() } else { context.metrics.render_unnamed() }
        });
        let Ok(rendered) = rendered.await else {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "cannot render the metrics\n");
        };
        let mut response = text(StatusCode::OK, rendered);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(Metrics::MEDIA_TYPE));
        response
    }

    /// A line for each cluster: whether its agents have acknowledged the tunnel CA's current roots.
    fn tunnel_ca(&self) -> String {
        let live = self.context.live();
        let line = |cluster: &Arc<ClusterRoute>| {
            let TrustState { current, pending, problem, .. } =
                self.trust.state(&cluster.uid, live.trust.version);
            let problem = problem.map_or_else(String::new, |problem| format!(": {problem}"));
            let state = match (current, pending) {
                (0, 0) => "not connected",
                (_, 0) => "current",
                _ => "pending",
            };
            format!("{} {state} ({current} of {} sessions){problem}\n", cluster.name, current + pending)
        };
        let mut lines: Vec<String> = self.context.clusters(&live).iter().map(line).collect();
        lines.sort();
        let roots = live.trust.roots.len();
        let believed = if roots == 1 { "root is" } else { "roots are" };
        lines.insert(0, format!("{roots} {believed} believed\n"));
        lines.concat()
    }

    async fn ready(&self, query: &str) -> Response<Full<Bytes>> {
        let pairs = || query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let verbose = pairs().any(|(key, _)| key == "verbose");
        let excluded: Vec<&str> =
            pairs().filter(|(key, _)| *key == "exclude").map(|(_, value)| value).collect();
        let mut out = String::new();
        let mut ready = true;
        for check in Check::ALL {
            let name = check.name();
            // Writing to a string cannot fail.
            let line = if excluded.contains(&name) {
                format!("[+]{name} excluded: ok\n")
            } else {
                match self.check(*check).await {
                    Ok(()) => format!("[+]{name} ok\n"),
                    Err(why) => {
                        ready = false;
                        format!("[-]{name} failed: {why}\n")
                    }
                }
            };
            out.push_str(&line);
        }
        if let Some(store) = self.store() {
            let line = match store {
                Ok(()) => "[+]store ok\n".to_owned(),
                Err(why) => format!("[!]store (not required): {why}\n"),
            };
            out.push_str(&line);
        }
        let verdict = if ready { "passed" } else { "failed" };
        writeln!(out, "readyz check {verdict}").unwrap_or_default();
        match (ready, verbose) {
            (true, false) => text(StatusCode::OK, "ok"),
            (true, true) => text(StatusCode::OK, out),
            (false, _) => text(StatusCode::SERVICE_UNAVAILABLE, out),
        }
    }

    /// Whether the store answers, if there is one. The gateway serves from memory without it, so this is no reason to send
    /// clients elsewhere or to restart.
    fn store(&self) -> Option<Result<(), String>> {
        let fleet = self.context.fleet.as_ref()?;
        Some(match fleet.store().trouble() {
            None => Ok(()),
            Some((error, time)) => Err(format!(
                "no answer for {}; changes are refused until it answers again. {error}",
                human(time)
            )),
        })
    }

    async fn ready_one(&self, name: &str) -> Response<Full<Bytes>> {
        if name == "store"
            && let Some(store) = self.store()
        {
            return match store {
                Ok(()) => text(StatusCode::OK, "ok"),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("store failed: {why}\n")),
            };
        }
        match Check::ALL.iter().find(|check| check.name() == name) {
            None => text(StatusCode::NOT_FOUND, "no such check\n"),
            Some(check) => match self.check(*check).await {
                Ok(()) => text(StatusCode::OK, "ok"),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{name} failed: {why}\n")),
            },
        }
    }

    async fn check(&self, check: Check) -> Result<(), String> {
        let stages = &self.context.stages;
        match check {
            Check::Draining if stages.unready.is_cancelled() => {
                Err("the gateway is shutting down".to_owned())
            }
            Check::Draining => Ok(()),
            Check::Listener if stages.draining.is_cancelled() => Err("accepts no new connections".to_owned()),
            Check::Listener => Ok(()),
            Check::Handshake => self.handshake().await,
        }
    }

    /// The result of the last self-check handshake, or of a new one. One at a time.
    async fn handshake(&self) -> Result<(), String> {
        let mut last = self.last.lock().await;
        if let Some((at, result)) = &*last
            && at.elapsed() < SELF_CHECK_FRESH
        {
            return result.clone();
        }
        let result = timeout(SELF_CHECK_TIMEOUT, self.shake_hands()).await;
        let result = result.unwrap_or_else(|_| {
            Err("the TLS handshake with the gateway's own port took longer than 2 s".to_owned())
        });
        *last = Some((Instant::now(), result.clone()));
        result
    }

    /// Connects to the public listener as a client would. It checks that the listener shows a certificate that is not
    /// expired, and not by whom it was issued.
    async fn shake_hands(&self) -> Result<(), String> {
        let to = reachable(self.public);
        let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let connected = async {
            let socket = socket?;
            socket.bind(SocketAddr::new(to.ip(), 0))?;
            let from = socket.local_addr()?;
            self.self_checks.begin(from);
            let _own = EndOfCheck(&self.self_checks, from);
            let stream = socket.connect(to).await?;
            Ok::<_, std::io::Error>(self.tls(stream).await)
        };
        connected.await.map_err(|error| format!("cannot connect to {to}: {error}"))?
    }

    async fn tls(&self, stream: TcpStream) -> Result<(), String> {
        let config = Arc::clone(&self.context.live().own_tls);
        let name = ServerName::try_from("readyz.towline.invalid").map_err(|error| error.to_string())?;
        let Err(error) = TlsConnector::from(config).connect(name, stream).await else { return Ok(()) };
        match tls_error(&error) {
            Some(rustls::Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) => Err("the front's certificate has expired".to_owned()),
            Some(rustls::Error::InvalidCertificate(_)) => Ok(()),
            _ => Err(format!("the TLS handshake with the gateway's own port failed: {error}")),
        }
    }
}

struct EndOfCheck<'a>(&'a SelfChecks, SocketAddr);

impl Drop for EndOfCheck<'_> {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

#[derive(Clone, Copy, Debug)]
enum Check {
    Draining,
    Listener,
    Handshake,
}

impl Check {
    const ALL: &'static [Self] = &[Self::Draining, Self::Listener, Self::Handshake];

    const fn name(self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Listener => "listener",
            Self::Handshake => "handshake",
        }
    }
}

/// The address at which a listener on all addresses can be reached from this machine.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// Refuses requests of web pages, including those whose host name was made to point here (DNS rebinding). Headers that a browser
/// always sends, and a page cannot omit, are not sent by probes and scrapers. Probes and scrapers may therefore use any name, such as
/// a cluster domain, an ingress or a service name; but on loopback only `localhost` is accepted.
fn is_for_us(headers: &HeaderMap, local: Option<SocketAddr>) -> Result<(), &'static str> {
    if headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site") {
        return Err("requests from web pages are refused\n");
    }
    let of_a_browser = |name: &HeaderName| {
        [header::ORIGIN, header::REFERER, header::ACCEPT_LANGUAGE, header::UPGRADE_INSECURE_REQUESTS]
            .contains(name)
            || name.as_str().starts_with("sec-fetch-")
            || name.as_str().starts_with("sec-ch-")
    };
    let agent = headers.get(header::USER_AGENT).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_a_browser = headers.keys().any(of_a_browser) || agent.starts_with(b"Mozilla/");
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return Err("exactly one Host header is needed\n");
    };
    let host = host.to_str().unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if name.parse::<IpAddr>().is_ok() || name == "localhost" {
        return Ok(());
    }
    if local.is_none_or(|local| local.ip().to_canonical().is_loopback()) {
        return Err(
            "the Host header does not name this listener: on loopback use localhost or an IP address\n",
        );
    }
    if is_a_browser || name.is_empty() {
        return Err("browsers must use an IP address: a web page could make a host name point here\n");
    }
    Ok(())
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S15: an address is not a credential: cluster names are shown only to this machine, unless the operator allows more.
    #[tokio::test]
    async fn s15_names_of_clusters_stay_on_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let (pod, own, stranger) = ("10.1.2.3:9180", "10.1.2.3:40000", "10.1.2.4:40000");
        for cluster_names in [false, true] {
            let state = directory.path().join(cluster_names.to_string());
            let cluster = ClusterRoute {
                name: "secret-customer".parse().unwrap(),
                uid: ClusterUid::new("u").unwrap(),
                mode: towline_model::Mode::Restricted,
                account: None,
            };
            let context = Context::for_test(&state, |config| {
                config.admin.cluster_names = cluster_names;
                config.clusters = vec![cluster];
            });
            let context = context.await;
            let registry = Arc::new(Registry::of(&context.config, Arc::clone(&context.metrics)));
            let (access, public) = (Access::new(&context), "127.0.0.1:1".parse().unwrap());
            let (trust, memory) = (Arc::default(), Shares::new(0, 0));
            let admin = Admin::new(&context, &registry, &trust, &memory, &access, &Arc::default(), public);
            let ask = async |path: &str, peer: &str| {
                let request = Request::get(path).header("host", pod).body(()).unwrap();
                let answer = admin.answer(&request, Some(pod.parse().unwrap()), peer.parse().unwrap()).await;
                let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
                String::from_utf8(body.to_vec()).unwrap()
            };
            for path in ["/metrics", "/tunnel-ca", "/readyz?verbose"] {
                let told = ask(path, stranger).await.contains("secret-customer");
                assert_eq!(told, cluster_names && !path.starts_with("/readyz"), "{path}");
            }
            for neighbour in ["127.0.0.1:40000", own] {
                assert!(ask("/metrics", neighbour).await.contains("{cluster=\"secret-customer\"} 0"));
                assert!(ask("/tunnel-ca", neighbour).await.contains("secret-customer not connected"));
            }
            // How many there are is no secret: it is what an alert needs.
            assert!(
                ask("/metrics", stranger).await.contains("towline_gateway_clusters{connected=\"false\"} 1")
            );
        }
    }

    /// Goal: FR-15: probes and scrapers may use any host name, and web pages may not.
    #[test]
    fn fr_15_scrapers_come_by_any_name() {
        let ask = |lines: &[(&'static str, &'static str)]| {
            let lines = lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            is_for_us(&lines.collect(), Some("10.1.2.3:9180".parse().unwrap())).is_ok()
        };
        for host in [
            "gw.example.com:9180",
            "gw.towline.svc.corp.internal",
            "gw.towline.svc.cluster.local:9180",
            "towline-gateway.towline.svc",
            "gw",
        ] {
            assert!(
                ask(&[("host", host), ("user-agent", "Prometheus/3.1"), ("accept", "text/plain")]),
                "{host}"
            );
            assert!(ask(&[("host", host), ("user-agent", "kube-probe/1.34"), ("accept", "*/*")]), "{host}");
            assert!(!ask(&[("host", host), ("user-agent", "Mozilla/5.0")]), "{host}");
        }
    }

    /// AD-02.
    #[test]
    fn web_pages_do_not_get_through() {
        let ask = |lines: &[(&'static str, &str)], local: &str| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(*name, value.parse().unwrap());
            }
            is_for_us(&headers, Some(local.parse().unwrap())).is_ok()
        };
        let here = "127.0.0.1:9180";
        for host in ["127.0.0.1:9180", "localhost:9180", "localhost", "[::1]:9180", "10.0.0.1"] {
            assert!(ask(&[("host", host)], here), "{host}");
        }
        for host in ["evil.example", "evil.example:9180", "gateway", "localhost.evil.example", ""] {
            assert!(!ask(&[("host", host)], here), "{host}");
        }
        let browsers: [(&str, &str); 5] = [
            ("accept-language", ""),
            ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)"),
            ("sec-ch-ua", "x"),
            ("sec-fetch-mode", "cors"),
            ("upgrade-insecure-requests", "1"),
        ];
        for sign in browsers {
            assert!(!ask(&[("host", "evil.example:9180"), sign], "10.1.2.3:9180"), "{sign:?}");
            // A page cannot have an address point elsewhere: it would be of another origin.
            assert!(ask(&[("host", "10.1.2.3:9180"), sign], "10.1.2.3:9180"), "{sign:?}");
        }
        assert!(!ask(&[("host", "10.1.2.3"), ("sec-fetch-site", "cross-site")], "10.1.2.3:9180"));
        assert!(!ask(&[("host", "localhost"), ("origin", "null")], here));
        assert!(!ask(&[], here));
        assert!(!ask(&[("host", "localhost"), ("host", "localhost")], here));
    }
}
