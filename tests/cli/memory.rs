//! What a server holds of a model's file while it loads it and after, as the system counts it.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::program::{Scratch, Server, run};

const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama");
const HIDDEN: usize = 1024;
const INNER: usize = 4096;
const LAYERS: usize = 4;
const VOCAB: usize = 512;

/// What allocators and the sizes of pages may add.
const SLACK_BYTES: u64 = 12 << 20;

/// A model of 134 MB in bf16: a small one's configuration with other sizes.
fn checkpoint(dir: &Path) -> u64 {
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let _ = fs::copy(Path::new(SMALL).join(name), dir.join(name));
    }
    let text = fs::read_to_string(Path::new(SMALL).join("config.json")).expect("a configuration");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("an object");
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", INNER),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 16),
        ("head_dim", HIDDEN / 16),
    ] {
        config[key] = value.into();
    }
    fs::write(dir.join("config.json"), config.to_string()).expect("a file");
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let count = shape.iter().product::<usize>();
        // bf16 numbers of magnitude 2^-6, with signs and digits of a xorshift
        let mut state = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(b.into())) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            0x3c80u16 | (state as u16 & 0x807f)
        };
        let bytes: Vec<u8> = (0..count).flat_map(|_| next().to_le_bytes()).collect();
        tensors.insert(name, (shape, bytes));
    };
    add("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]);
    add("lm_head.weight".into(), vec![VOCAB, HIDDEN]);
    add("model.norm.weight".into(), vec![HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("bytes of the shape"))
    });
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).expect("a file");
    fs::metadata(path).expect("a file").len()
}

/// The most that was resident, and what is now.
fn resident(words: &[&str]) -> [u64; 2] {
    let server = Server::start(&[words, &["--kv-memory=3M", "--context=128", "--threads=2"]].concat());
    let status = fs::read_to_string(format!("/proc/{}/status", server.id())).expect("a process");
    ["VmHWM:", "VmRSS:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("memory is counted");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    })
}

#[test]
fn a_model_is_in_memory_once() {
    let scratch = Scratch::new();
    let stored = checkpoint(&scratch.0);
    let dir = scratch.0.display().to_string();
    let file = |name: &str| -> (String, u64) {
        let path: PathBuf = scratch.0.join(format!("{name}.gguf"));
        let words = path.display().to_string();
        let made = run(&["quantize", &dir, &words, "--type", name]);
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        (words, fs::metadata(path).expect("a file").len())
    };
    let (q8, q8_bytes) = file("q8_0");
    let (_, q4_bytes) = file("q4_k_s");
    let [_, base] = resident(&[SMALL]);
    for (words, mapped, packed) in [
        (vec![&*dir], stored, stored),
        (vec![&*q8], q8_bytes, q8_bytes),
        (vec![&*dir, "--quant=q8"], stored, q8_bytes),
        (vec![&*dir, "--quant=q4"], stored, q4_bytes),
    ] {
        let [most, after] = resident(&words).map(|bytes| bytes.saturating_sub(base));
        let (most_max, after_max) = (mapped * 115 / 100 + packed, packed * 105 / 100 + SLACK_BYTES);
        assert!(after > packed * 9 / 10, "{words:?}: {after} bytes are less than {packed} of weights");
        assert!(after < after_max, "{words:?}: {after} bytes after loading, expected {after_max} at most");
        assert!(most < most_max, "{words:?}: {most} bytes while loading, expected {most_max} at most");
    }
}
