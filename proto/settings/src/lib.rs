//! One reader of configuration files for both programs. A program describes each of its sections once, with [`section!`]: key,
//! type, default, range, a sentence. From that description come the struct, the reader, the printer of `--check` and the JSON
//! schema of `--schema`.
//!
//! ```
//! use std::time::Duration;
//! towline_settings::section! {
//!     /// How the program stops.
//!     #[derive(Clone, Debug)]
//!     #[section(default)]
//!     pub struct Drain {
//!         /// When what still runs is cut off.
//!         pub deadline: Duration = Duration::from_secs(30), in ..=Duration::from_secs(3600);
//!     }
//! }
//! # impl towline_settings::Configuration for Drain { const KIND: &str = "Drain"; const PROGRAM: &str = "drain"; }
//! let text = "apiVersion: towline.io/v1alpha1\nkind: Drain\ndeadlin: 10 parsecs\n";
//! let problems = towline_settings::read::<Drain>(text, "drain.yaml").unwrap_err();
//! assert_eq!(problems.to_string(), "drain.yaml:3:1: deadlin: there is no such key; did you mean deadline?");
//! ```
//!
//! Why not `serde` and `schemars`: a serde reader ends at the first value of a wrong type, knows neither the key's path nor a
//! default that depends on another key, and says of an unknown key only which ones there are. What it gave to the gateway had to
//! be repaired with thread-local notes, and its ranges stood in a second place. A table that is read by our own hands is a
//! few hundred lines, shared by two programs, and every sentence that a user sees is ours.
//!
//! The YAML itself is read by `granit-parser`, on which `serde-saphyr` stands, too: its events say where each key and value is.

pub mod breaking;
mod document;
pub mod documents;
mod findings;
mod macros;
mod near;
mod read;
mod schema;
mod section;
mod shown;
#[cfg(test)]
mod tests;
pub mod tries;
pub mod units;
mod values;

pub use document::{FILE_MAX, read_text};
pub use findings::{Findings, Places, Problem, Problems};
#[doc(hidden)]
pub use macros::key_of;
pub use near::near;
pub use read::{API_VERSION, Configuration, KINDS, check, read, read_secrets, schema, to_yaml};
pub use schema::{Schema, violations};
pub use section::{Section, Spot};
pub use shown::{Legal, Shown};
pub use units::ByteSize;
pub use values::{Each, Own, Predicate, Reads, Secret, Size, Text, legal, optional, required, within};
