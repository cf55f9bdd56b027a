//! The load test of Towline, and the test doubles that its tests share.

pub mod fakeapi;
pub mod kubectl;
