//! Joining: gets a certificate for an agent that has no valid one, with one message each way over one TLS connection. The
//! agent recognises the gateway before it sends anything, by a pin or by a stored root.
//!
//! 1. Collect the proofs: the expired certificate, the cluster's own token, the join token. In this order, because the
//!    first costs nothing and the last may be used up.
//! 2. Try each proof at each address until one address answers. A refusal moves on to the next proof.
//! 3. Check the whole answer before using any of it: our key, a chain to the roots, an agent's profile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use rustls::ClientConfig;
use thiserror::Error;
use tokio::time::{Duration, Instant, timeout};
use towline_certs::alpn::{ALPN_JOIN, WrongAlpn, negotiated};
use towline_certs::facts::CertificateFacts;
use towline_certs::load::{FileBytes, LoadCause, LoadError};
use towline_certs::tls;
use towline_certs::{
    AUDIENCE_PREFIX, AgentCa, AgentIdentity, AgentKey, CertificateDer, Credential, CsrError, JoinToken,
    JoinTokenError, ProfileError, SpkiPin, TlsError, TrustDomain, TrustError, VerifyError, leads_back,
};
use towline_proto::join::{
    Admitted, CERTIFICATES_MAX, Certificate, Issuer, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Proof,
    RefusalCode, Refused, ServiceAccount, Token, Trust,
};
use towline_proto::text::{Lasting, Printable};
use towline_proto::tunnel::message::{MessageError, recv_message, send_message};

use crate::config::JoinConfig;
use crate::config::address::{Address, Host};
use crate::dial::connect::{self, ConnectError};
use crate::dial::{self, ReachError};
use crate::identity::issuer;
use crate::reload::Live;
use crate::upstream::server_name;

/// Why the agent has no identity.
#[derive(Debug, Error)]
pub enum EnrolError {
    #[error("the join token in {path} {cause}")]
    Token { path: PathBuf, cause: JoinTokenError },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(
        "there is nothing to join with: no certificate is stored, and neither identity.joinTokenFile nor identity.serviceAccount is set. Set one of the two"
    )]
    NoProof,
    #[error(
        "cannot recognise the gateway: there is no pin. Put the whole join token into identity.joinTokenFile, or set identity.pins"
    )]
    NoPins,
    #[error(
        "a restart would lose the identity for good: it is kept in memory only, and the join token admits a single key. Set identity.directory to a volume, or set identity.serviceAccount, or use a token with more uses"
    )]
    Lost,
    #[error(
        "the ServiceAccount token in {path} has the audience {found} instead of only {wanted}, so it was not sent. Project a token with the audience {wanted}, as the manifest does"
    )]
    Audience { path: PathBuf, found: String, wanted: String },
    #[error(
        "the join token in {path} is for the cluster {found}, but identity.serviceAccount.cluster is {wanted}. Create a token for this cluster: towline token create {wanted}"
    )]
    Cluster { path: PathBuf, found: String, wanted: String },
    #[error("cannot create a key: {0}")]
    Key(#[from] CsrError),
    #[error("agent -> gateway {address} (joining): {cause}")]
    Attempt { address: String, cause: AttemptError },
}

