//! Servers in a pod: a web server that says hello, and a TCP echo.

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Answers every request with `hello from web` and the path.
pub(super) async fn web(tasks: &TaskTracker, stop: &CancellationToken) -> std::io::Result<SocketAddr> {
    listen(tasks, stop, |stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let text = format!("hello from web: {}\n", request.uri().path());
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
        });
        // The client ends the connection as it likes.
        http1::Builder::new().half_close(true).serve_connection(TokioIo::new(stream), service).await.ok();
    })
    .await
}

/// Sends everything back and closes its side when the peer does.
pub(super) async fn echo(tasks: &TaskTracker, stop: &CancellationToken) -> std::io::Result<SocketAddr> {
    listen(tasks, stop, |mut stream| async move {
        let (mut read, mut write) = stream.split();
        if tokio::io::copy(&mut read, &mut write).await.is_ok() {
            // The peer may be gone, which is an end too.
            write.shutdown().await.ok();
        }
    })
    .await
}

async fn listen<F, T>(tasks: &TaskTracker, stop: &CancellationToken, serve: F) -> std::io::Result<SocketAddr>
where
    F: Fn(TcpStream) -> T + Send + Sync + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let (tasks, stop) = (tasks.clone(), stop.clone());
    tasks.clone().spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { return };
            let (stop, served) = (stop.clone(), serve(stream));
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = served => {}
                }
            });
        }
    });
    Ok(address)
}
