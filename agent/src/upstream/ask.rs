//! Requests that the agent sends to the API server for itself: on a connection of their own, with a deadline and a bounded
//! response. Exchanges of callers neither wait for them nor include them in their counts.

use crate::dial::connect::ConnectError;
use crate::upstream::Upstream;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use thiserror::Error;
use tokio::time::{Duration, Instant, timeout_at};
use towline_proto::open::FIELDS_MAX;
use towline_proto::text::Lasting;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request got no response.
#[derive(Debug, Error)]
pub(crate) enum AskError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("accepts requests but answers none within {}", Lasting(*.0))]
    Deadline(Duration),
    #[error("closed the connection without a usable response")]
    Broken,
}

/// Sends a request and reads its whole response. Dropping the future closes the connection.
pub(crate) async fn ask(
    upstream: &Upstream,
    mut request: Request<Full<Bytes>>,
    credential: Option<HeaderValue>,
    within: Duration,
    body_max: usize,
) -> Result<Response<Bytes>, AskError> {
    let deadline = Instant::now() + within;
    let io = upstream.connect_aside(within).await?;
    let headers = request.headers_mut();
    headers.insert(header::HOST, upstream.authority.clone());
    if let Some(credential) = credential {
        headers.insert(header::AUTHORIZATION, credential);
    }
    let exchange = async {
        let (mut sender, connection) =
            http1::Builder::new().max_headers(FIELDS_MAX).handshake(TokioIo::new(io)).await?;
        let asking = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, body_max).collect().await;
            Ok::<_, hyper::Error>(body.ok().map(|body| Response::from_parts(head, body.to_bytes())))
        };
        // A server may close the connection after its response, and does so after a 401. Data that arrived by then is still read;
        // missing data is an error of the request.
        let driven = async {
            drop(connection.await);
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            answer = asking => answer,
            never = driven => match never {},
        }
    };
    match timeout_at(deadline, exchange).await {
        Ok(Ok(Some(answer))) => Ok(answer),
        Ok(Ok(None) | Err(_)) => Err(AskError::Broken),
        Err(_) => Err(AskError::Deadline(within)),
    }
}

/// The body of a 200 response to a GET; `None` for any other result.
pub(crate) async fn get(
    upstream: &Upstream,
    path: &str,
    credential: Option<HeaderValue>,
    body_max: usize,
) -> Option<Bytes> {
    let request = Request::get(path).body(Full::default()).ok()?;
    let answer = ask(upstream, request, credential, TIMEOUT, body_max).await.ok()?;
    (answer.status() == 200).then(|| answer.into_body())
}
