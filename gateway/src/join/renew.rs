//! Renewals of agents' certificates, which agents request in their sessions.

use super::issue::{Issued, adopt, instance, issue, record_issuer};
use super::limits::renewal_interval;
use super::refusal::{Refusal, Why};
use super::{Joins, account};
use crate::fleet::{self, Fleet, WhenFull, Word};
use crate::metrics::{JoinOutcome, Limit};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use towline_certs::AgentIdentity;
use towline_model::Time;
use towline_proto::join::{RefusalCode, Renew, Renewal, Renewed};

/// How long after its join an agent may report its cluster's token issuer for the first time.
const FIRST_WORD: Duration = Duration::from_secs(3600);

/// What vouches for the report of an agent that renews: its ServiceAccount token, if a key on record signed it; or the
/// join token with which it joined recently, when it could not read the keys yet.
fn word(joins: &Joins, fleet: &Fleet, identity: &AgentIdentity, token: &str) -> Word {
    let Some(known) = fleet.issuer(&identity.cluster) else {
        let joined = instance(fleet, &identity.instance);
        let lately = joined.is_some_and(|joined| {
            matches!(joined.origin, fleet::Origin::Token { .. })
                && Time::now().since(joined.created) <= FIRST_WORD
        });
        return if lately { Word::JoinToken } else { Word::Nothing };
    };
    let audience = joins.context.config.trust_domain.audience();
    let vouched = account::verify(token, &known, &audience, SystemTime::now());
    if vouched.is_ok() { Word::OldKey } else { Word::Nothing }
}

/// Answers a renewal for the session's authenticated identity: whatever the request says, no other identity gets
/// anything (EN-07).
pub(crate) async fn renew(
    joins: &Joins,
    identity: &AgentIdentity,
    serial: &str,
    address: SocketAddr,
    renew: &Renew,
) -> Renewed {
    let renewal = match try_renew(joins, identity, serial, renew).await {
        Ok(issued) => {
            joins.context.metrics.renewed(JoinOutcome::Ok);
            tracing::info!(cluster = %identity.cluster, instance = %identity.instance, agent = %address,
                serial = issued.serial, "certificate renewed");
            Renewal::Certificate(issued.certificate)
        }
        Err(refusal) => {
            joins.context.metrics.renewed(refusal.outcome());
            tracing::warn!(cluster = %identity.cluster, instance = %identity.instance, agent = %address,
                why = refusal.why.to_string(), cause = refusal.cause, "renewal refused");
            Renewal::Refused(refusal.message())
        }
    };
    Renewed { outcome: Some(renewal) }
}

async fn try_renew(
    joins: &Joins,
    identity: &AgentIdentity,
    serial: &str,
    renew: &Renew,
) -> Result<Issued, Refusal> {
    let live = joins.context.live();
    let (Some(own), Some(fleet)) = (&live.joins, joins.context.fleet.as_ref()) else {
        return Err(Refusal::new(RefusalCode::Denied, Why::IssuesNothing));
    };
    fleet.admits(identity, serial)?;
    let life = live.config.join.certificate_lifetime;
    if !joins.shares.may_renew(&identity.instance, life) {
        joins.context.metrics.limit_reached(Limit::Renewals);
        return Err(Refusal::later(RefusalCode::Limit, Why::RenewedTooOften, renewal_interval(life)));
    }
    // First the agent's report: it lets the agent rejoin even if there is no room for another certificate.
    if let Some(issuer) = &renew.issuer {
        let word = word(joins, fleet, identity, &renew.token);
        if record_issuer(fleet, &identity.cluster, &identity.instance, issuer, word).await {
            adopt(fleet, &identity.instance, &issuer.subject).await;
        }
    }
    issue(fleet, own, &live.config.join, identity, &renew.csr, WhenFull::Refuse).await
}
