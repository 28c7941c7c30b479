//! A configuration as GGUF's metadata, for what GGUF can say.

use std::path::Path;

use super::{Entries, attention};
use crate::LoadError;
use crate::config::Config;
use crate::gguf::config::ARCHITECTURES;
use crate::gguf::mix::{Mix, Shape};
use crate::gguf::names;
use crate::graph::{Graph, Op, PoolKind, Rope};

/// What of a model decides how its tensors are written.
pub(super) struct Described<'a> {
    pub(super) architecture: &'static str,
    pub(super) tied: bool,
    /// What the stored norms lack: Gemma multiplies by 1 + w.
    pub(super) norm_offset: f32,
    /// Divisors of frequencies, by the names of their tensors.
    pub(super) factors: Vec<(&'static str, Vec<f32>)>,
    pub(super) shape: Shape,
    config: &'a Config,
    graph: &'a Graph,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    prefix: &'static str,
}

impl<'a> Described<'a> {
    pub(super) fn new(config: &'a Config, graph: &'a Graph) -> Result<Self, LoadError> {
        let model_type = config.text("model_type")?.unwrap_or_default();
        let architecture = match model_type {
            "mistral" => Some("llama"),
            "deepseek_v3" => None,
            _ => ARCHITECTURES.iter().find(|(_, of)| *of == model_type).map(|(name, _)| *name),
        };
        let Some(architecture) = architecture else {
            return Err(config.wrong("model_type", "a family that is written as GGUF (docs/models.md)"));
        };
        let attend = attention(graph).ok_or_else(|| config.wrong("model_type", "a model with attention"))?;
        let names = graph.prologue.ops.iter().find_map(|op| match op {
            Op::Embed { weight, .. } => weight.parts.first().map(|(name, _)| name.as_str()),
            _ => None,
        });
        let tied = graph.epilogue.ops.iter().any(|op| match op {
            Op::Linear { weight, .. } => weight.parts.first().map(|(n, _)| n.as_str()) == names,
            _ => false,
        });
        let experts =
            config.count("num_experts", 0..=1 << 16)?.or(config.count("num_local_experts", 0..=1 << 16)?);
        let layers = graph.layers.len();
        let is_70b = architecture == "llama" && layers == 80 && attend.heads != attend.kv_heads;
        let mut described = Self {
            architecture,
            tied,
            norm_offset: if architecture.starts_with("gemma") { 1.0 } else { 0.0 },
            factors: Vec::new(),
            shape: Shape { layers, experts: experts.unwrap_or(1), tied, is_70b },
            config,
            graph,
            heads: attend.heads,
            kv_heads: attend.kv_heads,
            head_dim: attend.head_dim,
            prefix: if names.is_some_and(|n| n.starts_with("bert.")) { "bert." } else { "" },
        };
        described.check_scale(attend.scale)?;
        described.read_factors()?;
        Ok(described)
    }

    /// What the checkpoint calls a tensor.
    pub(super) fn stored_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Rows of a head, for tensors whose rows are written in another order.
    pub(super) fn head_rows(&self, name: &str, rows: usize) -> Option<usize> {
        let heads = match name.rsplit('.').nth(1)? {
            "attn_q" => self.heads,
            "attn_k" => self.kv_heads,
            _ => return None,
        };
        names::rotates_neighbours(self.architecture).then_some(rows / heads)
    }

    /// llama.cpp scales scores by the root of a head's width, but for the largest Gemmas.
    fn check_scale(&self, scale: f32) -> Result<(), LoadError> {
        let of_27b = match self.architecture {
            "gemma2" => self.graph.layers.len() == 46,
            "gemma3" => self.graph.layers.len() == 62,
            _ => false,
        };
        let width = if of_27b { self.graph.hidden / self.heads } else { self.head_dim };
        let expected = (width as f64).powf(-0.5) as f32;
        if (scale - expected).abs() <= expected * 1e-6 {
            return Ok(());
        }
        let key = "query_pre_attn_scalar";
        Err(self.config.wrong(key, &format!("{width}, since GGUF has no way to say another")))
    }

    fn ropes(&self) -> impl Iterator<Item = (&Rope, bool)> {
        self.graph.blocks.iter().flat_map(|block| {
            let windowed = block.ops.iter().any(|op| {
                matches!(op, Op::Attend(a) if matches!(a.mask, crate::graph::Mask::Causal { window: Some(_) }))
            });
            block.ops.iter().filter_map(move |op| match op {
                Op::Rope { rope, .. } => Some((rope, windowed)),
                _ => None,
            })
        })
    }

    /// `rope_parameters` (of layers that see everything) or `rope_scaling`.
    fn rope_parameters(&self) -> Result<Option<Config>, LoadError> {
        let parameters = self.config.object("rope_parameters")?;
        match parameters {
            Some(p) => Ok(Some(p.object("full_attention")?.unwrap_or(p))),
            None => self.config.object("rope_scaling"),
        }
    }

