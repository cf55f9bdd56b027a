//! Joining: gets a certificate for an agent that has no valid one, with one message each way over one TLS connection. The
//! agent recognises the gateway before it sends anything, by a pin or by a stored root.
//!
//! 1. Collect the proofs: the expired certificate, the cluster's own token, the join token. In this order, because the
//!    first costs nothing and the last may be used up.
//! 2. Try each proof at each address until one address answers. A refusal moves on to the next proof.
//! 3. Check the whole answer before using any of it: our key, a chain to the roots, an agent's profile.

use crate::config::JoinConfig;
use crate::config::address::{Address, Host};
use crate::dial;
use crate::dial::connect::{self, server_name};
use crate::dial::uplink::Uplink;
use crate::identity::error::{AnswerError, AttemptError, EnrolError};
use crate::identity::files::{read_line, read_token};
use crate::identity::held::{Held, accept};
use crate::identity::issuer;
use bytes::Bytes;
use std::path::Path;
use std::time::SystemTime;
use tokio::time::{Duration, Instant, timeout};
use towline_certs::alpn::{ALPN_JOIN, negotiated};
use towline_certs::{AUDIENCE_PREFIX, AgentKey, JoinToken, SpkiPin, TrustDomain, tls};
use towline_proto::join::{
    Admitted, Certificate, Issuer, JOIN_MAX_BYTES, JoinAnswer, JoinRequest, Joined, Proof, RefusalCode,
    Refused, ServiceAccount, Token,
};
use towline_proto::tunnel::message::{recv_message, send_message};

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
        uplink: &Uplink,
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
            match self.try_all(uplink, &addresses, &pins, (old, &given), &request, key).await {
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
        uplink: &Uplink,
        addresses: &[Address],
        pins: &[SpkiPin],
        believed: (Option<&Held>, &[SpkiPin]),
        request: &JoinRequest,
        key: &AgentKey,
    ) -> Result<Held, EnrolError> {
        let mut failure = EnrolError::NoProof;
        for address in addresses {
            match self.attempt(uplink, address, pins, believed, request, key).await {
                Ok(held) => return Ok(held),
                Err(cause) => {
                    let answered = matches!(cause, AttemptError::Refused { .. });
                    failure = EnrolError::Attempt { address: dial::hop(uplink, address), cause };
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
        uplink: &Uplink,
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
        let leg = dial::reach(uplink, address, deadline).await?;
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
