//! GGUF files hold what their checkpoints hold: written here, or by llama.cpp's own converter (tests/fixtures/formats).

use std::path::{Path, PathBuf};

use mainstay_models::Model;
use mainstay_models::gguf::{Mix, Plan};
use mainstay_models::tokenizer::AddSpecial;
use mainstay_models::weights::DType;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// A checkpoint of the family, here or beside this repository; `None` where it is not at hand.
fn checkpoint_dir(family: &str) -> Option<PathBuf> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference");
    [fixtures(), shared].into_iter().map(|dir| dir.join(family)).find(|dir| dir.join("config.json").exists())
}

/// The file as `mainstay quantize` writes it.
fn written(family: &str, mix: &str) -> Vec<u8> {
    let plan = Plan::new(&checkpoint_dir(family).unwrap(), Mix::named(mix).unwrap());
    let plan = plan.unwrap_or_else(|e| panic!("{family}: {e}"));
    let mut file = plan.header().to_vec();
    for tensor in plan.tensors() {
        let mut bytes = vec![0; tensor.row_bytes(tensor.rows)];
        plan.encode(tensor, 0..tensor.rows, &mut bytes).unwrap();
        bytes.resize(tensor.padded_bytes(), 0);
        file.extend(bytes);
    }
    file
}

/// Every tensor of the checkpoint has the same numbers in the other, but for what is added to Gemma's norms.
fn same_numbers(family: &str, checkpoint: &Model, other: &Model, offset: f32) {
    let mut compared = 0;
    for name in checkpoint.weights.names().filter(|n| !n.contains("pooler") && *n != "lm_head.weight") {
        let a = checkpoint.weights.tensor(name).unwrap();
        let b = other.weights.tensor(name).unwrap_or_else(|e| panic!("{family}: {e}"));
        assert_eq!(a.shape, b.shape, "{family} {name}");
        let (mut left, mut right) = (vec![0.0; a.len()], vec![0.0; b.len()]);
        a.read_f32(&mut left);
        b.read_f32(&mut right);
        if name.ends_with("norm.weight") {
            left.iter_mut().for_each(|x| *x += offset);
        }
        assert!(left == right, "{family} {name}");
        compared += 1;
    }
    assert!(compared > 10, "{family}: {compared} tensors");
}

/// The graph, without what is said in other words: the offset of Gemma's norms, and frequencies to their last bit.
fn program(model: &Model) -> String {
    let mut graph = model.graph.clone();
    graph.family = "";
    let text = format!("{graph:?}").replace("offset: 1.0", "offset: 0.0");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, tables)) = rest.split_once("tables: [[") {
        out.push_str(before);
        rest = tables.split_once("]]").map_or("", |(_, after)| after);
    }
    out + rest
}

fn same_program(family: &str, checkpoint: &Model, other: &Model) {
    let (a, b) = (program(checkpoint), program(other));
    let at = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let near = |text: &str| text[at.saturating_sub(60)..(at + 60).min(text.len())].to_owned();
    assert!(a == b, "{family}: expected `{}`, found `{}`", near(&a), near(&b));
}

