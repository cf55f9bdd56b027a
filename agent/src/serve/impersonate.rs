//! Decides under which identity a request reaches the upstream. The agent's own configuration decides; the gateway cannot
//! extend it.
//!
//! | agent | request | to the API server | to a target |
//! |---|---|---|---|
//! | restricted | restricted | unchanged if it has a credential (or with `allowAnonymous`), else refused | unchanged |
//! | restricted | impersonate | refused | refused |
//! | impersonate | restricted | unchanged if it has a credential, else refused | unchanged |
//! | impersonate | impersonate | as the principal and nobody else | without any identity |
//!
//! A credential is what an API server evaluates: `Authorization: Bearer`, and in a WebSocket handshake the subprotocol that
//! carries a token. A request with anything else is anonymous there.
//!
//! The agent sends its own token only to the API server, and only on behalf of a principal.

use crate::config::{AgentMode, ImpersonateConfig, is_system};
use http::HeaderValue;
use thiserror::Error;
use towline_proto::open::{Header, Mode, Principal, Request};

const BEARER: &[u8] = b"bearer ";
const CARRIERS: &[&[u8]] = &[b"authorization", b"proxy-authorization", b"x-forwarded-client-cert"];
const CARRIER_PREFIXES: &[&[u8]] = &[b"impersonate-", b"x-remote-"];
const BEARER_PROTOCOL: &[u8] = b"base64url.bearer.authorization.k8s.io";

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum Refusal {
    #[error(
        "the agent is in mode restricted, so it does not impersonate callers. Send the caller's own credential through the gateway, or ask the cluster's owner to set mode: impersonate"
    )]
    Restricted,
    #[error(
        "the request has no credential of its own, and the agent (mode: impersonate) uses its own only on behalf of a principal"
    )]
    NoCredential,
    #[error(
        "the request has no credential for the API server (Authorization: Bearer, or the WebSocket subprotocol), so it would be anonymous there. Send one, or ask the cluster's owner to set allowAnonymous: true"
    )]
    Anonymous,
    #[error("the request has no principal to impersonate")]
    NoPrincipal,
    #[error(
        "the agent does not impersonate a {0} that begins with system: unless its configuration lists it in impersonate.allowSystemNames"
    )]
    System(&'static str),
    #[error("the principal has a {0} that cannot be sent unchanged as a header")]
    Unwritable(&'static str),
    #[error("this agent does not know the mode of the request. Update the agent")]
    UnknownMode,
}

/// How the identity of a request is handled.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Nothing.
    AsItCame,
    /// Every carrier of an identity is removed.
    Nobody,
    /// Every carrier of an identity is removed; then these are set: the principal's own.
    Impersonate(Vec<(&'static str, HeaderValue)>),
}

impl Plan {
    /// Whether a header of the request goes upstream, and as what.
    pub(crate) fn admit(&self, header: &Header) -> Admitted {
        match self {
            Self::AsItCame => Admitted::Whole,
            Self::Nobody | Self::Impersonate(_) if is_carrier(&header.name) => Admitted::Nothing,
            Self::Nobody | Self::Impersonate(_)
                if header.name.eq_ignore_ascii_case(b"sec-websocket-protocol") =>
            {
                without_bearer_protocol(&header.value)
            }
            Self::Nobody | Self::Impersonate(_) => Admitted::Whole,
        }
    }
}

/// How much of a header goes upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Admitted {
    Whole,
    Part(Vec<u8>),
    Nothing,
}

/// Decides on the identity of a request.
pub(crate) fn decide(agent: &AgentMode, allow_anonymous: bool, request: &Request) -> Result<Plan, Refusal> {
    let to_api_server = request.target.is_empty();
    let brings_one = || request.headers.iter().any(|header| brings_credential(header, &request.upgrade));
    match (agent, Mode::try_from(request.mode).map_err(|_| Refusal::UnknownMode)?) {
        (AgentMode::Restricted, Mode::Restricted) => {
            let may = !to_api_server || allow_anonymous || brings_one();
            if may { Ok(Plan::AsItCame) } else { Err(Refusal::Anonymous) }
        }
        (AgentMode::Restricted, Mode::Impersonate) => Err(Refusal::Restricted),
        (AgentMode::Impersonate(_), Mode::Restricted) => {
            if !to_api_server || brings_one() {
                Ok(Plan::AsItCame)
            } else {
                Err(Refusal::NoCredential)
            }
        }
        (AgentMode::Impersonate(_), Mode::Impersonate) if !to_api_server => Ok(Plan::Nobody),
        (AgentMode::Impersonate(config), Mode::Impersonate) => {
            let principal = request.principal.as_ref().ok_or(Refusal::NoPrincipal)?;
            Ok(Plan::Impersonate(impersonation(principal, config)?))
        }
    }
}

/// The headers of a principal, or a refusal. Groups that the configuration does not name are left out: RBAC gives
/// fewer groups fewer rights. (What denies by group, an admission policy or an authorization webhook, does not see them.)
fn impersonation(
    principal: &Principal,
    config: &ImpersonateConfig,
) -> Result<Vec<(&'static str, HeaderValue)>, Refusal> {
    let check = |text: &str, what: &'static str| {
        if is_system(text) && !config.allow_system_names.iter().any(|name| name == text) {
            return Err(Refusal::System(what));
        }
        // Surrounding white space would be trimmed, and an empty value not count, on the other side.
        if text.is_empty() || text.trim() != text || text.chars().any(char::is_control) {
            return Err(Refusal::Unwritable(what));
        }
        Ok(())
    };
    check(&principal.name, "name")?;
    let name = HeaderValue::from_str(&principal.name).map_err(|_| Refusal::Unwritable("name"))?;
    let mut headers = Vec::with_capacity(1 + principal.groups.len());
    headers.push(("impersonate-user", name));
    for group in &principal.groups {
        let unwritable = Refusal::Unwritable("group");
        let Ok(text) = std::str::from_utf8(group) else { return Err(unwritable) };
        check(text, "group")?;
        if config.names_group(text) {
            // No copy: it is a part of the head that has come.
            let value = HeaderValue::from_maybe_shared(group.clone()).map_err(|_| unwritable)?;
            headers.push(("impersonate-group", value));
        }
    }
    Ok(headers)
}