    fn rope_kind(&self) -> Result<String, LoadError> {
        let Some(parameters) = self.rope_parameters()? else { return Ok("default".to_owned()) };
        let kind = parameters.text("rope_type")?.or(parameters.text("type")?).unwrap_or("default");
        Ok(kind.to_owned())
    }

    fn theta(&self) -> Result<f64, LoadError> {
        let range = 1.0..=1e12;
        let inner =
            self.rope_parameters()?.map(|p| p.number("rope_theta", range.clone())).transpose()?.flatten();
        let default = if self.architecture == "gemma3" { 1e6 } else { 1e4 };
        Ok(inner.or(self.config.number("rope_theta", range)?).unwrap_or(default))
    }

    fn read_factors(&mut self) -> Result<(), LoadError> {
        let kind = self.rope_kind()?;
        let Some(parameters) = self.rope_parameters()? else { return Ok(()) };
        match kind.as_str() {
            "llama3" => {
                let theta = self.theta()?;
                let Some((rope, _)) = self.ropes().next() else { return Ok(()) };
                let table = rope.tables[0].iter().enumerate();
                let plain = |i: usize| theta.powf(-((2 * i) as f64) / rope.dim as f64);
                let factors =
                    table.map(|(i, f)| (plain(i) / f64::from(*f)) as f32).map(whole_if_near).collect();
                self.factors.push(("rope_freqs.weight", factors));
            }
            "longrope" | "su" => {
                for (key, name) in [
                    ("long_factor", "rope_factors_long.weight"),
                    ("short_factor", "rope_factors_short.weight"),
                ] {
                    let list = parameters.get(key).and_then(|v| v.as_array());
                    let factors: Option<Vec<f32>> =
                        list.and_then(|l| l.iter().map(|v| v.as_f64().map(|f| f as f32)).collect());
                    let factors = factors.ok_or_else(|| parameters.wrong(key, "a list of numbers"))?;
                    self.factors.push((name, factors));
                }
            }
            "default" | "linear" | "yarn" => {}
            _ => return Err(parameters.wrong("rope_type", "default, linear, llama3, longrope or yarn")),
        }
        Ok(())
    }

    /// Writes `general.*` and the architecture's own entries.
    pub(super) fn write(&self, entries: &mut Entries, dir: &Path, mix: Mix) -> Result<(), LoadError> {
        let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let name = full.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        entries.text("general.architecture", self.architecture);
        entries.text("general.name", &name);
        entries.whole("general.file_type", mix.file_type as usize);
        entries.whole("general.quantization_version", 2);
        let key = |key: &str| format!("{}.{key}", self.architecture);
        entries.whole(&key("block_count"), self.graph.layers.len());
        entries.whole(&key("context_length"), self.graph.context);
        entries.whole(&key("embedding_length"), self.graph.hidden);
        entries.whole(&key("feed_forward_length"), self.config.required("intermediate_size", 1..=1 << 24)?);
        entries.whole(&key("attention.head_count"), self.heads);
        entries.whole(&key("vocab_size"), self.graph.vocab);
        if self.architecture == "bert" {
            return self.bert(entries);
        }
        entries.whole(&key("attention.head_count_kv"), self.kv_heads);
        entries.whole(&key("attention.key_length"), self.head_dim);
        entries.whole(&key("attention.value_length"), self.head_dim);
        let eps = self.graph.epilogue.ops.iter().find_map(|op| match op {
            Op::RmsNorm { eps, .. } => Some(*eps),
            _ => None,
        });
        entries.number(&key("attention.layer_norm_rms_epsilon"), eps.unwrap_or(1e-6));
        self.rope(entries)?;
        self.window(entries)?;
        self.own(entries)
    }

