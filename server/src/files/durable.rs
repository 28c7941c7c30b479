//! Steps on disk, each of which is done or not done after a crash: directories, whole files, names.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What a file is called until it is whole.
const TEMPORARY: &str = "tmp";

/// Makes a directory that only its owner can enter, and those above it.
pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        make_dir(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        // Another thread was faster.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    path.parent().map_or(Ok(()), sync_dir)
}

/// A new file that only its owner can read, in place of whatever had its name.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// The name that a file has until it is whole.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(TEMPORARY);
    PathBuf::from(name)
}

/// Whether a file never became whole.
pub(crate) fn is_temporary(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == TEMPORARY)
}

/// Gives a file that is whole and synced its name.
pub(crate) fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    std::fs::rename(temporary, path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Writes a file whole, in place of the one that had its name.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    let mut file = create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    publish(&temporary, path)
}

/// Removes a file, if there is one.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// After it, names that were given or taken in a directory stay so.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// What lies in a directory; nothing where there is none.
pub(crate) fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    match std::fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::files::tests::Directory;

    #[test]
    fn files_are_replaced_whole_and_are_their_owners_alone() {
        let directory = Directory::new();
        let below = directory.path().join("a/b");
        make_dir(&below).unwrap();
        make_dir(&below).unwrap();
        let path = below.join("x");
        for text in ["first", "second"] {
            write_whole(&path, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(entries(&below).unwrap(), std::slice::from_ref(&path));
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&below)), (0o600, 0o700));
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(entries(&below).unwrap().is_empty());
        assert!(entries(&below.join("none")).unwrap().is_empty());
    }
}
