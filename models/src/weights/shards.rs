//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::LoadError;
use crate::file;

/// The index, shard names resolved to indices.
pub(super) struct Shards {
    /// File names, sorted; each is a plain name.
    pub(super) files: Vec<String>,
    /// Tensor name and index into `files`.
    pub(super) tensors: Vec<(String, usize)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads and checks an index; the shards themselves are not opened.
pub(super) fn read(path: &Path) -> Result<Shards, LoadError> {
    let bytes = file::read(path, file::CONFIG_BYTES_MAX)?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|e| LoadError::format(path, format!("expected an object with `weight_map`, found: {e}")))?;
    let mut files: Vec<String> = index.weight_map.values().cloned().collect();
    files.sort_unstable();
    files.dedup();
    if files.is_empty() {
        return Err(LoadError::format(path, "expected shards in `weight_map`, found none"));
    }
    if let Some(name) = files.iter().find(|f| !is_plain(f)) {
        return Err(LoadError::format(
            path,
            format!("expected shards to be file names ending in .safetensors, found `{name}`"),
        ));
    }
    let place = |shard: &String| files.binary_search(shard).expect("files holds every value of the map");
    let tensors = index.weight_map.iter().map(|(tensor, shard)| (tensor.clone(), place(shard))).collect();
    Ok(Shards { files, tensors })
}

/// Whether a name stays in its directory, on every system.
fn is_plain(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', ':', '\0'])
}