/// Why one attempt to join failed.
#[derive(Debug, Error)]
pub enum AttemptError {
    #[error(
        "a certificate cannot be issued for the name {0}. Set gateway.serverName to the name in the gateway's certificate"
    )]
    Name(Host),
    #[error("{0}")]
    Reach(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Alpn(#[from] WrongAlpn),
    #[error("{0}. A gateway that does not accept joins closes the connection like this")]
    Message(#[from] MessageError),
    #[error("TLS succeeded, but the gateway did not answer within {}", Lasting(*.0))]
    NoAnswer(Duration),
    #[error("refused ({}): {}", code.label(), Printable(text))]
    Refused { code: RefusalCode, text: String, retry_after: Duration },
    #[error("the gateway's answer is invalid: {0}")]
    Answer(#[from] AnswerError),
}

/// Why an identity that came cannot be used.
#[derive(Debug, Error)]
pub enum AnswerError {
    #[error("it neither admits nor refuses the agent. Update the agent")]
    Unknown,
    #[error("more than {CERTIFICATES_MAX} certificates")]
    TooMany,
    #[error("no certificate")]
    NoCertificate,
    #[error("the certificate is for another key than this agent's")]
    OtherKey,
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("in its CA bundle: {0}")]
    Trust(#[from] TrustError),
    #[error("the certificate was not issued by the CA bundle that came with it: {0}")]
    Chain(#[from] VerifyError),
    #[error(
        "none of the announced roots is trusted already, or signed by a trusted root. If the gateway has a new CA, join again with a new token"
    )]
    Unrelated,
    #[error(
        "none of the announced roots matches a pin in identity.pins, or is signed by a root that does. If the gateway has a new CA, add its pin to identity.pins"
    )]
    NotPinned,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl EnrolError {
    /// Whether a file is not there.
    const fn is_missing(&self) -> bool {
        matches!(self, Self::Load(LoadError { cause: LoadCause::Missing, .. }))
    }

    /// The value of the metric label `outcome`.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Token { .. }
            | Self::Load(_)
            | Self::NoProof
            | Self::NoPins
            | Self::Lost
            | Self::Audience { .. }
            | Self::Cluster { .. } => "config",
            Self::Key(_) => "key",
            Self::Attempt { cause, .. } => match cause {
                AttemptError::Refused { code, .. } => code.label(),
                AttemptError::Answer(_) => "answer",
                AttemptError::Tls(_) | AttemptError::Name(_) => "config",
                AttemptError::Reach(_) | AttemptError::Alpn(_) => "reach",
                AttemptError::Message(_) | AttemptError::NoAnswer(_) => "message",
            },
        }
    }

    /// The wait that the gateway requested.
    pub(crate) const fn retry_after(&self) -> Duration {
        match self {
            Self::Attempt { cause: AttemptError::Refused { retry_after, .. }, .. } => *retry_after,
            _ => Duration::ZERO,
        }
    }
}

/// An identity that can be used.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) credential: Credential,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// The roots that no trusted root had signed, each with the time of its announcement. For a while they cannot vouch for others.
    pub(crate) unsigned: Vec<(SpkiPin, SystemTime)>,
    pub(crate) facts: CertificateFacts,
    pub(crate) identity: AgentIdentity,
    /// TLS towards the gateway.
    pub(crate) tls: Arc<ClientConfig>,
}

impl Held {
    /// Takes what came, if all of it fits.
    pub(crate) fn new(
        chain: &[Bytes],
        roots: Vec<CertificateDer<'static>>,
        unsigned: Vec<(SpkiPin, SystemTime)>,
        key: &AgentKey,
    ) -> Result<Self, AnswerError> {
        if chain.len() > CERTIFICATES_MAX {
            return Err(AnswerError::TooMany);
        }
        if chain.is_empty() {
            return Err(AnswerError::NoCertificate);
        }
        let credential = Credential::new(certificates(chain), key.private_key(), Path::new("the answer"))
            .map_err(|_| AnswerError::OtherKey)?;
        let held = Self::kept(credential, roots, unsigned)?;
        // At the time of its issue: this machine's clock may be off, and nothing but the fit is in question.
        let agents = AgentCa::new(&held.roots, held.identity.trust_domain.clone())?;
        agents.verify(held.credential.chain(), held.facts.issued_at())?;
        Ok(held)
    }

    /// A stored identity. It was checked when it arrived; its roots may have changed since, and no longer include the root that issued it.
    pub(crate) fn kept(
        credential: Credential,
        roots: Vec<CertificateDer<'static>>,
        unsigned: Vec<(SpkiPin, SystemTime)>,
    ) -> Result<Self, AnswerError> {
        if roots.len() > CERTIFICATES_MAX {
            return Err(AnswerError::TooMany);
        }
        let facts = CertificateFacts::of(credential.leaf())?;
        let identity = AgentIdentity::from_verified_certificate(credential.leaf())?;
        let tls = tls::agent_client(&roots, &credential)?;
        Ok(Self { credential, roots, unsigned, facts, identity, tls })
    }

    /// The same identity with other trusted roots. `pins` are the owner's.
    pub(crate) fn with_roots(&self, trust: &Trust, pins: &[SpkiPin]) -> Result<Self, AnswerError> {
        let (roots, unsigned) = accept(trust, Some(self), pins, pins, SystemTime::now())?;
        let tls = tls::agent_client(&roots, &self.credential)?;
        Ok(Self { roots, unsigned, tls, ..self.clone() })
    }

