//! The reasons why a caller is refused, with the status and the words of each. [`crate::web::answer`] builds the response.

use super::authn::AuthnError;
use super::origin::PageError;
use crate::metrics::{Ended, Limit, TlCode};
use crate::web::answer::{SAID_MAX, Verdict};
use http::StatusCode;
use towline_model::ClusterName;
use towline_model::text::clip;

/// Why a caller may not.
#[derive(Debug)]
pub(crate) enum AccessError {
    Authn(AuthnError),
    /// A web page asks, and may not.
    Page(PageError),
    /// Forbidden, or unknown to a caller who may not learn that.
    Forbidden {
        cluster: String,
    },
    NoSuchCluster {
        cluster: String,
    },
    /// The cluster was deleted or its mode changed during the request.
    ClusterChanged {
        cluster: String,
    },
    /// A limit of the caller's, and what there is too much of.
    Limit(Limit, &'static str),
}

impl From<AuthnError> for AccessError {
    fn from(error: AuthnError) -> Self {
        Self::Authn(error)
    }
}

impl From<PageError> for AccessError {
    fn from(error: PageError) -> Self {
        Self::Page(error)
    }
}

impl AccessError {
    /// The error for a request to this cluster whose caller lost access.
    pub(crate) fn ended(why: Ended, cluster: &ClusterName) -> Self {
        let cluster = cluster.to_string();
        match why {
            Ended::Revoked | Ended::Expired => Self::Authn(why.into()),
            Ended::Forbidden => Self::Forbidden { cluster },
            Ended::Cluster => Self::ClusterChanged { cluster },
        }
    }

    /// The limit that was reached, for the metric.
    pub(crate) const fn limit(&self) -> Option<Limit> {
        match self {
            Self::Limit(limit, _) => Some(*limit),
            _ => None,
        }
    }

    /// The cluster that was called, if the caller may hear of it.
    pub(crate) fn cluster(&self) -> Option<&str> {
        match self {
            Self::Forbidden { cluster }
            | Self::NoSuchCluster { cluster }
            | Self::ClusterChanged { cluster } => Some(cluster),
            Self::Authn(_) | Self::Page(_) | Self::Limit(..) => None,
        }
    }

    /// What the client sees.
    pub(crate) fn verdict(&self) -> Verdict {
        let verdict = |status, code, message: String| Verdict { status, code, message };
        match self {
            Self::Authn(error) => authn(error),
            Self::Page(error) => page(error),
            Self::Forbidden { cluster } => verdict(
                StatusCode::FORBIDDEN,
                TlCode::Forbidden,
                format!(
                    "you are not allowed to call cluster {cluster:?}, or it does not exist — ask the fleet's operator for an access rule"
                ),
            ),
            Self::NoSuchCluster { cluster } => verdict(
                StatusCode::NOT_FOUND,
                TlCode::NoSuchCluster,
                format!(
                    "cluster {cluster:?} does not exist — check its name in the server URL of your kubeconfig"
                ),
            ),
            Self::ClusterChanged { cluster } => verdict(
                StatusCode::SERVICE_UNAVAILABLE,
                TlCode::NoSuchCluster,
                format!(
                    "cluster {cluster:?} was deleted, or its mode was changed, while the request was running — check whether the request took effect, then repeat it"
                ),
            ),
            Self::Limit(_, what) => verdict(
                StatusCode::TOO_MANY_REQUESTS,
                TlCode::Limit,
                format!("too many {what} — wait for some of them to end, then retry"),
            ),
        }
    }
}

fn authn(error: &AuthnError) -> Verdict {
    let token =
        "use a client certificate or a token of this gateway; check which credential your kubeconfig sends";
    let (status, code, remedy) = match error {
        AuthnError::SeveralAuthorizations | AuthnError::MalformedAuthorization => {
            (StatusCode::BAD_REQUEST, TlCode::BadFraming, "send one Authorization header with one credential")
        }
        AuthnError::NoCredential | AuthnError::UnknownToken => {
            (StatusCode::UNAUTHORIZED, TlCode::Unauthenticated, token)
        }
        AuthnError::CertificateUnbelieved(_)
        | AuthnError::CertificateExpired
        | AuthnError::CertificateRevoked
        | AuthnError::Revoked
        | AuthnError::Expired => {
            (StatusCode::UNAUTHORIZED, TlCode::Unauthenticated, "get a new credential for this gateway")
        }
        AuthnError::ForeignCredential => (
            StatusCode::UNAUTHORIZED,
            TlCode::Unauthenticated,
            "set client-certificate and client-key for the gateway in your kubeconfig, in addition to the cluster's own token if it needs one",
        ),
        AuthnError::ClusterCredentialNeeded => (
            StatusCode::UNAUTHORIZED,
            TlCode::Unauthenticated,
            "add a token of that cluster (such as a ServiceAccount token) to the same user of your kubeconfig",
        ),
        AuthnError::OwnCredential => (
            StatusCode::UNAUTHORIZED,
            TlCode::Unauthenticated,
            "send a credential of the cluster instead; the gateway did not forward the token",
        ),
        AuthnError::Principal(_) => {
            (StatusCode::FORBIDDEN, TlCode::Forbidden, "use a user name and groups without a reserved prefix")
        }
    };
    Verdict { status, code, message: format!("{error} — {remedy}") }
}

fn page(error: &PageError) -> Verdict {
    let (code, remedy) = match error {
        PageError::CrossSite => {
            (TlCode::Forbidden, "call the gateway from its own origin or without a browser")
        }
        PageError::ForeignOrigin(_) => (
            TlCode::Forbidden,
            "call the gateway without a browser, or add the origin to allowedOrigins in the gateway's configuration",
        ),
    };
    // The origin's own text may be as long as a head.
    let error = clip(&error.to_string(), SAID_MAX);
    Verdict { status: StatusCode::FORBIDDEN, code, message: format!("{error} — {remedy}") }
}
