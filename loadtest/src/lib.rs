//! towline-loadtest