    /// The roots that may vouch for others. A root that was only announced may not do so yet: otherwise an attacker who controls
    /// the gateway for a moment could announce their own root next to the old one, and later their own root alone.
    fn anchors(&self, now: SystemTime) -> Vec<CertificateDer<'static>> {
        let is_young = |root: &CertificateDer<'_>| {
            let pin = SpkiPin::of(root).ok();
            self.unsigned.iter().any(|(known, since)| {
                Some(*known) == pin && now.duration_since(*since).unwrap_or_default() < UNSIGNED_FOR
            })
        };
        self.roots.iter().filter(|root| !is_young(root)).cloned().collect()
    }

    /// How much of its life is left by this machine's clock.
    pub(crate) fn left(&self) -> Duration {
        self.facts.not_after.duration_since(SystemTime::now()).unwrap_or_default()
    }
}

/// The trusted roots; and those of them that may not vouch for others yet, with the time of their announcement.
type Accepted = (Vec<CertificateDer<'static>>, Vec<(SpkiPin, SystemTime)>);

/// Accepts a set of roots that leads back to stored roots or to `pins`. If the owner lists pins, the set must lead back to one of
/// them.
fn accept(
    trust: &Trust,
    old: Option<&Held>,
    pins: &[SpkiPin],
    owners: &[SpkiPin],
    now: SystemTime,
) -> Result<Accepted, AnswerError> {
    if trust.roots.len() > CERTIFICATES_MAX || trust.vouchers.len() > CERTIFICATES_MAX {
        return Err(AnswerError::TooMany);
    }
    let (roots, vouchers) = (certificates(&trust.roots), certificates(&trust.vouchers));
    let anchors = old.map(|old| old.anchors(now)).unwrap_or_default();
    let leads = leads_back(&roots, &vouchers, &anchors, pins);
    if !leads.contains(&true) {
        return Err(AnswerError::Unrelated);
    }
    if !owners.is_empty() && !leads_back(&roots, &vouchers, &[], owners).contains(&true) {
        return Err(AnswerError::NotPinned);
    }
    let known = |pin: SpkiPin| old?.unsigned.iter().find(|(known, _)| *known == pin).map(|(_, since)| *since);
    let unsigned = roots.iter().zip(&leads).filter(|(_, leads)| !**leads);
    let unsigned = unsigned.filter_map(|(root, _)| SpkiPin::of(root).ok());
    let unsigned = unsigned.map(|pin| (pin, known(pin).unwrap_or(now))).collect();
    Ok((roots, unsigned))
}

/// How long an announced but unsigned root cannot vouch for others: one day. That is longer than a hijacked gateway stays unnoticed,
/// and as long as one step of a change of CA takes.
const UNSIGNED_FOR: Duration = Duration::from_secs(86_400);

fn certificates(der: &[Bytes]) -> Vec<CertificateDer<'static>> {
    der.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

/// Everything that an attempt to join needs.
#[derive(Debug)]
pub(crate) struct Enroller {
    pub(crate) config: JoinConfig,
    pub(crate) addresses: Vec<Address>,
    pub(crate) server_name: Option<Host>,
    pub(crate) boot_id: Vec<u8>,
    pub(crate) software: String,
    /// Resolve, connect and TLS; and once more for the answer.
    pub(crate) timeout: Duration,
}

/// One way to be let in, with the key that goes with it.
struct Try<'a> {
    what: &'static str,
    proof: Proof,
    key: &'a AgentKey,
}

/// Logs that the gateway rejected a proof and another proof is tried next. On an agent's first join the gateway does not know its
/// ServiceAccount yet, which is not an error.
fn tell(error: &EnrolError, with: &str, is_new: bool) {
    let is_unknown = matches!(
        error,
        EnrolError::Attempt { cause: AttemptError::Refused { code: RefusalCode::NoIssuer, .. }, .. }
    );
    if is_new && is_unknown {
        tracing::info!("the gateway does not know this ServiceAccount yet; joining with the join token");
    } else {
        tracing::info!(%error, with, "not admitted");
    }
}

