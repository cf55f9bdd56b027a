//! towline-agent
