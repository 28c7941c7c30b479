//! LoRA adapters as PEFT writes them: two thin matrices beside some of a model's products, which add
//! `scale * (x A^T) B^T` to what the product gives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::LoadError;
use crate::config::Config;
use crate::file;
use crate::graph::{Graph, Op};
use crate::weights::Weights;

/// Highest rank of an adapter's matrices.
pub const RANK_MAX: usize = 512;
/// Larger adapter files are refused.
const BYTES_MAX: u64 = 16 << 30;

/// What PEFT puts before the name of a module of the model.
const PREFIX: &str = "base_model.model.";

/// An adapter, read and found to fit its model.
#[derive(Clone, Debug)]
pub struct AdapterWeights {
    /// By the full name of the weight that each stands beside, such as `model.layers.3.self_attn.q_proj.weight`.
    pub parts: BTreeMap<String, LowRank>,
    /// Of all that decides its results: two adapters of equal hash give equal results.
    pub hash: [u8; 32],
}

/// What is added to one product: `scale * (x A^T) B^T`.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Rows of A, columns of B.
    pub rank: usize,
    /// Multiplies `x A^T`.
    pub scale: f32,
    /// `[rank, cols of the weight]`
    pub a: Vec<f32>,
    /// `[rows of the weight, rank]`
    pub b: Vec<f32>,
}

impl AdapterWeights {
    /// Opens a directory with adapter_config.json and adapter_model.safetensors, for a model of this graph.
    ///
    /// # Errors
    /// [`LoadError`], naming the file and what in it is not supported, or does not fit the model.
    pub fn open(dir: &Path, graph: &Graph) -> Result<Self, LoadError> {
        let path = dir.join("adapter_config.json");
        let config = Config::from_bytes(&path, &file::read(&path, file::CONFIG_BYTES_MAX)?)?;
        let path = dir.join("adapter_model.safetensors");
        let weights = Weights::from_bytes(&path, file::read(&path, BYTES_MAX)?)?;
        Self::read(&Scaling::read(&config)?, &config, (&path, &weights), graph)
    }

    fn read(
        scaling: &Scaling,
        config: &Config,
        (path, weights): (&PathBuf, &Weights),
        graph: &Graph,
    ) -> Result<Self, LoadError> {
        let products = products(graph);
        let mut modules: BTreeMap<&str, [Option<&str>; 2]> = BTreeMap::new();
        for name in weights.names() {
            let (module, which) = module(name).ok_or_else(|| {
                let expected = format!("{PREFIX}MODULE.lora_A.weight or .lora_B.weight");
                LoadError::format(path, format!("tensor `{name}`: expected a name {expected}, found another"))
            })?;
            modules.entry(module).or_default()[which] = Some(name);
        }
        if modules.is_empty() {
            return Err(LoadError::format(path, "expected tensors of an adapter, found none"));
        }
        let mut parts = BTreeMap::new();
        for (module, names) in modules {
            let wrong = |what: String| LoadError::format(path, format!("module `{module}`: {what}"));
            let [Some(a), Some(b)] = names else {
                return Err(wrong("expected lora_A and lora_B, found one of them".to_owned()));
            };
            let weight = format!("{module}.weight");
            let Some(&(rows, cols)) = products.get(&weight) else {
                let what = format!(
                    "expected a product of a layer of this {} model, found another name",
                    graph.family
                );
                return Err(wrong(what));
            };
            let (rank, scale) = scaling.of(module);
            if !(1..=RANK_MAX).contains(&rank) {
                return Err(config.wrong("r", &format!("ranks from 1 to {RANK_MAX} (of {module}: {rank})")));
            }
            weights.expect(a, &[rank, cols])?;
            weights.expect(b, &[rows, rank])?;
            let read = |name: &str, len: usize| -> Result<Vec<f32>, LoadError> {
                let mut values = vec![0.0; len];
                weights.tensor(name)?.read_f32(&mut values);
                Ok(values)
            };
            let (a, b) = (read(a, rank * cols)?, read(b, rows * rank)?);
            parts.insert(weight, LowRank { rank, scale, a, b });
        }
        let hash = hash(&parts);
        Ok(Self { parts, hash })
    }

    /// Bytes of its matrices.
    pub fn bytes(&self) -> u64 {
        self.parts.values().map(|part| 4 * (part.a.len() + part.b.len()) as u64).sum()
    }
}

