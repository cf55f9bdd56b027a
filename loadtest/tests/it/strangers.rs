//! Goal: the front as strangers meet it: every row of the catalogue of bad inputs for HTTP/1.1 and HTTP/2 over real sockets,
//! byte by byte as the row says, against a gateway, an agent and an API server that records what reaches it. One table a
//! group ([`http1`], [`http2`]), and behind each row the same questions ([`group`]). Which test holds the rows of the other groups
//! says [`catalogue`].

mod catalogue;
mod configuration;
mod group;
mod hand;
mod http1;
mod http2;
mod others;
mod parsers;
