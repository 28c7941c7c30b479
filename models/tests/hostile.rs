//! Files made wrong on purpose: every one is refused by an error that names the culprit, or read; none panics, and
//! none makes the reader allocate what a number in the file says.
#![expect(unsafe_code, reason = "a counting allocator")]

#[path = "hostile/gguf.rs"]
mod gguf;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use mainstay_models::config::Config;
use mainstay_models::weights::DType;
use mainstay_models::{LoadError, Model, Weights, families};

/// The largest single allocation so far, bytes.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Watching;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Nothing here reads a file of more than 1 MiB. A list of bytes in a GGUF file takes 32 times as much.
fn assert_small_allocations() {
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < 16 << 20, "an allocation of {largest} bytes");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

fn file(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend((0..data_len).map(|i| i as u8));
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Weights, LoadError> {
    Weights::from_bytes(Path::new("w.safetensors"), bytes)
}

/// A file of three types, a scalar, an empty tensor and metadata.
fn valid() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "f32":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "f16":{"dtype":"F16","shape":[2],"data_offsets":[24,28]},
        "scalar":{"dtype":"BF16","shape":[],"data_offsets":[28,30]},
        "none":{"dtype":"F32","shape":[0,4],"data_offsets":[30,30]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[30,38]},
        "odd":{"dtype":"Q9","shape":[3],"data_offsets":[38,39]}}"#;
    file(header, 39)
}

/// Reads every tensor that can be read.
fn read_all(weights: &Weights) {
    for name in weights.names() {
        if let Ok(tensor) = weights.tensor(name) {
            let mut out = vec![0.0; tensor.len()];
            tensor.read_f32(&mut out);
            weights.expect(name, tensor.shape).unwrap();
        }
    }
}

#[test]
fn a_valid_file_reads() {
    let weights = open(valid()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["f16", "f32", "none", "scalar"]);
    let tensor = weights.tensor("f32").unwrap();
    assert_eq!((tensor.dtype, tensor.shape, tensor.stored_bytes()), (DType::F32, &[2, 3][..], 24));
    read_all(&weights);
    for (name, dtype) in [("ids", "I64"), ("odd", "Q9")] {
        let error = weights.tensor(name).unwrap_err().to_string();
        assert!(
            error.contains(&format!("tensor `{name}`: expected dtype F32, F16 or BF16, found {dtype}")),
            "{error}"
        );
    }
    let error = weights.tensor("gone").unwrap_err();
    assert!(matches!(error, LoadError::MissingTensor { name, .. } if name == "gone"));
    let error = weights.expect("f32", &[3, 2]).unwrap_err().to_string();
    assert_eq!(error, "w.safetensors: tensor `f32`: expected shape [3, 2], found [2, 3]");
}

#[test]
fn elements_convert_exactly_wherever_they_lie() {
    let half = half::f16::from_f32(-1.5).to_le_bytes();
    let brain = half::bf16::from_f32(0.75).to_le_bytes();
    // One byte first, so that nothing is aligned.
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},
        "c":{"dtype":"F16","shape":[1],"data_offsets":[9,11]},
        "d":{"dtype":"BF16","shape":[1],"data_offsets":[11,13]}}"#;
    let mut bytes = file(header, 1);
    bytes.extend(1e-40_f32.to_le_bytes());
    bytes.extend(f32::MIN.to_le_bytes());
    bytes.extend(half.into_iter().chain(brain));
    let weights = open(bytes).unwrap();
    let read = |name: &str, len: usize| {
        let mut out = vec![0.0; len];
        weights.tensor(name).unwrap().read_f32(&mut out);
        out
    };
    assert_eq!(read("b", 2), [1e-40, f32::MIN]);
    assert_eq!(read("c", 1), [-1.5]);
    assert_eq!(read("d", 1), [0.75]);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = valid();
    for len in 0..bytes.len() {
        let error = open(bytes[..len].to_vec()).unwrap_err().to_string();
        assert!(error.starts_with("w.safetensors: "), "{error}");
    }
    assert!(open([bytes, vec![0]].concat()).unwrap_err().to_string().contains("fill all 40 bytes"));
    assert_small_allocations();
}

#[test]
fn random_damage_never_panics() {
    let bytes = valid();
    let mut random = Random(1);
    let mut read = 0;
    for _ in 0..30_000 {
        let mut damaged = bytes.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(damaged.len());
            damaged[at] = match random.below(3) {
                0 => damaged[at] ^ (1 << random.below(8)),
                1 => b"0123456789[]{},:\"-"[random.below(18)],
                _ => random.below(256) as u8,
            };
        }
        if let Ok(weights) = open(damaged) {
            read_all(&weights);
            read += 1;
        }
    }
    assert!(read > 1000, "only {read} damaged files could be read: the test does not reach far");
    assert_small_allocations();
}

