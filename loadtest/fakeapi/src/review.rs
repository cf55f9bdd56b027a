//! Reviews: SelfSubjectReview, access reviews and TokenReview.

use crate::authn::may_impersonate;
use crate::body::Response;
use crate::call::{Call, decoded};
use crate::kinds::REVIEWS;
use crate::recorder::Identity;
use crate::status::{ApiError, json_response};
use http::{Method, StatusCode};
use serde_json::{Value, json};

/// Answers a review; `None` if the path is not a review's.
pub(crate) async fn answer(call: &mut Call) -> Result<Option<Response>, ApiError> {
    let path = call.path.clone();
    let review =
        REVIEWS.iter().find(|review| path == format!("/apis/{}/{}/{}", review.0, review.1, review.2));
    let Some((group, version, _, kind)) = review else { return Ok(None) };
    if call.method != Method::POST {
        return Err(ApiError::method_not_allowed());
    }
    let mut object = decoded(call).await?;
    let identity = call.identity.clone().ok_or_else(ApiError::unauthorized)?;
    object["kind"] = json!(kind);
    object["apiVersion"] = format!("{group}/{version}").into();
    object["status"] = match *kind {
        "SelfSubjectReview" => json!({"userInfo": user_info(&identity)}),
        "TokenReview" => {
            let token = object["spec"]["token"].as_str().unwrap_or("");
            let row = call.shared.options.tokens.iter().find(|row| row.token == token);
            match row {
                Some(row) => {
                    let user = user_info(&Identity::new(row.user.clone(), row.groups.clone()));
                    json!({"authenticated": true, "user": user, "audiences": object["spec"]["audiences"]})
                }
                None => json!({"authenticated": false, "error": "invalid bearer token"}),
            }
        }
        "SelfSubjectAccessReview" if object["spec"]["resourceAttributes"]["verb"] == "impersonate" => {
            let attributes = &object["spec"]["resourceAttributes"];
            let text = |field: &str| attributes[field].as_str().unwrap_or_default();
            let allowed = may_impersonate(&call.shared, &identity, text("resource"), text("name"));
            json!({"allowed": allowed, "reason": ""})
        }
        _ => {
            let asked = object["spec"]["user"].as_str().unwrap_or(&identity.user);
            let allowed = !call.shared.options.denied_users.iter().any(|user| user == asked);
            json!({"allowed": allowed, "reason": if allowed { "the fake allows it" } else { "" }})
        }
    };
    Ok(Some(json_response(StatusCode::CREATED, &object)))
}

fn user_info(identity: &Identity) -> Value {
    let mut info = json!({"username": identity.user, "groups": identity.groups});
    if let Some(uid) = &identity.uid {
        info["uid"] = uid.clone().into();
    }
    for (name, values) in &identity.extra {
        info["extra"][name] = json!(values);
    }
    info
}
