//! Reading small files of a checkpoint whole, never more of them than a stated limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::LoadError;

/// Configuration files are kilobytes; a shard index of 10^5 tensors is 10 MiB.
pub(crate) const CONFIG_BYTES_MAX: u64 = 64 << 20;
/// The largest published tokenizer.json is below 40 MiB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 512 << 20;

/// Opens a regular file (a pipe would block for ever) and tells its length in bytes.
pub(crate) fn open(path: &Path) -> Result<(File, u64), LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let found = std::fs::metadata(path).map_err(io)?;
    if !found.is_file() {
        return Err(LoadError::format(path, "expected a regular file, found something else"));
    }
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    Ok((file, len))
}

/// The contents of a file of at most `bytes_max` bytes.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, LoadError> {
    let (file, len) = open(path)?;
    if len > bytes_max {
        return Err(LoadError::format(path, format!("expected at most {bytes_max} bytes, found {len}")));
    }
    let mut bytes = Vec::new();
    // `take`, because the file may grow while it is read.
    file.take(bytes_max)
        .read_to_end(&mut bytes)
        .map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
    Ok(bytes)
}

/// As [`read`]; `None` where there is no such file.
pub(crate) fn read_optional(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, LoadError> {
    match read(path, bytes_max) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(LoadError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
