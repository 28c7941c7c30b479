//! A shape as a directory in the Hugging Face layout, for programs that read no made-up weights of ours.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use mainstay_models::config::Config;
use mainstay_models::weights::{DType, MemoryTensor};
use mainstay_models::{LoadError, families};
use serde_json::{Map, Value, json};

use super::{Shape, checkpoint, tokens};
use crate::mix::Mix;

/// Why no directory was written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// What has no files of this kind.
    #[error("{0}")]
    Shape(String),
    /// The shape does not load, which is a bug.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The disk.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Rows of these bytes are aligned in a safetensors file if its header is.
const ALIGNMENT: usize = 8;

impl Shape {
    /// Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors with the
    /// weights of [`Shape::build`] in a float type. `tell` hears how many bytes follow and how many were written.
    ///
    /// # Errors
    /// [`WriteError`]; what was written until then stays.
    pub fn write(self, dir: &Path, mix: Mix, tell: impl FnMut(u64, u64)) -> Result<(), WriteError> {
        let name = match mix.float() {
            Some(DType::F32) => "float32",
            Some(DType::F16) => "float16",
            Some(_) => "bfloat16",
            None => {
                let what = format!("expected one of f32, f16 and bf16, found {}", mix.name());
                return Err(WriteError::Shape(what));
            }
        };
        if class(self.graph(None)?.family).is_none() {
            return Err(WriteError::Shape(format!(
                "{self}: expected a shape of the families llama and qwen3"
            )));
        }
        let mut config: Value = serde_json::from_str(self.config).map_err(io::Error::from)?;
        config["torch_dtype"] = json!(name);
        directory(config, dir, mix, tell)
    }
}

/// What transformers calls a family. Those of others have tensors in other places than the graph names them by, such
/// as stacks of experts.
fn class(family: &str) -> Option<&'static str> {
    match family {
        "llama" => Some("LlamaForCausalLM"),
        "qwen3" => Some("Qwen3ForCausalLM"),
        _ => None,
    }
}

fn directory(mut config: Value, dir: &Path, mix: Mix, tell: impl FnMut(u64, u64)) -> Result<(), WriteError> {
    let graph = families::graph(&Config::from_bytes(dir, config.to_string().as_bytes())?)?;
    fs::create_dir_all(dir)?;
    config["architectures"] = json!(class(graph.family).map_or_else(Vec::new, |class| vec![class]));
    config["eos_token_id"] = json!(tokens::END);
    config["bos_token_id"] = json!(tokens::END);
    let put = |file: &str, value: &Value| fs::write(dir.join(file), format!("{value:#}\n"));
    put("config.json", &config)?;
    put("generation_config.json", &json!({"eos_token_id": tokens::END, "do_sample": false}))?;
    put("tokenizer_config.json", &tokens::config(graph.context))?;
    fs::write(dir.join("tokenizer.json"), tokens::tokenizer(graph.vocab).to_string())?;
    let (made, dtype) = (checkpoint(&graph, mix), mix.float().unwrap_or(DType::BF16));
    weights(&dir.join("model.safetensors"), dtype, &graph.tensors(), made, tell)?;
    Ok(())
}

/// <https://github.com/huggingface/safetensors#format>
fn weights(
    path: &Path,
    dtype: DType,
    names: &[(String, Vec<usize>)],
    tensors: impl Iterator<Item = MemoryTensor>,
    mut tell: impl FnMut(u64, u64),
) -> io::Result<()> {
    let kind = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        _ => "BF16",
    };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let (mut at, element) = (0, dtype.element_bytes().unwrap_or_default());
    for (name, shape) in names {
        let end = at + shape.iter().product::<usize>() * element;
        header.insert(name.clone(), json!({"dtype": kind, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = Value::Object(header).to_string();
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(ALIGNMENT) - header.len()));
    let aside = path.with_extension("new");
    let mut out = BufWriter::new(File::create(&aside)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for tensor in tensors {
        out.write_all(&tensor.bytes)?;
        tell(at as u64, tensor.bytes.len() as u64);
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?;
    fs::rename(aside, path)
}

#[cfg(test)]
mod tests {
    use mainstay_models::Model;
    use mainstay_models::tokenizer::{AddSpecial, ShowSpecial};

    use super::*;

    #[test]
    fn a_written_shape_is_a_checkpoint_with_the_same_weights() {
        let dir = std::env::temp_dir().join(format!("mainstay-shape-{}", std::process::id()));
        let config = json!({
            "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu",
            "tie_word_embeddings": true, "attention_bias": false
        });
        let (mut all, mut told) = (0, 0);
        directory(config, &dir, bf16(), |total, bytes| (all, told) = (total, told + bytes)).unwrap();
        let opened = Model::open(&dir).unwrap();
        for made in checkpoint(&opened.graph, bf16()) {
            let view = opened.weights.tensor(&made.name).unwrap();
            assert_eq!(view.contiguous(), Some(&made.bytes[..]), "{}", made.name);
        }
        assert_eq!((told, told), (all, opened.graph.weight_bytes(&opened.weights)));
        let text = "The cat, \u{fc}nder 7 trees.\n";
        let tokens = opened.tokenizer.encode(text, AddSpecial::No).unwrap();
        assert_eq!((tokens.len(), opened.tokenizer.decode(&tokens, ShowSpecial::No)), (25, text.to_owned()));
        assert_eq!(opened.tokenizer.decode(&[299], ShowSpecial::No), " 12b");
        assert_eq!(opened.generation.eos, [256]);
        fs::remove_dir_all(&dir).unwrap();
    }

    fn bf16() -> Mix {
        "bf16".parse().unwrap()
    }

    #[test]
    fn experts_and_blocks_are_refused() {
        let dir = std::env::temp_dir().join("mainstay-shape-refused");
        let refused = |shape: &str, mix: &str| {
            let shape: Shape = shape.parse().unwrap();
            shape.write(&dir, mix.parse().unwrap(), |_, _| ()).unwrap_err().to_string()
        };
        let told = [refused("gpt-oss-20b", "bf16"), refused("qwen3-0.6b", "q8_0")];
        assert!(told[0].contains("llama and qwen3") && told[1].contains("found q8_0"), "{told:?}");
        assert!(!dir.exists());
    }
}