impl Enroller {
    /// Tries every proof once. `fresh` is the key for a new identity. The returned flag says whether the gateway now knows the key that
    /// signed the ServiceAccount token: it accepts an issuer only together with a join token.
    pub(crate) async fn join(
        &self,
        live: &Live,
        old: Option<&Held>,
        fresh: &AgentKey,
        issuer: Option<Issuer>,
    ) -> Result<(Held, bool), EnrolError> {
        let cluster = self.config.service_account.as_ref().map(|account| account.cluster.as_str());
        let token = self.config.token_file.as_deref().map(|path| read_token(path, cluster));
        let domain = token.as_ref().and_then(|token| Some(&token.as_ref().ok()?.trust_domain));
        let domain = domain.or_else(|| old.map(|old| &old.identity.trust_domain));
        let account = self.config.service_account.as_ref().map(|account| {
            let token = read_line(&account.token_file)?;
            check_audience(&account.token_file, &token, domain)?;
            Ok::<_, EnrolError>(ServiceAccount { cluster: account.cluster.clone(), token })
        });
        let old_key = old.map(|old| AgentKey::from_private_key(old.credential.key())).transpose()?;
        let mut tries = Vec::new();
        if let (Some(old), Some(key)) = (old, &old_key) {
            let chain = old.credential.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect();
            let proof = Proof::Expired(Certificate { chain });
            tries.push(Try { what: "the stored certificate", proof, key });
        }
        let (mut failure, mut unusable) = (EnrolError::NoProof, None);
        match account.transpose() {
            Ok(None) => {}
            Ok(Some(account)) => {
                let proof = Proof::ServiceAccount(account);
                tries.push(Try { what: "the cluster's ServiceAccount token", proof, key: fresh });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot use the cluster's ServiceAccount token");
                failure = error;
            }
        }
        let token = match token {
            None => None,
            Some(Ok(token)) => {
                let secret = Bytes::copy_from_slice(token.secret.as_bytes());
                let proof = Proof::Token(Token { id: token.id.clone(), secret });
                tries.push(Try { what: "the join token", proof, key: fresh });
                Some(token)
            }
            Some(Err(error)) => {
                unusable = Some(error);
                None
            }
        };
        let pins = self.pins(token.as_ref(), old);
        if pins.is_empty() {
            return Err(if token.is_none() { unusable.unwrap_or(failure) } else { EnrolError::NoPins });
        }
        let addresses = self.addresses(token.as_ref());
        let last = tries.len();
        let mut given = self.config.pins.clone();
        given.extend(token.iter().flat_map(|token| &token.pins));
        for (number, Try { what, proof, key }) in (1..).zip(tries) {
            let told = match &proof {
                Proof::Token(_) => issuer.is_some(),
                Proof::ServiceAccount(_) => true,
                Proof::Expired(_) => false,
            };
            let request = JoinRequest {
                proof: Some(proof),
                csr: key.csr_der()?.into(),
                software: self.software.clone(),
                boot_id: self.boot_id.clone().into(),
                issuer: issuer.clone(),
            };
            match self.try_all(live, &addresses, &pins, (old, &given), &request, key).await {
                Ok(held) => {
                    if let Some(error) = unusable {
                        tracing::debug!(%error, "cannot use the join token, but it is not needed");
                    }
                    return Ok((held, told));
                }
                Err(error) => {
                    // The caller logs the last failure.
                    if number < last {
                        tell(&error, what, old.is_none());
                    }
                    failure = error;
                }
            }
        }
        let Some(error) = unusable else { return Err(failure) };
        if last == 0 {
            return Err(error);
        }
        // Its Secret may be deleted when the agent has joined. Where no gateway answers, that is not why.
        let refused = matches!(failure, EnrolError::Attempt { cause: AttemptError::Refused { .. }, .. });
        if refused || !error.is_missing() {
            tracing::warn!(%error, "cannot use the join token");
        } else {
            tracing::debug!(%error, "cannot use the join token");
        }
        Err(failure)
    }

    /// The pins by which the agent recognises the gateway: those configured, those of the join token, and those of the stored roots.
    fn pins(&self, token: Option<&JoinToken>, old: Option<&Held>) -> Vec<SpkiPin> {
        let mut pins = self.config.pins.clone();
        pins.extend(token.into_iter().flat_map(|token| &token.pins));
        pins.extend(old.into_iter().flat_map(|old| JoinToken::pins_of(&old.roots)));
        pins
    }

