//! The files that sentence-transformers puts beside a checkpoint: how a text's rows become one, and how long it may be.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::LoadError;
use crate::config::Config;
use crate::file;
use crate::graph::{Graph, Op, PoolKind, Pooled, PooledKind};

/// Texts beyond this are not a model's.
const LEN_MAX: usize = 1 << 26;

/// Modes of a pooling module that are supported, by the key that turns them on.
const MODES: [(&str, PoolKind); 3] = [
    ("pooling_mode_cls_token", PoolKind::First),
    ("pooling_mode_mean_tokens", PoolKind::Mean),
    ("pooling_mode_lasttoken", PoolKind::Last),
];

/// Others, which would have to be off.
const OTHER_MODES: [&str; 3] =
    ["pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens"];

/// Makes a graph's embedding what `modules.json` and `sentence_bert_config.json` of its directory say. Embeddings have
/// length 1 with or without a module that makes them so.
///
/// # Errors
/// [`LoadError`] where a file asks for what is not supported.
pub(crate) fn apply(dir: &Path, graph: &mut Graph) -> Result<(), LoadError> {
    let Some(pooled) = graph.pooled.as_mut().filter(|pooled| pooled.kind == PooledKind::Embedding) else {
        return Ok(());
    };
    if let Some(kind) = pool_kind(dir)? {
        pool_by(pooled, kind);
    }
    let path = dir.join("sentence_bert_config.json");
    if let Some(bytes) = file::read_optional(&path, file::CONFIG_BYTES_MAX)?
        && let Some(most) = Config::from_bytes(&path, &bytes)?.count("max_seq_length", 1..=LEN_MAX)?
    {
        graph.context = graph.context.min(most);
    }
    Ok(())
}

/// Makes an embedding of these rows.
pub(crate) fn pool_by(pooled: &mut Pooled, kind: PoolKind) {
    for op in &mut pooled.block.ops {
        if let Op::Pool { kind: found, .. } = op {
            *found = kind;
        }
    }
}

/// How `modules.json` pools; `None` where there is none, or it does not say.
fn pool_kind(dir: &Path) -> Result<Option<PoolKind>, LoadError> {
    let path = dir.join("modules.json");
    let Some(bytes) = file::read_optional(&path, file::CONFIG_BYTES_MAX)? else { return Ok(None) };
    let modules: Vec<Value> = serde_json::from_slice(&bytes)
        .map_err(|e| LoadError::format(&path, format!("expected a list of modules, found: {e}")))?;
    let mut kind = None;
    for module in &modules {
        let name = module["type"].as_str().unwrap_or_default();
        match name.rsplit('.').next().unwrap_or_default() {
            "Transformer" | "Normalize" => {}
            "Pooling" => kind = Some(read_pooling(&inside(dir, &path, module)?.join("config.json"))?),
            _ => {
                let what = format!("expected modules Transformer, Pooling and Normalize, found `{name}`");
                return Err(LoadError::format(&path, what));
            }
        }
    }
    Ok(kind)
}

/// A module's directory, which must lie in the checkpoint's.
fn inside(dir: &Path, modules: &Path, module: &Value) -> Result<PathBuf, LoadError> {
    let path = Path::new(module["path"].as_str().unwrap_or_default());
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(dir.join(path));
    }
    let what = format!("expected the path of a module inside the directory, found {}", module["path"]);
    Err(LoadError::format(modules, what))
}

fn read_pooling(path: &Path) -> Result<PoolKind, LoadError> {
    let config = Config::from_bytes(path, &file::read(path, file::CONFIG_BYTES_MAX)?)?;
    let mut on = Vec::new();
    for (key, kind) in MODES {
        if config.flag(key, false)? {
            on.push(kind);
        }
    }
    for key in OTHER_MODES {
        if config.flag(key, false)? {
            return Err(config.wrong(key, "false (rows are pooled by the mean, the first or the last)"));
        }
    }
    match on[..] {
        [kind] => Ok(kind),
        _ => {
            let keys = MODES.map(|(key, _)| key).join(", ");
            let what = format!("expected one of {keys} to be true, found {}", on.len());
            Err(LoadError::format(path, what))
        }
    }
}
