//! Which type each tensor of made-up weights has.

use std::fmt;
use std::str::FromStr;

use mainstay_models::weights::DType;

/// The types of a checkpoint's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    name: &'static str,
    /// What most matrices are.
    base: DType,
    /// What everything but experts is, where that is something else.
    rest: Option<DType>,
    /// What values and the way down are in the first and last eighth of the layers, and in every third between: as
    /// llama.cpp mixes them.
    fine: Option<DType>,
}

const fn mix(name: &'static str, base: DType) -> Mix {
    Mix { name, base, rest: None, fine: None }
}

/// All mixes.
pub const MIXES: [Mix; 18] = [
    mix("f32", DType::F32),
    mix("f16", DType::F16),
    mix("bf16", DType::BF16),
    mix("q8_0", DType::Q8_0),
    mix("q4_0", DType::Q4_0),
    mix("q4_1", DType::Q4_1),
    mix("q5_0", DType::Q5_0),
    mix("q5_1", DType::Q5_1),
    mix("q2_k", DType::Q2K),
    mix("q3_k", DType::Q3K),
    mix("q4_k", DType::Q4K),
    mix("q5_k", DType::Q5K),
    mix("q6_k", DType::Q6K),
    mix("iq4_nl", DType::Iq4Nl),
    mix("mxfp4", DType::Mxfp4),
    Mix { fine: Some(DType::Q6K), ..mix("q4_k_m", DType::Q4K) },
    Mix { fine: Some(DType::Q6K), ..mix("q5_k_m", DType::Q5K) },
    // as gpt-oss is published
    Mix { rest: Some(DType::BF16), ..mix("mxfp4_moe", DType::Mxfp4) },
];

impl Mix {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The type of all tensors, where that is a float.
    pub fn float(self) -> Option<DType> {
        self.base.format().is_none().then_some(self.base)
    }

    /// The type of a tensor of a model of so many layers. Where the vocabulary would be of less than 6 bits it is of 6,
    /// and rows that blocks of 256 do not fill have blocks of 32.
    pub(crate) fn of(self, name: &str, shape: &[usize], layers: usize) -> DType {
        if let Some(rest) = self.rest.filter(|_| !name.contains(".experts.")) {
            return rest;
        }
        if let Some(dtype) = self.float() {
            return dtype;
        }
        let [_, cols] = *shape else { return DType::F32 };
        let vocabulary = name.contains("embed_tokens") || name.contains("lm_head");
        let fine = || name.contains("v_proj") || name.contains("kv_b_proj") || name.contains("down_proj");
        let layer = || name.split('.').find_map(|part| part.parse().ok());
        let wanted = match self.fine {
            _ if vocabulary && self.base != DType::Q8_0 => DType::Q6K,
            Some(dtype) if fine() && layer().is_some_and(|layer| is_fine(layer, layers)) => dtype,
            _ => self.base,
        };
        let filled = |dtype: &DType| dtype.row_bytes(cols).is_some();
        let smaller = match wanted {
            DType::Q2K | DType::Q3K => DType::Iq4Nl,
            DType::Q4K => DType::Q5_0,
            DType::Q5K => DType::Q5_1,
            _ => DType::Q8_0,
        };
        [wanted, smaller].into_iter().find(filled).unwrap_or(DType::F16)
    }
}

/// Whether a layer is of the first or last eighth, or every third between.
fn is_fine(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// A name that no mix has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownMix(String);

impl fmt::Display for UnknownMix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected one of {}, found `{}`", MIXES.map(Mix::name).join(", "), self.0)
    }
}

impl std::error::Error for UnknownMix {}

impl FromStr for Mix {
    type Err = UnknownMix;

    fn from_str(text: &str) -> Result<Self, UnknownMix> {
        let found = MIXES.into_iter().find(|mix| mix.name.eq_ignore_ascii_case(text));
        found.ok_or_else(|| UnknownMix(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(mix: &str, name: &str, shape: &[usize]) -> DType {
        mix.parse::<Mix>().unwrap().of(name, shape, 28)
    }

    #[test]
    fn half_of_the_layers_have_finer_values() {
        let fine = |mix: &str| {
            let name = |i| format!("model.layers.{i}.mlp.down_proj.weight");
            (0..28).filter(|i| of(mix, &name(*i), &[64, 256]) == DType::Q6K).count()
        };
        assert_eq!((fine("q4_k_m"), fine("q8_0"), fine("q4_k")), (14, 0, 0));
        assert_eq!(of("Q4_K_M", "model.layers.0.mlp.up_proj.weight", &[64, 256]), DType::Q4K);
    }

    #[test]
    fn vectors_the_vocabulary_and_odd_rows_have_their_own() {
        assert_eq!(of("q4_k_m", "model.embed_tokens.weight", &[64, 256]), DType::Q6K);
        assert_eq!(of("q8_0", "lm_head.weight", &[64, 256]), DType::Q8_0);
        assert_eq!(of("q4_k_m", "model.norm.weight", &[256]), DType::F32);
        assert_eq!(of("bf16", "model.norm.weight", &[256]), DType::BF16);
        assert_eq!(of("q4_k", "model.layers.0.mlp.up_proj.weight", &[64, 2880]), DType::Q5_0);
        assert_eq!(of("q4_k", "model.layers.0.mlp.up_proj.weight", &[64, 100]), DType::F16);
        assert_eq!(of("mxfp4_moe", "model.layers.0.mlp.experts.3.up_proj.weight", &[64, 256]), DType::Mxfp4);
        assert_eq!(of("mxfp4_moe", "model.layers.0.self_attn.q_proj.weight", &[64, 256]), DType::BF16);
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_there_are() {
        let message = "q9".parse::<Mix>().unwrap_err().to_string();
        assert!(message.contains("q4_k_m") && message.contains("`q9`"), "{message}");
    }
}