    fn rope(&self, entries: &mut Entries) -> Result<(), LoadError> {
        let key = |key: &str| format!("{}.{key}", self.architecture);
        entries.number(&key("rope.freq_base"), self.theta()? as f32);
        let dim = self.ropes().next().map_or(self.head_dim, |(rope, _)| rope.dim);
        entries.whole(&key("rope.dimension_count"), dim);
        let Some(parameters) = self.rope_parameters()? else { return Ok(()) };
        let number = |name: &str| parameters.number(name, 0.0..=1e9);
        let original = parameters.count("original_max_position_embeddings", 1..=1 << 30)?;
        let original = original.or(self.config.count("original_max_position_embeddings", 1..=1 << 30)?);
        let kind = self.rope_kind()?;
        if kind == "linear" || kind == "yarn" {
            entries.text(&key("rope.scaling.type"), &kind);
            entries.number(&key("rope.scaling.factor"), number("factor")?.unwrap_or(1.0) as f32);
        }
        if kind == "yarn" || kind == "longrope" || kind == "su" {
            let original = original.unwrap_or(self.graph.context);
            entries.whole(&key("rope.scaling.original_context_length"), original);
        }
        if kind == "yarn" {
            for (from, to) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                if let Some(value) = number(from)? {
                    entries.number(&key(&format!("rope.scaling.{to}")), value as f32);
                }
            }
        }
        if kind == "longrope" || kind == "su" {
            let scale = self.ropes().next().map_or(1.0, |(rope, _)| rope.scale);
            entries.number(&key("rope.scaling.attn_factor"), scale);
        }
        Ok(())
    }

    fn window(&self, entries: &mut Entries) -> Result<(), LoadError> {
        let windows: Vec<Option<usize>> = self.graph.kv.iter().map(|kv| kv.window).collect();
        let Some(window) = windows.iter().flatten().next() else {
            if self.architecture == "phi3" {
                entries.whole("phi3.attention.sliding_window", 0);
            }
            return Ok(());
        };
        let key = |key: &str| format!("{}.attention.{key}", self.architecture);
        match self.architecture {
            "gemma2" | "gemma3" | "gpt-oss" => {
                let has: Vec<bool> = windows.iter().map(Option::is_some).collect();
                entries.flags(&key("sliding_window_pattern"), &has);
            }
            "llama" | "phi3" if windows.iter().all(Option::is_some) => {}
            _ => {
                let expected = "no window, since GGUF's files of this family have none";
                return Err(self.config.wrong("sliding_window", expected));
            }
        }
        if windows.iter().flatten().any(|other| other != window) {
            return Err(self.config.wrong("sliding_window", "one window for all layers"));
        }
        entries.whole(&key("sliding_window"), *window);
        Ok(())
    }

    fn own(&self, entries: &mut Entries) -> Result<(), LoadError> {
        let key = |key: &str| format!("{}.{key}", self.architecture);
        let count = |name: &str| self.config.required(name, 0..=1 << 24);
        match self.architecture {
            "qwen3moe" => {
                entries.whole(&key("expert_count"), count("num_experts")?);
                entries.whole(&key("expert_used_count"), count("num_experts_per_tok")?);
                entries.whole(&key("expert_feed_forward_length"), count("moe_intermediate_size")?);
                if !self.config.flag("norm_topk_prob", false)? {
                    return Err(self.config.wrong("norm_topk_prob", "true, as llama.cpp computes it"));
                }
            }
            "gpt-oss" => {
                entries.whole(&key("expert_count"), count("num_local_experts")?);
                entries.whole(&key("expert_used_count"), count("num_experts_per_tok")?);
                entries.whole(&key("expert_feed_forward_length"), count("intermediate_size")?);
            }
            "gemma2" | "gemma3" => {
                let caps = self.graph.blocks.iter().flat_map(|b| &b.ops).find_map(|op| match op {
                    Op::Attend(a) => a.softcap,
                    _ => None,
                });
                if let Some(cap) = caps {
                    entries.number(&key("attn_logit_softcapping"), cap);
                }
                let cap = self.graph.epilogue.ops.iter().find_map(|op| match op {
                    Op::Softcap { cap, .. } => Some(*cap),
                    _ => None,
                });
                if let Some(cap) = cap {
                    entries.number(&key("final_logit_softcapping"), cap);
                }
                if self.architecture == "gemma3" {
                    let local = self.local_theta()?;
                    entries.number(&key("rope.freq_base_swa"), local as f32);
                }
            }
            "smollm3" => {
                let rotates = |block: usize| {
                    self.graph.blocks[block].ops.iter().any(|op| matches!(op, Op::Rope { .. }))
                };
                let layers = self.graph.layers.iter().enumerate();
                let mut wrong = layers.filter(|(i, layer)| rotates(layer.block) == (i + 1).is_multiple_of(4));
                if let Some((at, _)) = wrong.next() {
                    let what = format!("every fourth layer without rotation, not as in layer {at}");
                    return Err(self.config.wrong("no_rope_layers", &what));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn local_theta(&self) -> Result<f64, LoadError> {
        let inner =
            self.config.object("rope_parameters")?.map(|p| p.object("sliding_attention")).transpose()?;
        let range = 1.0..=1e12;
        let inner = inner.flatten().map(|p| p.number("rope_theta", range.clone())).transpose()?.flatten();
        Ok(inner.or(self.config.number("rope_local_base_freq", range)?).unwrap_or(1e4))
    }

    fn bert(&self, entries: &mut Entries) -> Result<(), LoadError> {
        let eps = self.config.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-12);
        entries.number("bert.attention.layer_norm_epsilon", eps as f32);
        entries.flag("bert.attention.causal", false);
        Ok(())
    }

    /// How an encoder makes one row of a text; a decoder's is its last, which is not written.
    pub(super) fn write_pooling(&self, entries: &mut Entries, graph: &Graph) {
        let ops = graph.pooled.iter().flat_map(|pooled| &pooled.block.ops);
        let mut kind = ops.filter_map(|op| match op {
            Op::Pool { kind: PoolKind::Mean, .. } => Some(1),
            Op::Pool { kind: PoolKind::First, .. } => Some(2),
            _ => None,
        });
        if let Some(kind) = kind.next_back().filter(|_| self.architecture == "bert") {
            entries.whole("bert.pooling_type", kind);
        }
    }
}

/// Factors that are whole but for rounding are meant to be.
fn whole_if_near(factor: f32) -> f32 {
    if (factor - factor.round()).abs() <= factor * 1e-6 { factor.round() } else { factor }
}