fn hash(parts: &BTreeMap<String, LowRank>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("mainstay adapter 1");
    for (name, part) in parts {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        hasher.update(&(part.rank as u64).to_le_bytes()).update(&part.scale.to_bits().to_le_bytes());
        for number in part.a.iter().chain(&part.b) {
            hasher.update(&number.to_bits().to_le_bytes());
        }
    }
    *hasher.finalize().as_bytes()
}

/// All weights of products inside of layers, with their rows and columns.
fn products(graph: &Graph) -> BTreeMap<String, (usize, usize)> {
    let mut found = BTreeMap::new();
    for layer in &graph.layers {
        for op in &graph.blocks[layer.block].ops {
            if let Op::Linear { weight, .. } = op {
                let parts = weight.parts.iter();
                found.extend(
                    parts.map(|(name, rows)| (format!("{}{name}", layer.prefix), (*rows, weight.cols))),
                );
            }
        }
    }
    found
}

/// The module that a tensor belongs to, and 0 for A, 1 for B. Older files name the adapter `default` too.
fn module(name: &str) -> Option<(&str, usize)> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    let (module, which) = rest.rsplit_once('.')?;
    match which {
        "lora_A" => Some((module, 0)),
        "lora_B" => Some((module, 1)),
        _ => None,
    }
}

/// What makes an adapter more than low-rank products, or other ones.
const OTHER_KINDS: [&str; 13] = [
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
];

/// Ranks and scales of all modules.
struct Scaling {
    rank: usize,
    alpha: f64,
    /// The scale is alpha / sqrt(rank) instead of alpha / rank.
    is_stabilized: bool,
    ranks: Vec<(String, usize)>,
    alphas: Vec<(String, f64)>,
}

impl Scaling {
    fn read(config: &Config) -> Result<Self, LoadError> {
        if config.text("peft_type")? != Some("LORA") {
            return Err(config.wrong("peft_type", "LORA"));
        }
        if !matches!(config.text("bias")?, None | Some("none")) {
            return Err(config.wrong("bias", "none (adapters of biases are not supported)"));
        }
        for key in OTHER_KINDS {
            let is_nothing =
                |value: &Value| *value == Value::Bool(false) || value.as_array().is_some_and(Vec::is_empty);
            if config.get(key).is_some_and(|value| !is_nothing(value)) {
                return Err(config.wrong(key, "nothing (only low-rank products are supported)"));
            }
        }
        let rank = config.required("r", 1..=RANK_MAX)?;
        let alpha =
            config.number("lora_alpha", 0.0..=1e6)?.ok_or_else(|| config.wrong("lora_alpha", "a number"))?;
        let is_stabilized = config.flag("use_rslora", false)?;
        let mut scaling = Self { rank, alpha, is_stabilized, ranks: Vec::new(), alphas: Vec::new() };
        if let Some(ranks) = config.object("rank_pattern")? {
            for (key, _) in ranks.entries() {
                scaling.ranks.push((plain(&ranks, key)?, ranks.required(key, 1..=RANK_MAX)?));
            }
        }
        if let Some(alphas) = config.object("alpha_pattern")? {
            for (key, _) in alphas.entries() {
                let alpha = alphas.number(key, 0.0..=1e6)?.ok_or_else(|| alphas.wrong(key, "a number"))?;
                scaling.alphas.push((plain(&alphas, key)?, alpha));
            }
        }
        Ok(scaling)
    }

    /// Rank and scale of a module.
    fn of(&self, module: &str) -> (usize, f32) {
        let fits = |key: &str| {
            module.strip_suffix(key).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let rank = self.ranks.iter().find(|(key, _)| fits(key)).map_or(self.rank, |(_, rank)| *rank);
        let alpha = self.alphas.iter().find(|(key, _)| fits(key)).map_or(self.alpha, |(_, alpha)| *alpha);
        let by = if self.is_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        (rank, (alpha / by) as f32)
    }
}

/// A pattern that is the name of a module, or the end of one. PEFT takes regular expressions too.
fn plain(patterns: &Config, key: &str) -> Result<String, LoadError> {
    let key_of = key.strip_prefix('^').unwrap_or(key);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match !key_of.is_empty() && key_of.chars().all(is_plain) {
        true => Ok(key_of.to_owned()),
        false => Err(patterns.wrong(key, "names of modules as keys, not expressions")),
    }
}
