//! Which format each tensor of a file gets, by the names that llama.cpp gives such mixes.

use crate::weights::DType;

/// A rule for the formats of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// What it is called, such as `q4_k_m`.
    pub name: &'static str,
    /// What most matrices get.
    base: DType,
    /// Whether products that suffer most get more bits, and how many of them.
    more: More,
    /// `general.file_type`
    pub(super) file_type: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum More {
    None,
    /// The first layers.
    Small,
    /// The first and last eighth, and every third between.
    Medium,
}

const fn mix(name: &'static str, base: DType, more: More, file_type: u32) -> Mix {
    Mix { name, base, more, file_type }
}

/// Every mix that is written.
pub const MIXES: [Mix; 13] = [
    mix("f32", DType::F32, More::None, 0),
    mix("f16", DType::F16, More::None, 1),
    mix("bf16", DType::BF16, More::None, 32),
    mix("q8_0", DType::Q8_0, More::None, 7),
    mix("q4_0", DType::Q4_0, More::None, 2),
    mix("q4_1", DType::Q4_1, More::None, 3),
    mix("q5_0", DType::Q5_0, More::None, 8),
    mix("q5_1", DType::Q5_1, More::None, 9),
    mix("q4_k_s", DType::Q4K, More::Small, 14),
    mix("q4_k_m", DType::Q4K, More::Medium, 15),
    mix("q5_k_s", DType::Q5K, More::None, 16),
    mix("q5_k_m", DType::Q5K, More::Medium, 17),
    mix("q6_k", DType::Q6K, More::None, 18),
];

/// A tensor as a rule sees it.
pub(super) struct Tensor<'a> {
    /// As GGUF calls it.
    pub(super) name: &'a str,
    pub(super) rank: usize,
    pub(super) cols: usize,
    /// Its type before.
    pub(super) from: DType,
}

/// A model as a rule sees it.
pub(super) struct Shape {
    pub(super) layers: usize,
    pub(super) experts: usize,
    /// Whether the embedding is the vocabulary product too.
    pub(super) tied: bool,
    /// 80 layers of Llama with grouped queries.
    pub(super) is_70b: bool,
}

impl Mix {
    /// The mix of a name, whatever its case.
    pub fn named(name: &str) -> Option<Self> {
        MIXES.into_iter().find(|mix| mix.name.eq_ignore_ascii_case(name))
    }

    /// The format of one tensor.
    pub(super) fn dtype(&self, tensor: &Tensor<'_>, shape: &Shape) -> DType {
        if !is_product(tensor) {
            return DType::F32;
        }
        // four bits already, and of a kind that search cannot better
        if tensor.from == DType::Mxfp4 && self.base.format().is_some() {
            return DType::Mxfp4;
        }
        let wanted = if self.base.format().is_some() { self.wanted(tensor, shape) } else { self.base };
        fitting(wanted, tensor.cols)
    }

    fn wanted(&self, tensor: &Tensor<'_>, shape: &Shape) -> DType {
        let (base, name) = (self.base, tensor.name);
        let is_output = name == "output.weight" || (shape.tied && name == "token_embd.weight");
        if is_output {
            let block_len = base.format().map_or(1, |f| f.block_len);
            let fits = tensor.cols.is_multiple_of(block_len);
            return if base == DType::Q8_0 || !fits { DType::Q8_0 } else { DType::Q6K };
        }
        let layer = name.strip_prefix("blk.").and_then(|n| n.split_once('.'));
        let Some((Ok(layer), part)) = layer.map(|(layer, part)| (layer.parse::<usize>(), part)) else {
            return base;
        };
        let layers = shape.layers;
        let medium = self.more == More::Medium
            && (layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2);
        let k = matches!(base, DType::Q4K | DType::Q5K);
        match part.trim_end_matches(".weight") {
            "attn_v" | "attn_v_b" | "attn_kv_b" if shape.experts == 8 => DType::Q8_0,
            "attn_v" | "attn_v_b" | "attn_kv_b" => match self.more {
                _ if medium => DType::Q6K,
                More::Small if layer < 4 => DType::Q5K,
                _ if shape.is_70b && base == DType::Q4K => DType::Q5K,
                _ => base,
            },
            "attn_k" if shape.experts == 8 => DType::Q8_0,
            "attn_output" if shape.experts == 8 && base == DType::Q4K => DType::Q5K,
            "attn_qkv" if self.more == More::Medium => {
                if base == DType::Q4K {
                    DType::Q5K
                } else {
                    DType::Q6K
                }
            }
            down if k && down.starts_with("ffn_down") => match self.more {
                _ if medium => DType::Q6K,
                More::Small if layer < layers / 8 => DType::Q5K,
                _ => base,
            },
            _ => base,
        }
    }
}

