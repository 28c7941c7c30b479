//! Block formats against numbers that other implementations read from the same bytes (tests/fixtures/formats).

use std::path::{Path, PathBuf};

use mainstay_models::quant::{BLOCK_LEN_MAX, Block, can_encode, encode_row};
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

/// Numbers as weights have them, from a seed.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..6).map(|_| next()).sum::<f32>() * 0.03).collect()
}

#[test]
fn encoded_rows_are_near_what_they_were_made_of() {
    // root of the mean squared error over that of the numbers
    let bounds = [
        (DType::F32, 0.0),
        (DType::F16, 3e-4),
        (DType::BF16, 3e-3),
        (DType::Q8_0, 0.006),
        (DType::Q4_0, 0.095),
        (DType::Q4_1, 0.085),
        (DType::Q5_0, 0.047),
        (DType::Q5_1, 0.041),
        (DType::Q4K, 0.085),
        (DType::Q5K, 0.042),
        (DType::Q6K, 0.022),
        (DType::Mxfp4, 0.13),
    ];
    let row = numbers(4096, 7);
    for (dtype, bound) in bounds {
        assert!(can_encode(dtype));
        let (bytes, read) = round_trip(dtype, &row);
        let error: f32 = row.iter().zip(&read).map(|(a, b)| (a - b) * (a - b)).sum();
        let ratio = (error / row.iter().map(|a| a * a).sum::<f32>()).sqrt();
        assert!(ratio <= bound, "{dtype:?}: {ratio}");
        assert_eq!(round_trip(dtype, &row).0, bytes, "{dtype:?}: the same bytes every time");
        // what a format holds exactly it keeps within the rounding of its scale
        let again = round_trip(dtype, &read).1;
        let moved: f32 = read.iter().zip(&again).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!(moved <= error * 0.2 + f32::MIN_POSITIVE, "{dtype:?}: {moved} after {error}");
    }
}

#[test]
fn extremes_are_encoded_without_surprise() {
    for (dtype, _) in FORMATS.into_iter().filter(|(d, _)| can_encode(*d)) {
        for value in [0.0, -0.0, 1.0, -3.5, 1e-30, -1e-44, 3e4] {
            let read = round_trip(dtype, &[value; 256]).1;
            let far = |r: &f32| !r.is_finite() || (r - value).abs() > value.abs() * 0.2 + 1e-7;
            assert!(!read.iter().any(far), "{dtype:?}: {value} became {}", read[0]);
        }
        let mut row = [0.0; 256];
        row[77] = f32::MAX;
        assert!(round_trip(dtype, &row).1.iter().all(|r| r.is_finite()), "{dtype:?}");
    }
}

fn round_trip(dtype: DType, row: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; dtype.row_bytes(row.len()).unwrap()];
    encode_row(dtype, row, &mut bytes);
    let Some(format) = dtype.format() else {
        let read = bytes.chunks_exact(dtype.element_bytes().unwrap()).map(|b| match dtype {
            DType::F32 => f32::from_le_bytes(b.try_into().unwrap()),
            DType::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f32(),
            _ => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32(),
        });
        let read = read.collect();
        return (bytes, read);
    };
    let mut read = vec![0.0; row.len()];
    let mut block = Block::default();
    for (bytes, out) in bytes.chunks_exact(format.block_bytes).zip(read.chunks_exact_mut(format.block_len)) {
        format.decode(bytes, &mut block);
        block.read(format, out);
    }
    (bytes, read)
}
