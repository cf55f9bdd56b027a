//! A forward proxy on loopback for hosts that no name server knows. It accepts `CONNECT HOST:PORT` for any host and
//! connects each to the same address. kubeconfigs name it in `proxy-url`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

const HEAD_DEADLINE: Duration = Duration::from_secs(10);
const HEAD_MAX: usize = 8 * 1024;
const ASKED_MAX: usize = 1000;

/// A running relay; dropping it cuts everything that goes through it.
#[derive(Debug)]
pub struct ConnectRelay {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    _stop: DropGuard,
}

impl ConnectRelay {
    /// Listens on a free loopback port and connects every request to `to`.
    ///
    /// # Errors
    /// There is no free port.
    pub async fn start(to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (stop, asked) = (CancellationToken::new(), Arc::<Mutex<Vec<String>>>::default());
        let tasks = TaskTracker::new();
        let (stopped, seen) = (stop.clone(), Arc::clone(&asked));
        tasks.clone().spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = stopped.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let Ok((client, _)) = accepted else { continue };
                let (stopped, seen) = (stopped.clone(), Arc::clone(&seen));
                tasks.spawn(async move {
                    tokio::select! {
                        () = stopped.cancelled() => {}
                        result = relay(client, to, &seen) => {
                            if let Err(error) = result {
                                tracing::debug!(%error, "a relayed connection ended");
                            }
                        }
                    }
                });
            }
        });
        Ok(Self { address, asked, _stop: stop.drop_guard() })
    }

    /// Where it listens.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The `HOST:PORT`s that were asked for so far, at most the first thousand.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn relay(mut client: TcpStream, to: SocketAddr, asked: &Mutex<Vec<String>>) -> io::Result<()> {
    let head = timeout(HEAD_DEADLINE, read_head(&mut client)).await??;
    let mut words = head.split(' ');
    let (Some("CONNECT"), Some(authority)) = (words.next(), words.next()) else {
        return client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n").await;
    };
    {
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() < ASKED_MAX {
            asked.push(authority.to_owned());
        }
    }
    let mut server = TcpStream::connect(to).await?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

/// Reads byte by byte up to the empty line: what follows it belongs to the connection that is relayed.
async fn read_head(client: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.push(client.read_u8().await?);
    }
    String::from_utf8(head).map_err(|_| io::ErrorKind::InvalidData.into())
}
