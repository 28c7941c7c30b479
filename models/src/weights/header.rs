//! The header of a safetensors file: 8 bytes of length, a JSON object of tensors, then their bytes without holes
//! (<https://github.com/huggingface/safetensors#format>).
//!
//! Read here and not by the `safetensors` crate, whose errors do not name the tensor at fault and which lets a
//! name stand twice.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use crate::LoadError;

/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes of the length that stands before the header.
const PREFIX_BYTES: usize = 8;
/// No model has tensors of more dimensions.
const RANK_MAX: usize = 8;

/// One entry, its range relative to the file and proved to be inside it.
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The tensors of a file in the order of their bytes.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<Vec<Tensor>, LoadError> {
    let wrong = |what: String| LoadError::format(path, what);
    let (prefix, rest) = file.split_first_chunk::<PREFIX_BYTES>().ok_or_else(|| {
        wrong(format!("expected a header length in the first 8 bytes, found {} bytes", file.len()))
    })?;
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > HEADER_BYTES_MAX || header_len > rest.len() as u64 {
        let (most, left) = (HEADER_BYTES_MAX, rest.len());
        return Err(wrong(format!(
            "expected a header of at most {most} bytes inside the {left} that follow, found a length of {header_len}"
        )));
    }
    // In range of usize: it is at most the length of a slice.
    let (header, data) = rest.split_at(header_len as usize);
    let header = std::str::from_utf8(header)
        .map_err(|e| wrong(format!("expected a header in UTF-8, found {e} of the header")))?;
    let Header(mut entries) = serde_json::from_str(header)
        .map_err(|e| wrong(format!("expected a JSON object of tensors as header, found: {e}")))?;
    entries.sort_by(|a, b| a.1.data_offsets.cmp(&b.1.data_offsets).then_with(|| a.0.cmp(&b.0)));

    let mut tensors = Vec::with_capacity(entries.len());
    let mut end = 0;
    for (name, info) in entries {
        check(&name, &info, end, data.len()).map_err(wrong)?;
        end = info.data_offsets.1;
        let base = PREFIX_BYTES + header.len();
        let range = base + info.data_offsets.0..base + end;
        tensors.push(Tensor { name, dtype: info.dtype, shape: info.shape, range });
    }
    if end != data.len() {
        return Err(wrong(format!(
            "expected the tensors to fill all {} bytes after the header, found {end} filled",
            data.len()
        )));
    }
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w[0] == w[1]) {
        Some(twice) => Err(wrong(format!("tensor `{}`: expected once, found twice in the header", twice[0]))),
        None => Ok(tensors),
    }
}

/// Proves one entry: it begins where the one before ended, ends inside the data, and is as long as it says.
fn check(name: &str, info: &Info, expected_start: usize, data_len: usize) -> Result<(), String> {
    let (start, end) = info.data_offsets;
    if start != expected_start || end < start || end > data_len {
        return Err(format!(
            "tensor `{name}`: expected offsets from {expected_start} to at most {data_len}, found {start} to {end}"
        ));
    }
    if info.shape.len() > RANK_MAX {
        return Err(format!(
            "tensor `{name}`: expected at most {RANK_MAX} dimensions, found {}",
            info.shape.len()
        ));
    }
    // Types that are not known here are no one's weights; a tensor of one fails when it is asked for.
    let Some(bits) = element_bits(&info.dtype) else { return Ok(()) };
    let expected = info.shape.iter().try_fold(bits, |n, &d| n.checked_mul(d));
    let found = end - start;
    if expected.is_some_and(|bits| bits % 8 == 0 && bits / 8 == found) {
        return Ok(());
    }
    let expected =
        expected.map_or_else(|| "more than can be addressed".to_owned(), |bits| (bits / 8).to_string());
    let (shape, dtype) = (&info.shape, &info.dtype);
    Err(format!("tensor `{name}`: expected {expected} bytes for shape {shape:?} of {dtype}, found {found}"))
}

fn element_bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The header's object as a list: a map type would swallow a name that stands twice.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map
                        .next_value::<Info>()
                        .map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
                    entries.push((name, info));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