    /// The configured addresses, then those of the token that are not among them.
    fn addresses(&self, token: Option<&JoinToken>) -> Vec<Address> {
        let mut addresses = self.addresses.clone();
        let of_token = token.into_iter().flat_map(|token| &token.addresses);
        for address in of_token.filter_map(|address| address.to_string().parse::<Address>().ok()) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    async fn try_all(
        &self,
        live: &Live,
        addresses: &[Address],
        pins: &[SpkiPin],
        believed: (Option<&Held>, &[SpkiPin]),
        request: &JoinRequest,
        key: &AgentKey,
    ) -> Result<Held, EnrolError> {
        let mut failure = EnrolError::NoProof;
        for address in addresses {
            match self.attempt(live, address, pins, believed, request, key).await {
                Ok(held) => return Ok(held),
                Err(cause) => {
                    let answered = matches!(cause, AttemptError::Refused { .. });
                    failure = EnrolError::Attempt { address: dial::hop(live, address), cause };
                    if answered {
                        break;
                    }
                }
            }
        }
        Err(failure)
    }

    async fn attempt(
        &self,
        live: &Live,
        address: &Address,
        pins: &[SpkiPin],
        (old, given): (Option<&Held>, &[SpkiPin]),
        request: &JoinRequest,
        key: &AgentKey,
    ) -> Result<Held, AttemptError> {
        let host = self.server_name.as_ref().unwrap_or(&address.host);
        let name = server_name(host).ok_or_else(|| AttemptError::Name(host.clone()))?;
        let config = tls::join_client(pins)?;
        let deadline = Instant::now() + self.timeout;
        let leg = dial::reach(live, address, deadline).await?;
        let mut stream = connect::handshake(leg, config, name, "the join token", deadline).await?;
        negotiated(stream.get_ref().1.alpn_protocol(), ALPN_JOIN)?;
        let exchange = async {
            send_message(&mut stream, request, JOIN_MAX_BYTES).await?;
            recv_message::<JoinAnswer, _>(&mut stream, JOIN_MAX_BYTES).await
        };
        let answer =
            timeout(self.timeout, exchange).await.map_err(|_| AttemptError::NoAnswer(self.timeout))??;
        match answer.outcome {
            Some(Joined::Admitted(Admitted { certificate, trust, .. })) => {
                let (roots, unsigned) = accept(&trust, old, given, &self.config.pins, SystemTime::now())?;
                Ok(Held::new(&certificate.chain, roots, unsigned, key)?)
            }
            Some(Joined::Refused(Refused { code, text, retry_after_ms })) => Err(AttemptError::Refused {
                code: RefusalCode::try_from(code).unwrap_or(RefusalCode::Unknown),
                text,
                retry_after: Duration::from_millis(retry_after_ms.into()),
            }),
            None => Err(AnswerError::Unknown.into()),
        }
    }
}

impl From<ConnectError> for AttemptError {
    fn from(error: ConnectError) -> Self {
        Self::Reach(error.to_string())
    }
}

impl From<ReachError> for AttemptError {
    fn from(error: ReachError) -> Self {
        match error {
            ReachError::Connect(error) => Self::Reach(error.to_string()),
            ReachError::Proxy(error) => Self::Reach(error.to_string()),
        }
    }
}

/// Refuses to send a ServiceAccount token with a foreign audience, because a gateway could use such a token elsewhere. `domain` is
/// the gateways' trust domain, if known.
fn check_audience(path: &Path, token: &str, domain: Option<&TrustDomain>) -> Result<(), EnrolError> {
    let audiences = issuer::audiences_of(token);
    let is_ours = |audience: &String| match domain {
        Some(domain) => *audience == domain.audience(),
        None => audience.starts_with(AUDIENCE_PREFIX),
    };
    if !audiences.is_empty() && audiences.iter().all(is_ours) {
        return Ok(());
    }
    let found = if audiences.is_empty() { "(none)".to_owned() } else { audiences.join(", ") };
    let wanted = domain.map_or_else(|| format!("{AUDIENCE_PREFIX}TRUSTDOMAIN"), TrustDomain::audience);
    Err(EnrolError::Audience { path: path.to_owned(), found, wanted })
}

/// Reads a join token, and checks that it is for `cluster` if that is known.
pub(crate) fn read_token(path: &Path, cluster: Option<&str>) -> Result<JoinToken, EnrolError> {
    let path = path.to_owned();
    match read_line(&path)?.parse::<JoinToken>() {
        Err(cause) => Err(EnrolError::Token { path, cause }),
        Ok(token) => match cluster.filter(|wanted| *wanted != token.cluster) {
            None => Ok(token),
            Some(wanted) => {
                Err(EnrolError::Cluster { path, found: token.cluster, wanted: wanted.to_owned() })
            }
        },
    }
}

/// Reads a file with one word.
pub(crate) fn read_line(path: &Path) -> Result<String, LoadError> {
    let file = FileBytes::read(path)?;
    Ok(String::from_utf8_lossy(file.bytes()).trim().to_owned())
}