fn brings_credential(header: &Header, upgrade: &str) -> bool {
    if header.name.eq_ignore_ascii_case(b"authorization") {
        let value = header.value.trim_ascii();
        let scheme = value.get(..BEARER.len()).is_some_and(|start| start.eq_ignore_ascii_case(BEARER));
        return scheme && value.len() > BEARER.len();
    }
    upgrade.eq_ignore_ascii_case("websocket")
        && header.name.eq_ignore_ascii_case(b"sec-websocket-protocol")
        && without_bearer_protocol(&header.value) != Admitted::Whole
}

/// Whether a header states the caller's identity for any known software (R-IMP-2, R-IMP-4). `_` is treated as `-`, because some
/// servers accept one for the other.
fn is_carrier(name: &[u8]) -> bool {
    let as_read = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    let is = |name: &[u8], word: &[u8]| name.iter().map(as_read).eq(word.iter().copied());
    CARRIERS.iter().any(|carrier| is(name, carrier))
        || CARRIER_PREFIXES
            .iter()
            .any(|prefix| name.get(..prefix.len()).is_some_and(|start| is(start, prefix)))
}

/// Removes the bearer tokens that the API server also accepts as WebSocket subprotocols (R-IMP-6).
fn without_bearer_protocol(value: &[u8]) -> Admitted {
    let is_bearer = |protocol: &&[u8]| {
        let protocol = protocol.trim_ascii();
        protocol.get(..BEARER_PROTOCOL.len()).is_some_and(|start| start.eq_ignore_ascii_case(BEARER_PROTOCOL))
    };
    if !value.split(|byte| *byte == b',').any(|protocol| is_bearer(&protocol)) {
        return Admitted::Whole;
    }
    let kept: Vec<&[u8]> = value
        .split(|byte| *byte == b',')
        .filter(|protocol| !is_bearer(protocol))
        .map(<[u8]>::trim_ascii)
        .collect();
    if kept.is_empty() { Admitted::Nothing } else { Admitted::Part(kept.join(&b", "[..])) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    fn impersonating(allowed: &[&str]) -> AgentMode {
        AgentMode::Impersonate(ImpersonateConfig {
            token_file: "t".into(),
            allow_system_names: allowed.iter().map(ToString::to_string).collect(),
            groups: None,
        })
    }

    fn request(mode: Mode, headers: &[(&str, &str)], principal: Option<(&str, &[&str])>) -> Request {
        Request {
            mode: mode.into(),
            headers: headers.iter().map(|(name, value)| header(name, value)).collect(),
            principal: principal.map(|(name, groups)| Principal {
                name: name.to_owned(),
                groups: groups.iter().map(|group| Bytes::copy_from_slice(group.as_bytes())).collect(),
            }),
            ..Request::default()
        }
    }

    fn header(name: &str, value: &str) -> Header {
        Header {
            name: Bytes::copy_from_slice(name.as_bytes()),
            value: Bytes::copy_from_slice(value.as_bytes()),
        }
    }

    #[test]
    fn s17_the_agents_configuration_has_the_last_word() {
        let alice = Some(("alice", &["dev"][..]));
        let refusal = |agent: &AgentMode, request: &Request| decide(agent, false, request).unwrap_err();
        assert_eq!(
            refusal(&AgentMode::Restricted, &request(Mode::Impersonate, &[], alice)),
            Refusal::Restricted
        );
        let agent = impersonating(&[]);
        assert_eq!(refusal(&agent, &request(Mode::Restricted, &[], None)), Refusal::NoCredential);
        assert_eq!(
            refusal(&agent, &request(Mode::Restricted, &[("Authorization", " ")], None)),
            Refusal::NoCredential
        );
        assert_eq!(refusal(&agent, &request(Mode::Impersonate, &[], None)), Refusal::NoPrincipal);
        let own = request(Mode::Restricted, &[("AUTHORIZATION", "Bearer x")], alice);
        assert!(matches!(decide(&agent, false, &own), Ok(Plan::AsItCame)));
        // S17: a request that would be anonymous passes only if the owner allows it.
        let (bearer, protocol) =
            (("authorization", "Bearer x"), "v5, base64url.bearer.authorization.k8s.io.YQ");
        let shell = ("Sec-WebSocket-Protocol", protocol);
        for (headers, upgrade, counts) in [
            (&[][..], "", false),
            (&[bearer], "", true),
            (&[("authorization", "Bearer ")], "", false),
            (&[("authorization", "Basic YTpi")], "", false),
            (&[("authorization", "x")], "", false),
            (&[shell], "websocket", true),
            (&[shell], "", false),
            (&[("sec-websocket-protocol", "v5.channel.k8s.io")], "websocket", false),
        ] {
            let asked = Request { upgrade: upgrade.to_owned(), ..request(Mode::Restricted, headers, None) };
            let decided = decide(&AgentMode::Restricted, false, &asked);
            assert_eq!(decided.is_ok(), counts, "{headers:?} {upgrade}");
            assert!(counts || matches!(decided, Err(Refusal::Anonymous)));
            assert!(matches!(decide(&AgentMode::Restricted, true, &asked), Ok(Plan::AsItCame)));
            let to_target = Request { target: "prom".to_owned(), ..asked };
            assert!(decide(&AgentMode::Restricted, false, &to_target).is_ok(), "its own affair");
        }
        let unknown = Request { mode: 7, ..Request::default() };
        assert_eq!(refusal(&agent, &unknown), Refusal::UnknownMode);
    }

    /// The agent's token is never sent to a target: with or without a principal, no plan adds anything.
    #[test]
    fn targets_are_never_impersonated() {
        let mut to_target = request(Mode::Impersonate, &[], Some(("alice", &[])));
        to_target.target = "prom".to_owned();
        assert!(matches!(decide(&impersonating(&[]), false, &to_target), Ok(Plan::Nobody)));
        assert!(decide(&AgentMode::Restricted, false, &to_target).is_err());
    }

    #[test]
    fn a_principal_is_written_whole_or_not_at_all() {
        let agent = impersonating(&["system:masters"]);
        let plan = |name: &str, groups: &[&str]| {
            decide(&agent, false, &request(Mode::Impersonate, &[], Some((name, groups))))
        };
        let Ok(Plan::Impersonate(headers)) = plan("älice@x", &["dev", "system:masters", "dev:a b"]) else {
            panic!("refused")
        };
        let values: Vec<(&str, &[u8])> =
            headers.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        assert_eq!(
            values,
            [
                ("impersonate-user", "älice@x".as_bytes()),
                ("impersonate-group", b"dev"),
                ("impersonate-group", b"system:masters"),
                ("impersonate-group", b"dev:a b"),
            ]
        );
        assert_eq!(plan("system:admin", &[]).unwrap_err(), Refusal::System("name"));
        assert_eq!(plan("SYSTEM:admin", &[]).unwrap_err(), Refusal::System("name"));
        assert_eq!(plan("alice", &["system:nodes"]).unwrap_err(), Refusal::System("group"));
        assert_eq!(plan("alice", &["dev", "a\nb"]).unwrap_err(), Refusal::Unwritable("group"));
        let mut broken = request(Mode::Impersonate, &[], Some(("alice", &["dev"])));
        broken.principal.as_mut().unwrap().groups.push(Bytes::from_static(b"\xff"));
        assert_eq!(decide(&agent, false, &broken).unwrap_err(), Refusal::Unwritable("group"));
        for name in ["", " ", " a", "a ", "a\r\nb", "a\u{7f}b", "a\u{85}b"] {
            assert_eq!(plan(name, &[]).unwrap_err(), Refusal::Unwritable("name"), "{name:?}");
        }
    }

    /// Goal: S6: the agent names the groups that its configuration names, and no other of the caller's; what it refuses, it refuses
    /// all the same.
    #[test]
    fn s6_groups_that_are_not_named_are_left_out() {
        let plan = |groups: Option<&[&str]>, callers: &[&str]| {
            let AgentMode::Impersonate(config) = impersonating(&[]) else { unreachable!() };
            let groups = groups.map(|groups| groups.iter().map(ToString::to_string).collect());
            let agent = AgentMode::Impersonate(ImpersonateConfig { groups, ..config });
            let plan = decide(&agent, false, &request(Mode::Impersonate, &[], Some(("alice", callers))))?;
            let Plan::Impersonate(headers) = plan else { panic!("{plan:?}") };
            let named = headers.into_iter().filter(|(name, _)| *name == "impersonate-group");
            Ok(named.map(|(_, value)| value.to_str().unwrap().to_owned()).collect::<Vec<_>>())
        };
        let callers = ["dev", "towline:admins", "Dev", "dev2"];
        assert_eq!(plan(None, &callers), Ok(callers.map(ToOwned::to_owned).to_vec()));
        assert_eq!(plan(Some(&["dev", "ops"]), &callers), Ok(vec!["dev".to_owned()]));
        assert_eq!(plan(Some(&[]), &callers), Ok(Vec::new()));
        assert_eq!(plan(Some(&["dev"]), &["dev", "system:masters"]), Err(Refusal::System("group")));
    }

    /// R-IMP-2, -4, -6, AU-02, AU-04: by prefix and without regard to case, also those that do not exist yet.
    #[test]
    fn every_carrier_is_removed() {
        let removed = |name: &str, value: &str| Plan::Nobody.admit(&header(name, value));
        for name in [
            "Authorization",
            "AUTHORIZATION",
            "Proxy-Authorization",
            "Impersonate-User",
            "impersonate-group",
            "IMPERSONATE-UID",
            "Impersonate-Extra-Scopes",
            "Impersonate-Future",
            "Impersonate_User",
            "X-Remote-User",
            "x-remote-group",
            "X-Remote-Extra-a",
            "X_Remote_User",
            "X-Forwarded-Client-Cert",
        ] {
            assert_eq!(removed(name, "v"), Admitted::Nothing, "{name}");
            assert_eq!(Plan::AsItCame.admit(&header(name, "v")), Admitted::Whole, "{name}");
        }
        for name in
            ["Accept", "X-Forwarded-For", "Impersonator", "Authorization-Info", "User-Agent", "Cookie"]
        {
            assert_eq!(removed(name, "v"), Admitted::Whole, "{name}");
        }
        let bearer = "base64url.bearer.authorization.k8s.io.dG9rZW4";
        let protocols = |value: &str| removed("Sec-WebSocket-Protocol", value);
        assert_eq!(protocols("v4.channel.k8s.io, v5.channel.k8s.io"), Admitted::Whole);
        assert_eq!(protocols(bearer), Admitted::Nothing);
        assert_eq!(
            protocols(&format!("v5.channel.k8s.io, {bearer},base64.channel.k8s.io")),
            Admitted::Part(b"v5.channel.k8s.io, base64.channel.k8s.io".to_vec())
        );
        assert_eq!(protocols(&bearer.to_ascii_uppercase()), Admitted::Nothing);
    }
}
