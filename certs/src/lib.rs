//! towline-certs
