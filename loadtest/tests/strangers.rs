//! Goal: the front as strangers meet it: every row of the catalogue of bad inputs for HTTP/1.1 and HTTP/2 over real sockets,
//! byte by byte as the row says, against a gateway, an agent and an API server that records what reaches it. One table a
//! group ([`http1`], [`http2`]), and behind each row the same questions ([`group`]). Which test holds the rows of the other groups
//! says [`catalogue`].

#![expect(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]

#[path = "strangers/catalogue.rs"]
mod catalogue;
mod common;
#[path = "strangers/configuration.rs"]
mod configuration;
#[path = "strangers/group.rs"]
mod group;
#[path = "strangers/hand.rs"]
mod hand;
#[path = "strangers/http1.rs"]
mod http1;
#[path = "strangers/http2.rs"]
mod http2;
#[path = "strangers/others.rs"]
mod others;
#[path = "strangers/parsers.rs"]
mod parsers;
