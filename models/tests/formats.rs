//! Block formats against numbers that other implementations read from the same bytes (tests/fixtures/formats).

use std::path::{Path, PathBuf};

use mainstay_models::quant::{BLOCK_LEN_MAX, Block};
use mainstay_models::weights::DType;
use safetensors::SafeTensors;

const FORMATS: [(DType, &str); 12] = [
    (DType::Q8_0, "Q8_0"),
    (DType::Q4_0, "Q4_0"),
    (DType::Q4_1, "Q4_1"),
    (DType::Q5_0, "Q5_0"),
    (DType::Q5_1, "Q5_1"),
    (DType::Q2K, "Q2_K"),
    (DType::Q3K, "Q3_K"),
    (DType::Q4K, "Q4_K"),
    (DType::Q5K, "Q5_K"),
    (DType::Q6K, "Q6_K"),
    (DType::Iq4Nl, "IQ4_NL"),
    (DType::Mxfp4, "MXFP4"),
];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/formats")
}

#[test]
fn blocks_read_as_the_reference_reads_them() {
    let file = std::fs::read(fixtures().join("blocks.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    for (dtype, name) in FORMATS {
        let format = dtype.format().unwrap();
        let blocks = file.tensor(&format!("{name}.blocks")).unwrap().data().to_vec();
        let numbers = file.tensor(&format!("{name}.numbers")).unwrap().data().to_vec();
        let numbers: Vec<f32> = numbers.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(blocks.len() / format.block_bytes * format.block_len, numbers.len(), "{name}");
        assert_eq!(dtype.row_bytes(numbers.len()), Some(blocks.len()), "{name}");
        let (mut block, mut out) = (Block::default(), [0.0; BLOCK_LEN_MAX]);
        let blocks = blocks.chunks_exact(format.block_bytes);
        for (at, (bytes, expected)) in blocks.zip(numbers.chunks_exact(format.block_len)).enumerate() {
            format.decode(bytes, &mut block);
            let codes = &block.codes[..format.block_len];
            assert!(codes.iter().all(|c| (format.codes.0..=format.codes.1).contains(c)), "{name} {at}");
            let out = &mut out[..format.block_len];
            block.read(format, out);
            // zeros of either sign are equal: a product of integers has no sign of zero to keep
            assert_eq!(out, expected, "{name}, block {at}");
        }
    }
}
