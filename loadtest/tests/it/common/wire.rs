//! A client that says exactly what a test says: raw HTTP/1.1 over TLS.

use super::{PATIENCE, Refusal};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use towline_fakeapi::{ClientCertificate, FakeApi};
use towline_testkit::client::{Target, Version};

pub(crate) struct Client {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) unread: Vec<u8>,
}

pub(crate) struct Answer {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn code(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The value of a header, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(":"));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value.trim())
    }

    /// What the gateway itself refused.
    pub(crate) fn refusal(&self) -> Refusal {
        Refusal::of(self.code(), self.header("warning"), &self.body)
    }

    pub(crate) fn has(&self, line: &str) -> bool {
        self.head.lines().any(|found| found.eq_ignore_ascii_case(line))
    }
}

pub(crate) async fn tls(
    fake: &FakeApi,
    alpn: &[u8],
    certificate: Option<&ClientCertificate>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(fake.ca_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match certificate {
        Some(certificate) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.certificate_pem.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols.push(alpn.to_vec());
    let stream = TcpStream::connect(fake.addr()).await?;
    let name = ServerName::try_from("kubernetes.default.svc").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

impl Client {
    pub(crate) async fn connect(fake: &FakeApi) -> Self {
        Self { stream: tls(fake, b"http/1.1", None).await.unwrap(), unread: Vec::new() }
    }

    /// A connection to any target; its prefix and headers are for the test to write.
    pub(crate) async fn open(target: &Target) -> Self {
        Self { stream: target.open(Version::Http1).await.unwrap(), unread: Vec::new() }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Sends a request without a body, as `admin`, and reads the answer.
    pub(crate) async fn get(&mut self, target: &str) -> Answer {
        self.request("GET", target, "").await
    }

    pub(crate) async fn request(&mut self, method: &str, target: &str, body: &str) -> Answer {
        let length = body.len();
        self.send(&format!(
            "{method} {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fake-admin-token\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
        .await;
        self.answer(method == "HEAD").await
    }

    async fn more(&mut self) -> bool {
        let read = timeout(PATIENCE, self.stream.read_buf(&mut self.unread)).await;
        matches!(read.expect("the server is silent"), Ok(count) if count > 0)
    }

    pub(crate) async fn head(&mut self) -> String {
        loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                let head = self.unread.drain(..end + 4).collect();
                return String::from_utf8(head).unwrap();
            }
            assert!(
                self.more().await,
                "the connection ended in a head: {:?}",
                String::from_utf8_lossy(&self.unread)
            );
        }
    }

    /// Reads an answer with Content-Length or chunks; without either it has no body.
    pub(crate) async fn answer(&mut self, no_body: bool) -> Answer {
        let head = self.head().await;
        let lower = head.to_ascii_lowercase();
        let length = lower.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next());
        let mut body = Vec::new();
        if no_body {
        } else if let Some(length) = length {
            body = self.take(length.parse().unwrap()).await;
        } else if lower.contains("transfer-encoding: chunked") {
            while let Some(chunk) = self.chunk().await {
                body.extend_from_slice(&chunk);
            }
        }
        Answer { head, body }
    }

    pub(crate) async fn take(&mut self, length: usize) -> Vec<u8> {
        while self.unread.len() < length {
            assert!(self.more().await, "the connection ended in a body");
        }
        self.unread.drain(..length).collect()
    }

    /// The next chunk of a chunked body.
    pub(crate) async fn chunk(&mut self) -> Option<Vec<u8>> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n") {
                break end;
            }
            assert!(self.more().await, "the connection ended in a chunk's head");
        };
        let size: Vec<u8> = self.unread.drain(..end + 2).collect();
        let size = usize::from_str_radix(std::str::from_utf8(&size).unwrap().trim(), 16).unwrap();
        let chunk = self.take(size).await;
        self.take(2).await;
        (size > 0).then_some(chunk)
    }

    /// Reads until the connection ends; `Ok` means a clean TLS end.
    pub(crate) async fn rest(&mut self) -> (Vec<u8>, std::io::Result<()>) {
        let mut rest = std::mem::take(&mut self.unread);
        let read = timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await;
        let ended = read.expect("the connection stays open").map(|_| ());
        (rest, ended)
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
