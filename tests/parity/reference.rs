//! What Hugging Face transformers computed from a checkpoint, as stored beside it in `expected.safetensors`.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// One prompt and what follows from it.
pub(crate) struct Prompt {
    /// Its tokens.
    pub(crate) ids: Vec<u32>,
    /// Logits after the prompt.
    pub(crate) last_logits: Vec<f32>,
    /// Logits after every token of the prompt, stored for short prompts.
    pub(crate) all_logits: Option<Vec<Vec<f32>>>,
    /// The greedy continuation.
    pub(crate) greedy: Vec<u32>,
    /// The largest logit minus the second largest, for every greedy token.
    pub(crate) margins: Vec<f32>,
    /// Logits after the prompt and all greedy tokens but the last.
    pub(crate) final_logits: Vec<f32>,
}

/// All prompts of a checkpoint's directory.
pub(crate) fn prompts(dir: &Path) -> Vec<Prompt> {
    let path = dir.join("expected.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let count = (0..).take_while(|i| file.tensor(&format!("prompt{i}.input_ids")).is_ok()).count();
    assert!(count > 0, "{} holds no prompt", path.display());
    (0..count).map(|i| prompt(&file, i)).collect()
}

fn prompt(file: &SafeTensors, index: usize) -> Prompt {
    let floats = |name: &str| {
        let tensor = file.tensor(&format!("prompt{index}.{name}")).ok()?;
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        Some(tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>())
    };
    let ids = |name: &str| {
        let tensor = file.tensor(&format!("prompt{index}.{name}")).expect(name);
        assert_eq!(tensor.dtype(), Dtype::I32, "{name}");
        tensor.data().as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<u32>>()
    };
    let last_logits = floats("last_logits").expect("last_logits");
    let all = floats("all_logits").map(|l| l.chunks(last_logits.len()).map(<[f32]>::to_vec).collect());
    Prompt {
        ids: ids("input_ids"),
        last_logits,
        all_logits: all,
        greedy: ids("greedy_ids"),
        margins: floats("greedy_margins").expect("greedy_margins"),
        final_logits: floats("final_logits").expect("final_logits"),
    }
}

/// A folder of fixtures that are part of the repository.
pub(crate) fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

/// A folder of the larger test data that is not part of the repository: under `MAINSTAY_SHARED`, else `../shared`.
/// Where it is missing, says so in one line.
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
pub(crate) fn shared(folder: &str) -> Option<PathBuf> {
    let root = std::env::var_os("MAINSTAY_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = root.join(folder);
    if path.is_dir() {
        return Some(path);
    }
    eprintln!(
        "skipped: {} is not there (set MAINSTAY_SHARED to the folder of shared test data)",
        path.display()
    );
    None
}