#[test]
fn headers_made_by_hand() {
    let one = |info: &str| format!(r#"{{"t":{info}}}"#);
    let deep = "[".repeat(100_000);
    let huge = r#"{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,4]}"#;
    let wide = r#"{"dtype":"U8","shape":[9223372036854775807,2],"data_offsets":[0,18446744073709551614]}"#;
    for (header, data_len, expected) in [
        ("", 0, "expected a JSON object of tensors"),
        ("[]", 0, "expected a JSON object of tensors"),
        ("{", 0, "expected a JSON object of tensors"),
        (&deep, 0, "expected a JSON object of tensors"),
        (&one(r#"{"dtype":"F32","shape":[1]}"#), 4, "tensor `t`: missing field `data_offsets`"),
        (&one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#), 4, "tensor `t`: invalid value"),
        (&one(r#"{"dtype":"F32","shape":[1e30],"data_offsets":[0,4]}"#), 4, "tensor `t`: invalid type"),
        (&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8, "expected offsets from 0"),
        (&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,8]}"#), 4, "to at most 4, found 0 to 8"),
        (&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#), 4, "found 4 to 0"),
        (
            &one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#),
            4,
            "expected 8 bytes for shape [2] of F32, found 4",
        ),
        (&one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#), 1, "for shape [3] of F4, found 1"),
        (
            &one(r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}"#),
            4,
            "at most 8 dimensions, found 9",
        ),
        (&one(huge), 4, "expected more than can be addressed bytes"),
        (&one(wide), 4, "to at most 4"),
        (
            r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            2,
            "tensor `t`: expected once, found twice",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
            3,
            "tensor `b`: expected offsets from 2",
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
            3,
            "tensor `b`: expected offsets from 1",
        ),
        ("{}", 1, "expected the tensors to fill all 1 bytes"),
    ] {
        let error = open(file(header, data_len)).unwrap_err().to_string();
        assert!(error.contains(expected), "{header:.80}: {error}");
    }
    for len in [0, 1, 3, 100_000_000, 100_000_001, u64::MAX / 2, u64::MAX - 7, u64::MAX] {
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        assert!(open(bytes).is_err(), "{len}");
    }
    let mut bytes = file("{\"a\":1}", 0);
    bytes[10] = 0xFF;
    assert!(open(bytes).unwrap_err().to_string().contains("UTF-8"));
    assert_small_allocations();
}

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mainstay-models-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// A copy of a fixture.
    fn of(family: &str, name: &str) -> Self {
        let scratch = Self::new(name);
        for entry in std::fs::read_dir(fixtures().join(family)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                scratch.write(path.file_name().unwrap().to_str().unwrap(), &std::fs::read(&path).unwrap());
            }
        }
        scratch
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    fn error(&self) -> String {
        Model::open(&self.0).err().expect("an error").to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn shards_equal_one_file() {
    let one = Weights::open_dir(&fixtures().join("qwen2")).unwrap();
    let many = Weights::open_dir(&fixtures().join("qwen2/sharded")).unwrap();
    assert!(one.names().eq(many.names()));
    for name in one.names() {
        let (a, b) = (one.tensor(name).unwrap(), many.tensor(name).unwrap());
        assert_eq!((a.dtype, a.shape, a.contiguous()), (b.dtype, b.shape, b.contiguous()), "{name}");
    }
}

#[test]
fn an_index_stays_in_its_directory_and_tells_the_truth() {
    let scratch = Scratch::new("index");
    let info = r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2]}"#;
    scratch.write("a.safetensors", &file(&format!(r#"{{"x":{info}}}"#), 2));
    scratch.write("b.safetensors", &file(&format!(r#"{{"y":{info}}}"#), 2));
    scratch.write("c.safetensors", &file(&format!(r#"{{"x":{info}}}"#), 2));
    for (map, expected) in [
        (r#"{"x":"a.safetensors","y":"b.safetensors"}"#, ""),
        (r#"{"x":"../a.safetensors"}"#, "file names ending in .safetensors, found `../a.safetensors`"),
        (r#"{"x":"/etc/passwd"}"#, "found `/etc/passwd`"),
        (r#"{"x":"sub/a.safetensors"}"#, "found `sub/a.safetensors`"),
        (r#"{"x":"..\\a.safetensors"}"#, "file names"),
        (r#"{"x":"..safetensors/"}"#, "file names"),
        (r#"{"x":""}"#, "file names"),
        (r#"{"x":"config.json"}"#, "file names"),
        (r#"{}"#, "expected shards in `weight_map`, found none"),
        (r#"{"x":1}"#, "expected an object with `weight_map`"),
        (r#"{"x":"gone.safetensors"}"#, "gone.safetensors: "),
        (r#"{"x":"b.safetensors"}"#, "tensor `x`: expected in"),
        (r#"{"x":"a.safetensors","y":"a.safetensors"}"#, "tensor `y`: expected in"),
        (r#"{"x":"a.safetensors","z":"c.safetensors"}"#, "tensor `x`: expected once"),
    ] {
        scratch.write("model.safetensors.index.json", format!(r#"{{"weight_map":{map}}}"#).as_bytes());
        match Weights::open_dir(&scratch.0) {
            Ok(weights) => assert!(expected.is_empty() && weights.names().eq(["x", "y"]), "{map}"),
            Err(e) => assert!(!expected.is_empty() && e.to_string().contains(expected), "{map}: {e}"),
        }
    }
}

#[test]
fn missing_and_wrong_files_of_a_checkpoint_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let scratch = Scratch::of("llama", &format!("missing-{name}"));
        std::fs::remove_file(scratch.0.join(name)).unwrap();
        assert!(scratch.error().contains(name), "{}", scratch.error());
        std::fs::create_dir(scratch.0.join(name)).unwrap();
        assert!(scratch.error().contains("expected a regular file"), "{}", scratch.error());
    }
    for (name, bytes, expected) in [
        ("config.json", &b"{"[..], "config.json: expected a JSON object"),
        (
            "generation_config.json",
            br#"{"eos_token_id":512}"#,
            "eos_token_id: expected token ids below 512, found 512",
        ),
        ("generation_config.json", br#"{"eos_token_id":[1,-1]}"#, "eos_token_id: expected token ids"),
        ("generation_config.json", br#"{"top_p":1.5}"#, "top_p: expected a number from 0 to 1, found 1.5"),
        ("generation_config.json", br#"{"do_sample":1}"#, "do_sample: expected true or false, found 1"),
        ("generation_config.json", b"[]", "generation_config.json: expected a JSON object"),
        ("tokenizer.json", b"{}", "tokenizer.json: expected a tokenizer"),
        (
            "tokenizer_config.json",
            br#"{"chat_template":"{% if"}"#,
            "tokenizer_config.json: expected a chat template",
        ),
        (
            "tokenizer_config.json",
            br#"{"chat_template":[{"name":"default"}]}"#,
            "chat_template: expected entries",
        ),
        ("chat_template.jinja", b"{{", "chat_template.jinja: expected a chat template"),
        ("chat_template.jinja", b"\xFF", "chat_template.jinja: expected UTF-8"),
        ("model.safetensors", b"", "model.safetensors: expected a header length"),
    ] {
        let scratch = Scratch::of("llama", "wrong");
        scratch.write(name, bytes);
        assert!(scratch.error().contains(expected), "{name}: {}", scratch.error());
    }
}

#[test]
fn weights_that_do_not_fit_the_configuration_are_named() {
    let config = std::fs::read_to_string(fixtures().join("llama/config.json")).unwrap();
    for (from, to, expected) in [
        (
            r#""intermediate_size": 128"#,
            r#""intermediate_size": 256"#,
            "`model.layers.0.mlp.gate_proj.weight`: expected shape [256, 64], found [128, 64]",
        ),
        (
            r#""num_hidden_layers": 2"#,
            r#""num_hidden_layers": 3"#,
            "`model.layers.2.input_layernorm.weight` is missing (expected shape [64])",
        ),
        (
            r#""attention_bias": false"#,
            r#""attention_bias": true"#,
            "`model.layers.0.self_attn.q_proj.bias` is missing",
        ),
        (
            r#""vocab_size": 512"#,
            r#""vocab_size": 600"#,
            "`model.embed_tokens.weight`: expected shape [600, 64]",
        ),
    ] {
        let scratch = Scratch::of("llama", "shapes");
        assert!(config.contains(from));
        scratch.write("config.json", config.replace(from, to).as_bytes());
        assert!(scratch.error().contains(expected), "{}", scratch.error());
    }
    // The untied output is not in a tied checkpoint.
    let scratch = Scratch::of("qwen2", "untied");
    let config = std::fs::read_to_string(fixtures().join("qwen2/config.json")).unwrap();
    scratch.write("config.json", config.replace(r#""tie_word_embeddings": true,"#, "").as_bytes());
    assert!(scratch.error().contains("`lm_head.weight` is missing"), "{}", scratch.error());
}

#[test]
fn damaged_configurations_never_panic() {
    let mut random = Random(2);
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        let text = std::fs::read(fixtures().join(family).join("config.json")).unwrap();
        for _ in 0..5_000 {
            let mut damaged = text.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(damaged.len());
                damaged[at] = b"0123456789[]{},:\"-eE. nulltrfas"[random.below(31)];
            }
            if let Ok(config) = Config::from_bytes(Path::new("config.json"), &damaged) {
                let _ = families::graph(&config);
            }
        }
    }
    assert_small_allocations();
}