/// Texts with their tokens by the checkpoint's tokenizer.
fn same_tokens(family: &str, checkpoint: &Model, other: &Model) {
    let expected = std::fs::read(checkpoint_dir(family).unwrap().join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
    let texts: Vec<String> = expected["tokenizations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["text"].as_str().unwrap_or_default().to_owned())
        .collect();
    let mut different = Vec::new();
    for text in &texts {
        for special in [AddSpecial::Yes, AddSpecial::No] {
            let (a, b) = (checkpoint.tokenizer.encode(text, special), other.tokenizer.encode(text, special));
            if a != b {
                different.push(format!("{text:?} {special:?}: {a:?} {b:?}"));
            }
        }
    }
    assert!(texts.len() > 20, "{family}: {} texts", texts.len());
    // Qwen's tokenizers compose characters first, which GGUF has no word for.
    let composed = family.starts_with("qwen");
    let allowed = if composed { texts.len() / 8 } else { 0 };
    assert!(different.len() <= allowed, "{family}:\n{}", different.join("\n"));
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn what_is_written_reads_as_the_checkpoint() {
    let families = [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "phi3",
        "phi3_longrope",
        "olmo2",
        "smollm3",
        "qwen3_moe",
        "gpt_oss",
        "gpt_oss_mxfp4",
    ];
    for family in families {
        let Some(dir) = checkpoint_dir(family) else {
            eprintln!("skipped: {family} is not at hand");
            continue;
        };
        let checkpoint = Model::open(&dir).unwrap();
        let path = PathBuf::from(format!("{family}.gguf"));
        let other = Model::from_gguf_bytes(&path, written(family, "f32")).unwrap_or_else(|e| panic!("{e}"));
        same_program(family, &checkpoint, &other);
        same_numbers(family, &checkpoint, &other, if family.starts_with("gemma") { 1.0 } else { 0.0 });
        same_tokens(family, &checkpoint, &other);
        assert_eq!(checkpoint.template.is_some(), other.template.is_some(), "{family}");
        let ends = |model: &Model| {
            let mut ends = model.generation.eos.clone();
            ends.sort_unstable();
            ends
        };
        let (own, read) = (ends(&checkpoint), ends(&other));
        assert!(own.iter().all(|id| read.contains(id)), "{family}: {own:?} {read:?}");
    }
}

#[test]
fn an_encoder_is_written_with_its_pooling() {
    let checkpoint = Model::open(&fixtures().join("bert")).unwrap();
    let other = Model::from_gguf_bytes(Path::new("bert.gguf"), written("bert", "f32")).unwrap();
    same_numbers("bert", &checkpoint, &other, 0.0);
    assert_eq!(checkpoint.graph.pooled, other.graph.pooled);
    for text in ["Hello, World! 123", "naïve Ångström", "unaffable 你好", ""] {
        for special in [AddSpecial::Yes, AddSpecial::No] {
            let ids = |model: &Model| model.tokenizer.encode(text, special).unwrap();
            assert_eq!(ids(&checkpoint), ids(&other), "{text:?}");
        }
    }
}

#[test]
fn rotation_is_the_same_to_a_rounding() {
    use mainstay_models::graph::Op;
    for family in ["llama", "gemma3_text", "phi3_longrope"] {
        let tables = |model: &Model| -> Vec<f32> {
            let ops = model.graph.blocks.iter().flat_map(|b| b.ops.clone());
            let tables = ops.filter_map(|op| match op {
                Op::Rope { rope, .. } => Some(rope.tables),
                _ => None,
            });
            tables.flatten().flat_map(|t| t.to_vec()).collect()
        };
        let checkpoint = Model::open(&fixtures().join(family)).unwrap();
        let other = Model::from_gguf_bytes(Path::new("x.gguf"), written(family, "f32")).unwrap();
        let (a, b) = (tables(&checkpoint), tables(&other));
        assert!(!a.is_empty() && a.len() == b.len());
        let far = a.iter().zip(&b).find(|(a, b)| (*a - *b).abs() > *a * 3e-7);
        assert!(far.is_none(), "{family}: {far:?}");
    }
}

#[test]
fn formats_are_kept_and_near_the_checkpoint() {
    let checkpoint = Model::open(&fixtures().join("llama")).unwrap();
    for (mix, dtype, bound) in [
        ("bf16", DType::BF16, 0.0),
        ("f16", DType::F16, 1e-3),
        ("q8_0", DType::Q8_0, 0.01),
        ("q4_0", DType::Q4_0, 0.11),
        // 64 columns are no whole block of 256
        ("q4_k_m", DType::Q5_0, 0.06),
    ] {
        let other = Model::from_gguf_bytes(Path::new("x.gguf"), written("llama", mix)).unwrap();
        for part in ["q_proj", "k_proj", "o_proj"] {
            let name = format!("model.layers.1.self_attn.{part}.weight");
            let (a, b) = (checkpoint.weights.tensor(&name).unwrap(), other.weights.tensor(&name).unwrap());
            assert_eq!(b.dtype, dtype, "{mix}");
            let (mut left, mut right) = (vec![0.0; a.len()], vec![0.0; b.len()]);
            a.read_f32(&mut left);
            b.read_f32(&mut right);
            let error: f32 = left.iter().zip(&right).map(|(a, b)| (a - b) * (a - b)).sum();
            let ratio = (error / left.iter().map(|a| a * a).sum::<f32>()).sqrt();
            assert!(ratio <= bound, "{mix} {name}: {ratio}");
        }
    }
}

/// Two of them are kept; `MAINSTAY_CONVERTED` names a directory with more.
#[test]
fn files_of_llama_cpps_converter_read_as_the_checkpoint() {
    let beside = std::env::var_os("MAINSTAY_CONVERTED").map(PathBuf::from);
    let more = ["qwen2", "olmo2", "smollm3", "qwen3_moe", "gpt_oss_mxfp4", "deepseek_v3"];
    for family in ["llama", "qwen3"].into_iter().chain(beside.iter().flat_map(|_| more)) {
        let checkpoint = Model::open(&checkpoint_dir(family).unwrap()).unwrap();
        let path = match &beside {
            Some(dir) => dir.join(format!("{family}.gguf")),
            // in parts, as llama.cpp's own tools split files
            None if family == "llama" => fixtures().join("formats/llama-converted-00001-of-00003.gguf"),
            None => fixtures().join(format!("formats/{family}-converted.gguf")),
        };
        let other = Model::open(&path).unwrap_or_else(|e| panic!("{e}"));
        same_program(family, &checkpoint, &other);
        same_numbers(family, &checkpoint, &other, 0.0);
        // The converter knows vocabularies by what they make of a text, and none of the others.
        if !more.contains(&family) {
            same_tokens(family, &checkpoint, &other);
        }
    }
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    let error = Plan::new(&fixtures().join("gemma2"), Mix::named("q8_0").unwrap()).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("query_pre_attn_scalar"), "{error}");
}

#[test]
fn a_part_alone_is_not_a_model() {
    let told = |path: &Path| Model::open(path).map(|_| ()).unwrap_err().to_string();
    let second = told(&fixtures().join("formats/llama-converted-00002-of-00003.gguf"));
    assert!(second.contains("expected the first of 3 parts"), "{second}");
    let alone = std::env::temp_dir().join(format!("part-{}-00001-of-00003.gguf", std::process::id()));
    std::fs::copy(fixtures().join("formats/llama-converted-00001-of-00003.gguf"), &alone).unwrap();
    let missing = told(&alone);
    std::fs::remove_file(&alone).unwrap();
    assert!(missing.contains("-00002-of-00003.gguf"), "{missing}");
}
