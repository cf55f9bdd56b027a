//! Transports that the tunnel may run over, and the reason why a session runs over one.

/// Why a session runs over its transport: for the readiness page, and as the metric label `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The configuration sets it.
    Configured,
    /// It is what `auto` prefers.
    Preferred,
    /// TCP: QUIC was not ready when TCP was.
    Start,
    /// TCP: a QUIC session died.
    Died,
    /// TCP: a QUIC session is silent.
    Stalled,
    /// TCP: QUIC sessions died too often recently.
    Flapping,
}

impl Reason {
    pub(crate) const FALLBACKS: [Self; 4] = [Self::Start, Self::Died, Self::Stalled, Self::Flapping];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Preferred => "preferred",
            Self::Start => "start",
            Self::Died => "died",
            Self::Stalled => "stalled",
            Self::Flapping => "flapping",
        }
    }

    /// For the readiness page.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Configured => "as configured",
            Self::Preferred => "preferred",
            Self::Start => "QUIC was not ready in time; UDP may be blocked",
            Self::Died => "the QUIC session died",
            Self::Stalled => "the QUIC session is silent",
            Self::Flapping => "QUIC sessions die too often",
        }
    }

    pub(crate) const fn is_fallback(self) -> bool {
        !matches!(self, Self::Configured | Self::Preferred)
    }
}
