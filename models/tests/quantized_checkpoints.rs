//! Quantized safetensors against numbers computed elsewhere from the same files (tests/fixtures/formats/quantized.py).

use std::path::{Path, PathBuf};

use mainstay_models::Weights;
use mainstay_models::config::Config;
use mainstay_models::quant::Block;
use mainstay_models::weights::DType;
use serde_json::json;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/formats/quantized")
}

fn config(value: &serde_json::Value) -> Config {
    Config::from_bytes(Path::new("config.json"), value.to_string().as_bytes()).unwrap()
}

fn open(name: &str) -> (Weights, serde_json::Value) {
    let read = |end: &str| std::fs::read(fixtures().join(format!("{name}.{end}"))).unwrap();
    let weights = Weights::from_bytes(Path::new("model.safetensors"), read("safetensors")).unwrap();
    (weights, serde_json::from_slice(&read("json")).unwrap())
}

const METHODS: [(&str, DType); 13] = [
    ("fp8_block", DType::F8),
    ("fp8_tensor", DType::F8),
    ("fp8_row", DType::F8),
    ("int8_row", DType::F8),
    ("int4_group", DType::Int4),
    ("int4_zeros", DType::Int4),
    ("int8_group", DType::Int8),
    ("awq", DType::Int4),
    ("gptq_int4", DType::Int4),
    ("gptq_int4_zeros", DType::Int4),
    ("gptq_int8", DType::Int8),
    // columns in another order, and differences of nine bits, are no blocks
    ("gptq_int4_order", DType::F32),
    ("gptq_int8_zeros", DType::F32),
];

/// What is done to a configuration.
type Change<'a> = &'a dyn Fn(&mut serde_json::Value);

#[test]
fn every_method_reads_to_the_bits_of_its_definition() {
    for (name, dtype) in METHODS {
        let (mut weights, of_model) = open(name);
        weights.define_quantized(&config(&of_model)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (view, expected) = (weights.tensor("x.weight").unwrap(), weights.tensor("x.expected").unwrap());
        assert_eq!((view.dtype, view.shape), (dtype, expected.shape), "{name}");
        let (mut found, mut numbers) = (vec![0.0; view.len()], vec![0.0; expected.len()]);
        view.read_f32(&mut found);
        expected.read_f32(&mut numbers);
        assert!(found == numbers, "{name}: expected {:?}, found {:?}", &numbers[..8], &found[..8]);
        if let Some(format) = dtype.format() {
            let (mut block, mut out) = (Block::default(), [0.0; 32]);
            view.read_block(3, 1, &mut block);
            block.read(format, &mut out);
            assert_eq!(out, numbers[3 * view.cols() + 32..][..32], "{name}: a block");
            let (least, most) = format.codes;
            assert!(block.codes[..32].iter().all(|c| (least..=most).contains(c)), "{name}");
        }
    }
}

#[test]
fn what_is_not_supported_or_contradicts_itself_is_named() {
    let told = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let (mut weights, mut of_model) = open(name);
        change(&mut of_model["quantization_config"]);
        weights.define_quantized(&config(&of_model)).unwrap_err().to_string()
    };
    let cases: [(&str, Change<'_>, &str); 8] = [
        ("awq", &|c| c["quant_method"] = json!("bitsandbytes"), "quant_method: expected fp8, awq"),
        ("awq", &|c| c["version"] = json!("gemv"), "version: expected gemm"),
        ("awq", &|c| c["bits"] = json!(3), "bits: expected 4"),
        ("awq", &|c| c["group_size"] = json!(48), "`x.qzeros`: expected shape"),
        ("gptq_int4", &|c| c["bits"] = json!(8), "`x.qzeros`: expected shape"),
        ("gptq_int4", &|c| c["checkpoint_format"] = json!("marlin"), "checkpoint_format: expected gptq"),
        ("int4_group", &|c| c["format"] = json!("marlin-24"), "format: expected float-quantized"),
        (
            "fp8_block",
            &|c| c["weight_block_size"] = json!([16, 16]),
            "`x.weight_scale_inv`: expected a shape",
        ),
    ];
    for (name, change, expected) in cases {
        let found = told(name, change);
        assert!(found.contains(expected), "{name}: {found}");
    }
}

#[test]
fn an_order_outside_the_groups_is_refused() {
    let (_, of_model) = open("gptq_int4_order");
    let mut file = std::fs::read(fixtures().join("gptq_int4_order.safetensors")).unwrap();
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let start = 8 + len + header["x.g_idx"]["data_offsets"][0].as_u64().unwrap() as usize;
    for wrong in [3u32, u32::MAX] {
        file[start + 8..start + 12].copy_from_slice(&wrong.to_le_bytes());
        let mut weights = Weights::from_bytes(Path::new("model.safetensors"), file.clone()).unwrap();
        let error = weights.define_quantized(&config(&of_model)).unwrap_err().to_string();
        assert!(error.contains("expected groups below 3"), "{error}");
    }
}
