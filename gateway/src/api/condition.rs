//! A condition of an object's status.

use serde_json::{Value, json};
use towline_model::Time;

/// The condition as the API shows it.
pub(super) fn condition(kind: &str, status: &str, since: Time, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "lastTransitionTime": since, "reason": reason, "message": message})
}
