//! Notices about identity that the gateway sends in a session, and who answers them: the keeper, or the owner of the files.

use crate::metrics::Metrics;
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot};
use towline_certs::load::{FileBytes, parse_roots};
use towline_proto::join::{Notice, Renewed, Trust, TrustAck};
use towline_proto::tunnel::Session;

/// Notices that may wait for the keeper.
pub(crate) const SAID_MAX: usize = 16;

/// A notice from a session to the keeper. The answer returns on the same channel.
#[derive(Debug)]
pub(crate) enum Said {
    Renewed(Session, Renewed),
    Trust(Trust, oneshot::Sender<Result<(), String>>),
}

/// Receives the gateway's notices about identity in one session, until the session ends.
pub(crate) async fn listen(session: Session, keeper: mpsc::Sender<Said>) {
    while let Ok(notice) = session.hear().await {
        match notice {
            Notice::Renewed(renewed) => {
                if keeper.send(Said::Renewed(session.clone(), renewed)).await.is_err() {
                    return;
                }
            }
            Notice::Trust(trust) => {
                let version = trust.version;
                let (sender, kept) = oneshot::channel();
                if keeper.send(Said::Trust(trust, sender)).await.is_err() {
                    return;
                }
                let problem = match kept.await {
                    Ok(Ok(())) => String::new(),
                    Ok(Err(problem)) => problem,
                    Err(_) => "the agent ends".to_owned(),
                };
                // It fails only if the session has ended.
                session.say(Notice::TrustAck(TrustAck { version, problem })).unwrap_or_default();
            }
            // The mux lets none of them through to an agent.
            Notice::Renew(_) | Notice::TrustAck(_) | Notice::About(_) => {}
        }
    }
}

/// Answers announcements of roots for an identity from files.
pub(crate) async fn watch_files(ca: PathBuf, mut said: mpsc::Receiver<Said>, metrics: Metrics) {
    while let Some(said) = said.recv().await {
        let Said::Trust(trust, reply) = said else { continue };
        let ca = ca.clone();
        let read = tokio::task::spawn_blocking(move || {
            let roots = FileBytes::read(&ca).and_then(|file| parse_roots(&file));
            roots.map_err(|error| error.to_string()).map(|roots| (ca, roots))
        });
        let answer = match read.await {
            Ok(Ok((ca, roots))) => {
                let known = |root: &bytes::Bytes| roots.iter().any(|known| known.as_ref() == root.as_ref());
                if trust.roots.iter().all(known) {
                    Ok(())
                } else {
                    Err(format!("a root is missing in {}; the owner of that file must add it", ca.display()))
                }
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err("cannot read the CA bundle".to_owned()),
        };
        metrics.trust.with_label_values(&[if answer.is_ok() { "kept" } else { "failed" }]).inc();
        drop(reply.send(answer));
    }
}
