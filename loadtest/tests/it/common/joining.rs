//! Agents made of a key and nothing else: the join protocol, sessions and renewals as any agent speaks them.

use super::{PATIENCE, spawn, within};
use bytes::Bytes;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use towline_certs::facts::CertificateFacts;
use towline_certs::{AgentKey, CertificateDer, Credential, JoinToken, ServerName, tls};
use towline_proto::join::{
    Admitted, CAPABILITY_IDENTITY, Certificate, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Notice,
    Proof, Refused, Renew, Renewal, Token, Trust, TrustAck,
};
use towline_proto::mux::{Budget, Introduction, Limits, Role};
use towline_proto::tunnel::message::{recv_message, send_message};
use towline_proto::tunnel::{Session, SessionConfig};

/// Longer than any response takes.
const ANSWER: Duration = PATIENCE;

/// Uses a join token with a key. An error leaves the result of the request open.
pub(crate) async fn join(
    front: SocketAddr,
    token: &JoinToken,
    key: &AgentKey,
) -> anyhow::Result<Result<Admitted, Refused>> {
    join_with(front, token, key.csr_der()?).await
}

/// The same with any request for a certificate.
pub(crate) async fn join_with(
    front: SocketAddr,
    token: &JoinToken,
    csr: Vec<u8>,
) -> anyhow::Result<Result<Admitted, Refused>> {
    let secret = Bytes::copy_from_slice(token.secret.as_bytes());
    let proof = Proof::Token(Token { id: token.id.clone(), secret });
    let csr = csr.into();
    let boot_id = Bytes::from_static(&[1; 16]);
    let request = JoinRequest { proof: Some(proof), csr, boot_id, ..JoinRequest::default() };
    let asking = async {
        let socket = TcpStream::connect(front).await?;
        let name = ServerName::try_from("localhost")?;
        let mut io = TlsConnector::from(tls::join_client(&token.pins)?).connect(name, socket).await?;
        send_message(&mut io, &request, JOIN_MAX_BYTES).await?;
        let answer: JoinAnswer = recv_message(&mut io, JOIN_MAX_BYTES).await?;
        anyhow::Ok(match answer.outcome {
            Some(Joined::Admitted(admitted)) => Ok(admitted),
            Some(Joined::Refused(refused)) => Err(refused),
            None => anyhow::bail!("an answer without an outcome"),
        })
    };
    timeout(ANSWER, asking).await?
}

fn ders(list: &[Bytes]) -> Vec<CertificateDer<'static>> {
    list.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

/// The serial number of the certificate that was given.
pub(crate) fn serial(certificate: &Certificate) -> String {
    CertificateFacts::of(&ders(&certificate.chain)[0]).unwrap().serial
}

/// A live session of such an agent.
pub(crate) struct Live {
    pub(crate) session: Session,
    _driver: AbortOnDropHandle<()>,
}

impl Live {
    /// Connects with a certificate; an error if it is not admitted.
    pub(crate) async fn connect(
        front: SocketAddr,
        certificate: &Certificate,
        trust: &Trust,
        key: &AgentKey,
        boot: u8,
    ) -> anyhow::Result<Self> {
        let introduction = Introduction {
            capabilities: vec![CAPABILITY_IDENTITY.to_owned()],
            boot_id: vec![boot; 16],
            software: "towline-agent/0.1.0".to_owned(),
        };
        Self::introduced(front, certificate, trust, key, introduction).await
    }

    /// Connects with a hello that says this.
    pub(crate) async fn introduced(
        front: SocketAddr,
        certificate: &Certificate,
        trust: &Trust,
        key: &AgentKey,
        introduction: Introduction,
    ) -> anyhow::Result<Self> {
        let credential = Credential::new(ders(&certificate.chain), key.private_key(), Path::new("agent"))?;
        let tls = tls::agent_client(&ders(&trust.roots), &credential)?;
        let connecting = async {
            let socket = TcpStream::connect(front).await?;
            let name = ServerName::try_from("localhost")?;
            let io = TlsConnector::from(tls).connect(name, socket).await?;
            let (limits, budget) = (Limits::default(), Budget::new(64 << 20));
            let config = SessionConfig { role: Role::Agent, limits, budget, introduction };
            let (session, driver) =
                Session::over(io, config).map_err(|error| anyhow::anyhow!("{error:?}"))?;
            let driver = spawn(async move { drop(driver.run().await) });
            session.ready().await.map_err(|reason| anyhow::anyhow!("{reason}"))?;
            anyhow::Ok(Self { session, _driver: driver })
        };
        timeout(ANSWER, connecting).await?
    }

    /// Why it is not let in. The gateway refuses while the session begins: the agent's own end may have been ready by then.
    pub(crate) async fn refused(connected: anyhow::Result<Self>) -> String {
        match connected {
            Err(error) => error.to_string(),
            Ok(live) => {
                let closed = live.session.wait_for(|state| state.closed.is_some());
                within("the refusal", PATIENCE, closed).await.closed.unwrap().to_string()
            }
        }
    }

    /// Requests the next certificate. An error leaves the result of the request open.
    pub(crate) async fn renew(&self, key: &AgentKey) -> anyhow::Result<Result<Certificate, Refused>> {
        self.renew_with(key.csr_der()?).await
    }

    /// The same with any request for a certificate.
    pub(crate) async fn renew_with(&self, csr: Vec<u8>) -> anyhow::Result<Result<Certificate, Refused>> {
        let csr = csr.into();
        self.session
            .say(Notice::Renew(Renew { csr, issuer: None, token: String::new() }))
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let hearing = async {
            loop {
                let heard = self.session.hear().await.map_err(|reason| anyhow::anyhow!("{reason}"))?;
                match heard {
                    Notice::Renewed(renewed) => match renewed.outcome {
                        Some(Renewal::Certificate(certificate)) => return Ok(Ok(certificate)),
                        Some(Renewal::Refused(refused)) => return Ok(Err(refused)),
                        None => anyhow::bail!("an answer without an outcome"),
                    },
                    Notice::Trust(trust) => {
                        let ack = TrustAck { version: trust.version, problem: String::new() };
                        self.session
                            .say(Notice::TrustAck(ack))
                            .map_err(|error| anyhow::anyhow!("{error}"))?;
                    }
                    other => anyhow::bail!("{other:?}"),
                }
            }
        };
        timeout(ANSWER, hearing).await?
    }
}
