//! Which type each tensor of made-up weights has.

use mainstay_models::weights::DType;

/// The types of a checkpoint's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// All of one float type.
    Float(DType),
    /// Blocks of 8 bits.
    Q8_0,
    /// Blocks of 4 bits, 6 for the vocabulary.
    Q4_0,
    /// Blocks of 4 bits under nested scales, 6 bits for the vocabulary and, in some layers, for values and the way
    /// down: as llama.cpp mixes them.
    Q4KM,
    /// Experts in blocks of 4-bit floats, everything else in bf16, as gpt-oss is published.
    Mxfp4,
}

impl Mix {
    /// The type of a tensor of a model of so many layers.
    pub(crate) fn of(self, name: &str, shape: &[usize], layers: usize) -> DType {
        let vocabulary = name.contains("embed_tokens") || name.contains("lm_head");
        match self {
            Mix::Float(dtype) => dtype,
            Mix::Mxfp4 if shape.len() == 2 && name.contains(".experts.") => DType::Mxfp4,
            Mix::Mxfp4 => DType::BF16,
            // rows that no block of 256 fills
            Mix::Q4KM if shape.len() == 2 && !shape[1].is_multiple_of(256) => DType::Q8_0,
            _ if shape.len() < 2 => DType::F32,
            Mix::Q8_0 => DType::Q8_0,
            Mix::Q4_0 if vocabulary && !shape[1].is_multiple_of(256) => DType::Q8_0,
            Mix::Q4_0 | Mix::Q4KM if vocabulary => DType::Q6K,
            Mix::Q4_0 => DType::Q4_0,
            Mix::Q4KM => {
                let fine = name.contains("v_proj") || name.contains("down_proj");
                let layer = name.split('.').find_map(|part| part.parse().ok());
                if fine && layer.is_some_and(|layer| is_fine(layer, layers)) {
                    DType::Q6K
                } else {
                    DType::Q4K
                }
            }
        }
    }
}

/// Whether a layer is of the first or last eighth, or every third between.
fn is_fine(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_layers_have_finer_values() {
        let fine = |mix: Mix| {
            let name = |i| format!("model.layers.{i}.mlp.down_proj.weight");
            (0..28).filter(|i| mix.of(&name(*i), &[64, 256], 28) == DType::Q6K).count()
        };
        assert_eq!((fine(Mix::Q4KM), fine(Mix::Q8_0)), (14, 0));
        assert_eq!(Mix::Q4KM.of("model.layers.0.mlp.up_proj.weight", &[64, 256], 28), DType::Q4K);
        assert_eq!(Mix::Q4KM.of("model.embed_tokens.weight", &[64, 256], 28), DType::Q6K);
        assert_eq!(Mix::Q4KM.of("model.norm.weight", &[256], 28), DType::F32);
        assert_eq!(Mix::Q4KM.of("model.layers.0.mlp.up_proj.weight", &[64, 2880], 28), DType::Q8_0);
        assert_eq!(
            Mix::Mxfp4.of("model.layers.0.mlp.experts.3.up_proj.weight", &[64, 256], 28),
            DType::Mxfp4
        );
        assert_eq!(Mix::Mxfp4.of("model.layers.0.mlp.experts.3.up_proj.bias", &[64], 28), DType::BF16);
    }
}
