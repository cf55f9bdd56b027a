//! Polls files for changes by content, and parses the new content. Needs no runtime.
//!
//! It compares content, not modification times: a mounted secret changes by a symlink swap that a file watcher on the path can
//! miss. A bad file keeps the last good value. If two files change one after the other, the pair is bad in between (the key
//! does not belong to the certificate) and good at the next poll.

use crate::load::{FileBytes, LoadError};
use aws_lc_rs::digest;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// The result of a poll.
#[derive(Debug)]
pub enum Reload<T, E> {
    /// The same bytes as the value in use.
    Unchanged,
    /// New, good content: the value now in use.
    Changed(Arc<T>),
    /// Bad content: the last good value stays in use.
    Kept {
        /// The error.
        error: E,
        /// Whether the same files were wrong in the same way at the last poll; log only when not.
        repeated: bool,
    },
}

/// Files, and the value made from them.
pub struct Watched<T, E = LoadError> {
    paths: Vec<PathBuf>,
    parse: Box<Parse<T, E>>,
    good: Arc<T>,
    hash: Hash,
    /// Hash and text of the last failure; none while the value in use is that of the files.
    failure: Option<(Option<Hash>, String)>,
}

type Parse<T, E> = dyn Fn(&[FileBytes]) -> Result<T, E> + Send + Sync;
type Hash = [u8; 32];

impl<T, E: From<LoadError> + fmt::Display> Watched<T, E> {
    /// Reads the files for the first time. `parse` gets them in the order of `paths`.
    ///
    /// # Errors
    /// A file cannot be read, or `parse` rejects it. At the start there is no earlier value to keep.
    pub fn open(
        paths: Vec<PathBuf>,
        parse: impl Fn(&[FileBytes]) -> Result<T, E> + Send + Sync + 'static,
    ) -> Result<Self, E> {
        let files = read_all(&paths)?;
        let good = Arc::new(parse(&files)?);
        Ok(Self { paths, parse: Box::new(parse), good, hash: hash(&files), failure: None })
    }

    /// The value in use.
    #[must_use]
    pub fn current(&self) -> &Arc<T> {
        &self.good
    }

    /// The paths of the files.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Whether the files are bad and the value in use is an older one.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.failure.is_some()
    }

    /// Reads the files again. Blocks on file I/O, so do not call it on a runtime's thread. Bad content is parsed again at each
    /// poll, because time alone can make it valid (a certificate that was not valid yet).
    pub fn poll(&mut self) -> Reload<T, E> {
        let files = match read_all(&self.paths) {
            Ok(files) => files,
            Err(error) => return self.keep(None, error.into()),
        };
        let hash = hash(&files);
        if hash == self.hash {
            self.failure = None;
            return Reload::Unchanged;
        }
        match (self.parse)(&files) {
            Ok(value) => {
                self.good = Arc::new(value);
                self.hash = hash;
                self.failure = None;
                Reload::Changed(self.good.clone())
            }
            Err(error) => self.keep(Some(hash), error),
        }
    }

    fn keep(&mut self, hash: Option<Hash>, error: E) -> Reload<T, E> {
        let failure = (hash, error.to_string());
        // The same bytes are the same error, even if its text contains a changing duration.
        let repeated = match &self.failure {
            Some((Some(earlier), _)) => hash.as_ref() == Some(earlier),
            Some(earlier) => *earlier == failure,
            None => false,
        };
        self.failure = Some(failure);
        Reload::Kept { error, repeated }
    }
}

impl<T, E> fmt::Debug for Watched<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("paths", &self.paths).field("stale", &self.failure.is_some()).finish()
    }
}

fn read_all(paths: &[PathBuf]) -> Result<Vec<FileBytes>, LoadError> {
    paths.iter().map(|path| FileBytes::read(path)).collect()
}

/// Each file with its length, so that no two sets of files hash alike by moving a border.
fn hash(files: &[FileBytes]) -> Hash {
    let mut context = digest::Context::new(&digest::SHA256);
    for file in files {
        context.update(&file.bytes().len().to_be_bytes());
        context.update(file.bytes());
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::LoadCause;
    use std::fs;

    fn watch(paths: &[PathBuf]) -> Watched<String> {
        Watched::open(paths.to_vec(), |files| {
            let text: Vec<_> = files.iter().map(|file| String::from_utf8_lossy(file.bytes())).collect();
            if text.iter().any(|text| text.contains("bad")) {
                return Err(LoadError { path: "x".into(), cause: LoadCause::NotPem });
            }
            Ok(text.join("|"))
        })
        .unwrap()
    }

    #[test]
    fn a_bad_file_keeps_the_last_good_value() {
        let directory = tempfile::tempdir().unwrap();
        let paths = [directory.path().join("a"), directory.path().join("b")];
        fs::write(&paths[0], "1").unwrap();
        fs::write(&paths[1], "2").unwrap();
        let mut watched = watch(&paths);
        assert_eq!(**watched.current(), "1|2");
        assert!(matches!(watched.poll(), Reload::Unchanged));

        fs::write(&paths[0], "3").unwrap();
        assert!(matches!(watched.poll(), Reload::Changed(value) if *value == "3|2"));

        fs::write(&paths[0], "bad").unwrap();
        assert!(matches!(watched.poll(), Reload::Kept { repeated: false, .. }));
        assert!(matches!(watched.poll(), Reload::Kept { repeated: true, .. }));
        assert!(watched.is_stale());
        assert_eq!(**watched.current(), "3|2");

        fs::remove_file(&paths[0]).unwrap();
        assert!(matches!(watched.poll(), Reload::Kept { repeated: false, .. }));
        assert!(matches!(watched.poll(), Reload::Kept { repeated: true, .. }));

        fs::write(&paths[0], "3").unwrap();
        assert!(matches!(watched.poll(), Reload::Unchanged));
        assert!(!watched.is_stale());
        fs::write(&paths[0], "4").unwrap();
        assert!(matches!(watched.poll(), Reload::Changed(_)));
    }

    #[test]
    fn a_moved_border_between_files_is_a_change() {
        let directory = tempfile::tempdir().unwrap();
        let paths = [directory.path().join("a"), directory.path().join("b")];
        fs::write(&paths[0], "ab").unwrap();
        fs::write(&paths[1], "c").unwrap();
        let mut watched = watch(&paths);
        fs::write(&paths[0], "a").unwrap();
        fs::write(&paths[1], "bc").unwrap();
        assert!(matches!(watched.poll(), Reload::Changed(value) if *value == "a|bc"));
    }

    #[test]
    fn the_first_read_must_succeed() {
        let opened = Watched::<String>::open(vec!["/nonexistent/x".into()], |_| Ok(String::new()));
        assert_eq!(opened.unwrap_err().cause, LoadCause::Missing);
    }
}
