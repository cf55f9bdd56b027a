//! Goal: an exchange runs without a client's connection: its body is a value, and its answer is read from it (issue 16).

use super::*;
use crate::access::standing::{Seat, Standing};
use crate::config::GatewayConfig;
use crate::registry::{Registration, Visitor};
use crate::web::routing::route;
use http::{Request, request};
use http_body_util::{BodyExt as _, Empty, Full};
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::task::JoinSet;
use towline_certs::InstanceId;
use towline_model::{AccessRule, Effect, Mode};
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::open::{Header, Open, Want};
use towline_proto::tunnel::exchange::{recv_head, send_head};
use towline_proto::tunnel::{RecvStream, SendStream, Session, SessionConfig};

const TOKEN: &str = "tlat_0123456789abcdefghijABCDEFGHIJ0123456789abc";
const HERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// An exchange room, one cluster of which an agent is connected, and that agent.
struct World {
    context: Arc<Context>,
    access: Arc<Access>,
    exchange: Exchange,
    agent: Session,
    _registration: Registration,
    _drivers: JoinSet<()>,
    _directory: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tokens = directory.path().join("tokens.yaml");
        let hash = towline_certs::hex(
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, TOKEN.as_bytes()).as_ref(),
        );
        std::fs::write(&tokens, format!("tokens:\n- {{sha256: {hash}, user: argo, groups: [ops]}}\n"))
            .unwrap();
        let uid = ClusterUid::new("prod-uid").unwrap();
        let cluster = crate::config::ClusterRoute {
            name: "prod".parse().unwrap(),
            uid: uid.clone(),
            mode: Mode::Impersonate,
            account: None,
        };
        let rule = AccessRule {
            effect: Effect::Allow,
            users: Vec::new(),
            groups: vec!["ops".to_owned()],
            clusters: vec!["prod".to_owned()],
        };
        let change = |config: &mut GatewayConfig| {
            config.clusters = vec![cluster];
            config.access = vec![rule];
            config.token_file = Some(tokens);
        };
        let context = Context::for_test(directory.path(), change).await;
        let registry = Arc::new(Registry::of(&context.config, Arc::clone(&context.metrics)));
        let access = Access::new(&context);
        let exchange = Exchange::new(&context, &access, &registry, &Shares::new(1 << 20, 1 << 20));
        let (near, far) = duplex(64 * 1024);
        let config = |role| SessionConfig {
            role,
            limits: Limits::default(),
            budget: Budget::new(1 << 30),
            introduction: Introduction::default(),
        };
        let (session, ours) = Session::over(near, config(Role::Gateway)).unwrap();
        let (agent, theirs) = Session::over(far, config(Role::Agent)).unwrap();
        let mut drivers = JoinSet::new();
        drivers.spawn(async move { drop(ours.run().await) });
        drivers.spawn(async move { drop(theirs.run().await) });
        session.ready().await.unwrap();
        let visitor = Visitor { software: "agent/1", address: HERE };
        let instance = InstanceId::new("a").unwrap();
        let registration = registry.insert(&uid, &instance, &[1; 16], &session, &[], visitor).unwrap();
        Self {
            context,
            access,
            exchange,
            agent,
            _registration: registration,
            _drivers: drivers,
            _directory: directory,
        }
    }

    /// A caller that no connection belongs to.
    fn peer(&self) -> Peer {
        let seat = (Seat::own(), self.context.metrics.connection());
        self.access.peer(HERE, None, None, Standing::own(), seat)
    }

    async fn run<B>(&self, builder: request::Builder, body: B) -> Result<Exchanged, ExchangeError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Display,
    {
        let builder = builder.header("host", "gateway").header("authorization", format!("Bearer {TOKEN}"));
        let (head, ()) = builder.body(()).unwrap().into_parts();
        self.exchange.check(&head)?;
        let to = route(&head, None, None)?;
        self.exchange.run(&head, &to, &self.peer(), body, "audit-1").await
    }

    /// The next request that the agent gets.
    async fn next(&self) -> (Open, SendStream, RecvStream) {
        let (send, mut recv) = self.agent.accept().await.unwrap();
        let open: Open = recv_head(&mut recv, open::HEAD_MAX_BYTES).await.unwrap();
        (open, send, recv)
    }
}

