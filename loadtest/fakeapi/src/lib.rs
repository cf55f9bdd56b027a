//! A fake Kubernetes API server: the everyday test double of a real one, driven by real `kubectl`, and no kinder.
//!
//! It speaks TLS with HTTP/1.1 and HTTP/2, keeps a small namespaced store with watches, runs real processes for
//! `exec`, and records every request. Helper paths under `/towline-test/` and the fault switches of [`FakeApi`]
//! misbehave on request.
//!
//! What all tasks share is in `shared`. A connection's way through the files: `serve` accepts, `tap` sits between TLS and HTTP,
//! `connection` is what its requests know of it, `call` is one request,
//! `authn` says who asks, `rbac` what they may, `router` says where it goes; `discovery`, `openapi`, `resources`, `watch`, `review`, `pods`
//! and `helpers` answer; `spdy` and `websocket` carry `exec`, `attach` and `portforward`.

#![allow(clippy::cast_possible_truncation, reason = "a stand-in for tests, which nobody hostile talks to")]

mod authn;
mod body;
mod call;
mod connection;
mod controllers;
mod discovery;
mod faults;
mod handle;
mod helpers;
mod kinds;
mod list;
mod lock;
mod oddities;
mod openapi;
mod options;
mod patch;
mod pods;
mod protobuf;
mod rbac;
mod recorder;
mod resources;
mod review;
mod router;
mod seed;
mod selector;
mod serve;
mod shared;
mod spdy;
mod status;
mod store;
mod switches;
mod table;
mod tap;
mod target;
mod tls;
mod watch;
mod websocket;

pub use body::pattern_chunk;
pub use faults::{RawEnd, RawResponse};
pub use handle::{FakeApi, StartError, kubeconfig};
pub use options::{ADMIN_TOKEN, AGENT_TOKEN, FakeApiOptions, Token, USER_TOKEN};
pub use recorder::{BodyRecord, Identity, Recorder, RequestRecord};
pub use tap::ConnectionRecord;
pub use tls::{ClientCertificate, TlsError};
