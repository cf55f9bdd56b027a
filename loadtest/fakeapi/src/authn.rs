//! Authentication: client certificate, then bearer token, then `Impersonate-*`.

use crate::call::decode;
use crate::connection::Connection;
use crate::options::FakeApiOptions;
use crate::rbac;
use crate::recorder::Identity;
use crate::shared::Shared;
use crate::status::ApiError;
use http::HeaderMap;

/// The identity of the credential; 401 if it has none.
pub(crate) fn authenticate(
    options: &FakeApiOptions,
    connection: &Connection,
    headers: &HeaderMap,
) -> Result<Identity, ApiError> {
    if let Some(client) = &connection.client {
        return Ok(client.clone());
    }
    // A real server reads the first Authorization header only.
    let authorization = headers.get("authorization");
    if let Some(token) = authorization.and_then(|value| bearer(value.as_bytes())) {
        let known = options.tokens.iter().find(|row| row.token.as_bytes() == token);
        return known
            .map(|row| Identity::new(row.user.clone(), row.groups.clone()))
            .ok_or_else(ApiError::unauthorized);
    }
    if options.anonymous && !connection.client_certificate {
        return Ok(Identity::new("system:anonymous".to_owned(), Vec::new()));
    }
    Err(ApiError::unauthorized())
}

/// As whom the request acts: the caller, or whom its `Impersonate-*` headers name if it may impersonate.
pub(crate) fn impersonate(
    shared: &Shared,
    caller: &Identity,
    headers: &HeaderMap,
) -> Result<Identity, ApiError> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let all = |name: &str| headers.get_all(name).iter().map(text).collect::<Vec<_>>();
    let user = all("impersonate-user").into_iter().next().unwrap_or_default();
    let mut groups = all("impersonate-group");
    let uid = all("impersonate-uid").into_iter().next();
    let mut extra = Vec::new();
    for name in headers.keys() {
        if let Some(key) = name.as_str().strip_prefix("impersonate-extra-") {
            extra.push((decode(key), all(name.as_str())));
        }
    }
    if user.is_empty() {
        if groups.is_empty() && uid.is_none() && extra.is_empty() {
            return Ok(caller.clone());
        }
        return Err(ApiError::new(
            http::StatusCode::INTERNAL_SERVER_ERROR,
            "InternalError",
            "requested impersonation of groups, uid or extra without impersonating a user",
        ));
    }
    let may = {
        let mut named = groups.iter().map(|group| ("groups", group)).chain([("users", &user)]);
        // No rule of the cluster's is about uids and extra fields.
        let of_rules = !shared.options.rbac || uid.is_none() && extra.is_empty();
        of_rules && named.all(|(resource, name)| may_impersonate(shared, caller, resource, name))
    };
    if !may {
        return Err(ApiError::forbidden(format!(
            "users \"{user}\" is forbidden: User \"{}\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
            caller.user
        )));
    }
    if groups.is_empty()
        && let Some(account) = user.strip_prefix("system:serviceaccount:")
    {
        let namespace = account.split(':').next().unwrap_or_default();
        groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    let mut identity = Identity::new(user, groups);
    identity.uid = uid;
    identity.extra = extra;
    Ok(identity)
}

/// Whether this identity may impersonate a user or a group; an empty name means all of them.
pub(crate) fn may_impersonate(shared: &Shared, caller: &Identity, resource: &str, name: &str) -> bool {
    if shared.options.rbac {
        return rbac::allows(&shared.store, caller, &rbac::Action::impersonate(resource, name));
    }
    caller.groups.iter().any(|group| group == "system:masters")
        || shared.options.impersonators.contains(&caller.user)
}

/// Whether this identity may do anything with this path; else 403.
pub(crate) fn authorize(
    shared: &Shared,
    identity: &Identity,
    verb: &str,
    path: &str,
) -> Result<(), ApiError> {
    let options = &shared.options;
    let public = ["/healthz", "/livez", "/readyz", "/version"];
    if public.iter().any(|prefix| path.starts_with(prefix)) {
        return Ok(());
    }
    if options.rbac {
        return match rbac::allows(&shared.store, identity, &rbac::Action::of(verb, path)) {
            true => Ok(()),
            false => Err(ApiError::forbidden(format!(
                "forbidden: User \"{}\" cannot {verb} path \"{path}\"",
                identity.user
            ))),
        };
    }
    if identity.user == "system:anonymous" || options.denied_users.contains(&identity.user) {
        let user = &identity.user;
        return Err(ApiError::forbidden(format!("forbidden: User \"{user}\" cannot {verb} path \"{path}\"")));
    }
    Ok(())
}

/// The token of `Bearer token`; the case of the scheme is ignored, as in a real server.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = value.split_at(space);
    let token = rest.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer") && !token.is_empty()).then_some(token)
}