/// Whether a tensor takes part in products, so that its format matters; the others are small and stay whole.
fn is_product(tensor: &Tensor<'_>) -> bool {
    const WHOLE: [&str; 3] = ["ffn_gate_inp.weight", "position_embd.weight", "token_types.weight"];
    tensor.rank >= 2
        && tensor.name.ends_with("weight")
        && !tensor.name.contains("_norm.weight")
        && !WHOLE.iter().any(|name| tensor.name.ends_with(name))
}

/// A format whose blocks fill rows of this length.
fn fitting(wanted: DType, cols: usize) -> DType {
    if wanted.row_bytes(cols).is_some() {
        return wanted;
    }
    let smaller = match wanted {
        DType::Q4K => DType::Q5_0,
        DType::Q5K => DType::Q5_1,
        DType::Q6K => DType::Q8_0,
        other => other,
    };
    if smaller.row_bytes(cols).is_some() { smaller } else { DType::F16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dtype(mix: &str, name: &str, cols: usize, shape: &Shape) -> DType {
        let tensor = Tensor { name, rank: 2, cols, from: DType::BF16 };
        Mix::named(mix).unwrap().dtype(&tensor, shape)
    }

    const TIED: Shape = Shape { layers: 16, experts: 1, tied: true, is_70b: false };

    #[test]
    fn a_medium_mix_gives_half_of_what_suffers_more_bits() {
        let of =
            |layer: usize, part: &str| dtype("q4_k_m", &format!("blk.{layer}.{part}.weight"), 2048, &TIED);
        let more: Vec<usize> = (0..16).filter(|&i| of(i, "attn_v") == DType::Q6K).collect();
        assert_eq!(more, [0, 1, 4, 7, 10, 13, 14, 15]);
        assert!((0..16).all(|i| of(i, "ffn_down") == of(i, "attn_v") && of(i, "attn_q") == DType::Q4K));
        assert_eq!(of(3, "attn_qkv"), DType::Q5K);
        assert_eq!(dtype("q4_k_s", "blk.3.attn_v.weight", 2048, &TIED), DType::Q5K);
        assert_eq!(dtype("q4_k_s", "blk.2.ffn_down.weight", 2048, &TIED), DType::Q4K);
    }

    #[test]
    fn what_is_read_whole_and_what_does_not_fit_is_handled() {
        assert_eq!(dtype("q4_k_m", "token_embd.weight", 2048, &TIED), DType::Q6K);
        let untied = Shape { tied: false, ..TIED };
        assert_eq!(dtype("q4_k_m", "token_embd.weight", 2048, &untied), DType::Q4K);
        assert_eq!(dtype("q4_k_m", "output.weight", 64, &untied), DType::Q8_0);
        assert_eq!(dtype("q8_0", "output.weight", 2048, &untied), DType::Q8_0);
        assert_eq!(dtype("q4_k_m", "blk.2.attn_q.weight", 64, &TIED), DType::Q5_0);
        assert_eq!(dtype("q4_k_m", "blk.2.attn_q.weight", 100, &TIED), DType::F16);
        assert_eq!(dtype("q8_0", "blk.2.ffn_gate_inp.weight", 64, &TIED), DType::F32);
        assert_eq!(dtype("f16", "blk.2.attn_norm.weight", 64, &TIED), DType::F32);
    }
}
