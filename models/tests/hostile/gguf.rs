//! GGUF files made wrong on purpose, by hand and by a seed.

use std::path::Path;
use std::time::{Duration, Instant};

use mainstay_models::Model;
use mainstay_models::tokenizer::AddSpecial;

use super::{Random, assert_small_allocations, fixtures, open, read_all, valid};

/// How long each kind of file is damaged at random.
const SECONDS: &str = "MAINSTAY_FUZZ_SECONDS";

fn time() -> Duration {
    let seconds = std::env::var(SECONDS).ok().map(|s| s.parse().expect("seconds are a whole number"));
    Duration::from_secs(seconds.unwrap_or(3))
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A header of parts: how many tensors and entries it claims, then both.
fn gguf(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest);
    file
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    text(&mut bytes, key);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes
}

fn list(kind: u32, count: u64, rest: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat()
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    text(&mut bytes, name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

fn told(file: Vec<u8>) -> String {
    match Model::from_gguf_bytes(Path::new("m.gguf"), file) {
        Ok(_) => "read".to_owned(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn headers_made_by_hand() {
    let huge = u64::MAX;
    let two = |a: Vec<u8>, b: Vec<u8>| [a, b].concat();
    let tensors = |rest: Vec<u8>| gguf(2, 0, &[rest, vec![0; 256]].concat());
    let one = |rest: Vec<u8>| gguf(1, 0, &[rest, vec![0; 64]].concat());
    let mut big_endian = b"GGUF".to_vec();
    big_endian.extend(3u32.to_be_bytes());
    let mut first_version = gguf(0, 0, &[]);
    first_version[4] = 1;
    for (file, expected) in [
        (b"GG".to_vec(), "the magic number: expected 4 bytes at 0, found 2"),
        (b"PK\x03\x04rest".to_vec(), "expected a GGUF file"),
        (big_endian, "found a big-endian one"),
        (first_version, "expected GGUF version 2 or 3, found 1"),
        (gguf(huge, 0, &[]), "tensors: expected at most 0"),
        (gguf(0, huge, &[]), "metadata entries: expected at most 0"),
        (gguf(0, 1, &entry("k", 8, &huge.to_le_bytes())), "k: expected at most"),
        (gguf(0, 1, &entry("k", 9, &list(8, huge, &[0; 8]))), "k: expected at most 1 in what is left"),
        (gguf(0, 1, &entry("k", 9, &list(4, 1 << 40, &[0; 8]))), "k: expected at most 2 in what is left"),
        (gguf(0, 1, &entry("k", 9, &list(9, 1, &list(4, 0, &[])))), "no arrays of arrays"),
        (gguf(0, 1, &entry("k", 13, &[0; 8])), "expected a type from 0 to 12, found 13"),
        (gguf(0, 1, &entry("k", 7, &[2])), "metadata `k`: expected 0 or 1, found 2"),
        (gguf(0, 1, &entry("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xFF])), "k: expected UTF-8"),
        (gguf(0, 2, &two(entry("k", 7, &[1]), entry("k", 7, &[1]))), "metadata `k`: expected once"),
        (
            gguf(0, 1, &entry("general.alignment", 4, &[0; 4])),
            "`general.alignment`: expected 1 to 2097152, found 0",
        ),
        (one(tensor("t", &[1, 1, 1, 1, 1], 0, 0)), "tensor `t`: expected at most 4 dimensions, found 5"),
        (one(tensor("t", &[huge], 0, 0)), "tensor `t`: expected dimensions from 1 to 2^63 - 1"),
        (one(tensor("t", &[4, 0], 0, 0)), "tensor `t`: expected dimensions from 1 to 2^63 - 1"),
        (one(tensor("t", &[1 << 40, 1 << 40], 0, 0)), "that can be addressed"),
        (one(tensor("t", &[31], 2, 0)), "expected rows of whole blocks"),
        (one(tensor("t", &[32], 17, 0)), "found IQ2_XS"),
        (one(tensor("t", &[32], 99, 0)), "found type 99"),
        (one(tensor("t", &[4], 0, 4)), "a multiple of 32, found 4"),
        (one(tensor("t", &[4], 0, 1 << 62)), "expected 16 bytes from"),
        (one(tensor("t", &[4], 0, huge - 31)), "expected 16 bytes from"),
        (tensors(two(tensor("t", &[4], 0, 0), tensor("t", &[4], 0, 32))), "tensor `t`: expected once"),
        (
            tensors(two(tensor("a", &[16], 0, 0), tensor("b", &[4], 0, 32))),
            "tensor `b`: expected an offset from 64",
        ),
        (gguf(0, 0, &[]), "metadata `general.architecture`: expected a text, found nothing"),
    ] {
        let found = told(file);
        assert!(found.contains(expected), "expected `{expected}`, found `{found}`");
    }
    assert_small_allocations();
}

#[test]
fn every_truncation_of_a_file_is_refused() {
    let file = converted();
    for len in (0..file.len()).step_by(97) {
        assert!(Model::from_gguf_bytes(Path::new("m.gguf"), file[..len].to_vec()).is_err(), "{len} bytes");
    }
}

fn converted() -> Vec<u8> {
    std::fs::read(fixtures().join("formats/qwen3-converted.gguf")).expect("a fixture")
}

/// Where metadata ends, nearly: damage behind it changes numbers only.
fn header_len(file: &[u8]) -> usize {
    let mark = b"output_norm.weight";
    file.windows(mark.len()).rposition(|w| w == mark).map_or(file.len(), |at| at + 64)
}

/// A few bytes wrong, a number extreme, a piece repeated or left out.
fn damage(file: &mut Vec<u8>, within: usize, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(within.min(file.len()).saturating_sub(8).max(1));
        match random.below(6) {
            0 => file[at] ^= 1 << random.below(8),
            1 => file[at] = random.below(256) as u8,
            2 => {
                let extremes = [0, 1, u64::MAX, 1 << 63, 1 << 32, 255, 1 << 40];
                file[at..at + 8].copy_from_slice(&extremes[random.below(extremes.len())].to_le_bytes());
            }
            3 => {
                let small = (random.below(64) as u32).to_le_bytes();
                file[at..at + 4].copy_from_slice(&small);
            }
            4 => {
                let piece: Vec<u8> = file[at..(at + random.below(64)).min(file.len())].to_vec();
                file.splice(at..at, piece);
            }
            _ => {
                let end = (at + random.below(64)).min(file.len());
                file.drain(at..end);
            }
        }
    }
}

#[test]
fn random_damage_to_gguf_never_panics() {
    let (file, begin) = (converted(), Instant::now());
    let within = header_len(&file);
    let mut random = Random(3);
    let (mut tried, mut read) = (0u32, 0u32);
    while begin.elapsed() < time() {
        let mut damaged = file.clone();
        damage(&mut damaged, within, &mut random);
        tried += 1;
        if let Ok(model) = Model::from_gguf_bytes(Path::new("m.gguf"), damaged) {
            read_all(&model.weights);
            let _ = model.tokenizer.encode("Hello, 123 world", AddSpecial::Yes);
            read += 1;
        }
    }
    assert!(tried > 20 && read > 0, "{tried} files, of which {read} could be read");
}

#[test]
fn random_damage_to_safetensors_never_panics() {
    let (file, begin) = (valid(), Instant::now());
    let mut random = Random(4);
    let (mut tried, mut read) = (0u32, 0u32);
    while begin.elapsed() < time() {
        let mut damaged = file.clone();
        damage(&mut damaged, usize::MAX, &mut random);
        tried += 1;
        if let Ok(weights) = open(damaged) {
            read_all(&weights);
            read += 1;
        }
    }
    assert!(tried > 1000 && read > 0, "{tried} files, of which {read} could be read");
}