async fn answer(send: &mut SendStream, status: u32, headers: &[(&str, &str)], body: BodyKind) {
    let field = |text: &str| Bytes::copy_from_slice(text.as_bytes());
    let headers =
        headers.iter().map(|(name, value)| Header { name: field(name), value: field(value) }).collect();
    let response = open::Response { status, headers, body };
    let answer = Answer { outcome: Some(Outcome::Response(response)) };
    send_head(send, &answer, open::HEAD_MAX_BYTES).await.unwrap();
}

#[tokio::test]
async fn a_body_that_is_a_value_is_carried_and_the_answer_is_a_value() {
    let world = World::start().await;
    let asked =
        world.run(Request::post("/clusters/prod/api/v1/pods"), Full::new(Bytes::from_static(b"hello")));
    let agent = async {
        let (open, mut send, mut recv) = world.next().await;
        let Some(Want::Request(request)) = open.want else { panic!("no request") };
        assert_eq!((&*request.method, &*request.path_and_query), ("POST", &b"/api/v1/pods"[..]));
        assert_eq!(request.principal.unwrap().name, "argo");
        assert_eq!(open.audit_id, "audit-1");
        let mut body = Vec::new();
        while let Some(bytes) = recv.read_chunk(1024).await.unwrap() {
            body.extend_from_slice(&bytes);
        }
        assert_eq!(body, b"hello");
        answer(&mut send, 201, &[("content-type", "text/plain")], BodyKind::exact(5)).await;
        send.write_chunk(Bytes::from_static(b"world")).await.unwrap();
        send.finish();
    };
    let (exchanged, ()) = tokio::join!(asked, agent);
    let Ok(Exchanged::Answer(response)) = exchanged else { panic!("{exchanged:?}") };
    assert_eq!(
        (response.status().as_u16(), &response.headers()["content-type"]),
        (201, &HeaderValue::from_static("text/plain"))
    );
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "world");
}

#[tokio::test]
async fn a_connection_that_switches_protocols_is_a_raw_stream() {
    let world = World::start().await;
    let ask = Request::get("/clusters/prod/api/v1/namespaces/x/pods/y/exec")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket");
    let asked = world.run(ask, Empty::<Bytes>::new());
    let agent = async {
        let (_, mut send, recv) = world.next().await;
        answer(&mut send, 101, &[("upgrade", "websocket")], BodyKind::NONE).await;
        (send, recv)
    };
    let (exchanged, (mut send, mut recv)) = tokio::join!(asked, agent);
    let Ok(Exchanged::Switched(head, raw)) = exchanged else { panic!("{exchanged:?}") };
    assert_eq!(
        (head.status().as_u16(), &head.headers()["upgrade"]),
        (101, &HeaderValue::from_static("websocket"))
    );
    let (mut client, ours) = duplex(1024);
    let mut carrying = JoinSet::new();
    carrying.spawn(raw.carry(async { Some(ours) }));
    client.write_all(b"ping").await.unwrap();
    assert_eq!(recv.read_chunk(1024).await.unwrap().unwrap(), "ping");
    send.write_chunk(Bytes::from_static(b"pong")).await.unwrap();
    let mut pong = [0; 4];
    client.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"pong");
    send.finish();
    drop(client);
    carrying.join_next().await.unwrap().unwrap();
}

#[tokio::test]
async fn whoever_may_not_call_gets_no_exchange() {
    let world = World::start().await;
    let refused =
        world.run(Request::get("/clusters/other/version"), Empty::<Bytes>::new()).await.unwrap_err();
    assert!(matches!(refused, ExchangeError::Access(AccessError::Forbidden { .. })), "{refused:?}");
}
