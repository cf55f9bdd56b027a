//! The codes with which streams and sessions end: one table for reset, stop and close, on every transport.
//!
//! Each code is mapped once: to the HTTP status that the client sees, to the words of the `Warning` header, and to the
//! label that metrics carry. See "Codes" in `docs/protocol.md`.

use core::fmt;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $label:literal, $status:literal, $text:literal;)*) => {
        /// A reason to end a stream or a session before its natural end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Code { $($(#[$doc])* $name = $value,)* }

        impl Code {
            /// Every code, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The code with this number. An unknown number is [`Code::Internal`]: a newer peer may have more codes, and none of
            /// them means success.
            #[must_use]
            pub const fn from_u32(value: u32) -> Self {
                match value { $($value => Self::$name,)* _ => Self::Internal }
            }

            /// The value of the metric label `code`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// The HTTP status that a client sees when the exchange ended with this code before its answer began.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// What happened, for the `Warning` header and the message of a Kubernetes `Status`.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

codes! {
    /// The sender's own caller disconnected.
    Cancelled = 1, "cancelled", 499, "the request was cancelled";
    /// The stream had no effect and may be tried elsewhere.
    Refused = 2, "refused", 503, "the agent refused the stream before it acted on it";
    /// The agent could not connect to the upstream.
    UpstreamConnect = 3, "upstream_connect", 502, "the agent could not connect to the upstream";
    /// The connection to the upstream broke, or the upstream did not answer with HTTP.
    UpstreamBody = 4, "upstream_body", 502, "the connection to the upstream broke";
    /// The agent's own configuration forbids what the stream asked for.
    Denied = 5, "denied", 403, "the agent's configuration forbids this";
    /// A limit was reached.
    Limit = 6, "limit", 429, "a limit was reached";
    /// A deadline passed.
    Deadline = 7, "deadline", 504, "a deadline passed";
    /// The peer sent more than its credit allowed.
    Flow = 8, "flow", 502, "flow control was violated";
    /// The peer broke the protocol.
    Proto = 9, "proto", 502, "the tunnel protocol was violated";
    /// The process is draining and accepts nothing new.
    Draining = 10, "draining", 503, "the process is draining";
    /// An internal error of the process that sends the code.
    Internal = 11, "internal", 500, "an internal fault";
}

impl Code {
    /// The number of this code on the wire.
    #[must_use]
    pub const fn to_u32(self) -> u32 {
        self as u32
    }

    /// Whether a request that ended with this code is known to have had no effect, so that it may be sent again.
    #[must_use]
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Refused)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are on the wire of released versions: they never change.
    #[test]
    fn numbers_are_fixed() {
        let numbers: Vec<u32> = Code::ALL.iter().map(|code| code.to_u32()).collect();
        assert_eq!(numbers, (1..=11).collect::<Vec<u32>>());
        for &code in Code::ALL {
            assert_eq!(Code::from_u32(code.to_u32()), code);
        }
    }

    /// A code from the future is an abort, never a clean end and never retryable.
    #[test]
    fn unknown_codes_are_internal() {
        for value in [0, 12, 0x0100, u32::MAX] {
            assert_eq!(Code::from_u32(value), Code::Internal);
            assert!(!Code::from_u32(value).is_retryable());
        }
    }
}
