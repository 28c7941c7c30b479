//! The directory for what outlives a run: sessions with their keys and values, and the input history of `mainstay chat`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The directory that was asked for, else the user's own (XDG Base Directory Specification).
pub(crate) fn resolve(asked: Option<&Path>) -> Option<PathBuf> {
    let of = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    asked
        .map(Path::to_owned)
        .or_else(|| Some(of("XDG_DATA_HOME")?.join("mainstay")))
        .or_else(|| Some(of("HOME")?.join(".local/share/mainstay")))
}

/// Creates the directory and proves that a file can be written in it.
///
/// # Errors
/// Names the directory.
pub(crate) fn prepare(dir: &Path) -> Result<()> {
    let wrong = || format!("the data directory {} cannot be written", dir.display());
    fs::create_dir_all(dir).with_context(wrong)?;
    let probe = dir.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, b"").with_context(wrong)?;
    fs::remove_file(&probe).with_context(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_comes_first() {
        assert_eq!(resolve(Some(Path::new("/x"))), Some(PathBuf::from("/x")));
    }

    #[test]
    fn a_directory_is_made_and_a_file_is_none() {
        let dir = env::temp_dir().join(format!("mainstay-data-{}", std::process::id()));
        prepare(&dir.join("inner")).unwrap();
        assert_eq!(fs::read_dir(dir.join("inner")).unwrap().count(), 0, "the probe is gone");
        let file = dir.join("file");
        fs::write(&file, b"").unwrap();
        let message = prepare(&file).unwrap_err().to_string();
        assert!(message.contains("cannot be written") && message.contains("file"), "{message}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
