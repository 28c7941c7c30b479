//! The header of a GGUF file: typed metadata and a table of tensors, every count, length and offset checked before it is
//! used (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3).

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::metadata::{Array, Metadata, Value};
use crate::LoadError;
use crate::weights::DType;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// Where tensors begin, unless `general.alignment` says otherwise.
const ALIGNMENT: u64 = 32;
/// The format's own limit on dimensions.
const RANK_MAX: u32 = 4;
/// The format's own limits on names, in bytes.
const KEY_BYTES_MAX: usize = (1 << 16) - 1;
const NAME_BYTES_MAX: usize = 1 << 10;
/// Elements of all lists together: vocabularies and merges are below a million.
const ELEMENTS_MAX: usize = 1 << 23;
/// The least that an entry takes: a length of 8 bytes, a type of 4, a value of 1.
const ENTRY_BYTES_MIN: usize = 13;
/// The least that a tensor takes: a length of 8 bytes, a rank of 4, a type of 4, an offset of 8.
const TENSOR_BYTES_MIN: usize = 24;

/// Types of tensors that are read, by the number and name that the format gives them.
pub(crate) const TYPES: [(u32, &str, DType); 15] = [
    (0, "F32", DType::F32),
    (1, "F16", DType::F16),
    (2, "Q4_0", DType::Q4_0),
    (3, "Q4_1", DType::Q4_1),
    (6, "Q5_0", DType::Q5_0),
    (7, "Q5_1", DType::Q5_1),
    (8, "Q8_0", DType::Q8_0),
    (10, "Q2_K", DType::Q2K),
    (11, "Q3_K", DType::Q3K),
    (12, "Q4_K", DType::Q4K),
    (13, "Q5_K", DType::Q5K),
    (14, "Q6_K", DType::Q6K),
    (20, "IQ4_NL", DType::Iq4Nl),
    (30, "BF16", DType::BF16),
    (39, "MXFP4", DType::Mxfp4),
];

/// Names of other types, for messages.
const OTHER_TYPES: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// One tensor, its range relative to the file and proved to be inside it.
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) type_name: &'static str,
    /// Outermost first, unlike in the file.
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// What the header of a file says.
pub(crate) struct Header {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: Vec<Tensor>,
}

/// Reads the header of a whole file.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<Header, LoadError> {
    let mut cursor = Cursor { file, at: 0, elements_left: ELEMENTS_MAX };
    header(path, &mut cursor).map_err(|what| LoadError::format(path, what))
}

fn header(path: &Path, cursor: &mut Cursor<'_>) -> Result<Header, String> {
    let magic = cursor.take(4, "the magic number")?;
    if magic != MAGIC {
        return Err(format!("expected a GGUF file, found one that begins with {magic:02x?}"));
    }
    let version = cursor.u32("the version")?;
    if VERSIONS.contains(&version.swap_bytes()) {
        return Err("expected a little-endian GGUF file, found a big-endian one".to_owned());
    }
    if !VERSIONS.contains(&version) {
        return Err(format!("expected GGUF version 2 or 3, found {version}"));
    }
    let tensors = cursor.u64("the number of tensors")?;
    let entries = cursor.u64("the number of metadata entries")?;
    let entries = cursor.count(entries, ENTRY_BYTES_MIN, "metadata entries")?;
    let mut metadata = Metadata::new(path);
    for _ in 0..entries {
        let key = cursor.text(KEY_BYTES_MAX, "a metadata key")?;
        let kind = cursor.u32(key)?;
        let value = cursor.value(key, kind)?;
        if !metadata.insert(key, value) {
            return Err(format!("metadata `{key}`: expected once, found twice"));
        }
    }
    let alignment = metadata.alignment()?.unwrap_or(ALIGNMENT);
    let tensors = cursor.count(tensors, TENSOR_BYTES_MIN, "tensors")?;
    let mut infos = Vec::with_capacity(tensors);
    for _ in 0..tensors {
        infos.push(cursor.info()?);
    }
    let data = (cursor.at as u64).next_multiple_of(alignment);
    let tensors = place(infos, data, alignment, cursor.file.len() as u64)?;
    Ok(Header { metadata, tensors })
}

/// A tensor as the table names it.
struct Info {
    name: String,
    dtype: DType,
    type_name: &'static str,
    shape: Vec<usize>,
    bytes: u64,
    /// From the beginning of the data.
    offset: u64,
}

/// Proves that every tensor lies aligned inside the file and none shares bytes with another.
fn place(mut infos: Vec<Info>, data: u64, alignment: u64, end: u64) -> Result<Vec<Tensor>, String> {
    let mut names = HashSet::new();
    if let Some(twice) = infos.iter().find(|info| !names.insert(info.name.as_str())) {
        return Err(format!("tensor `{}`: expected once, found twice", twice.name));
    }
    infos.sort_by_key(|info| (info.offset, info.bytes));
    let (mut free, mut tensors) = (0, Vec::with_capacity(infos.len()));
    for info in infos {
        let Info { name, dtype, type_name, shape, bytes, offset } = info;
        if offset % alignment != 0 || offset < free {
            return Err(format!(
                "tensor `{name}`: expected an offset from {free} on, a multiple of {alignment}, found {offset}"
            ));
        }
        let range = data.checked_add(offset).and_then(|start| Some((start, start.checked_add(bytes)?)));
        let Some((start, stop)) = range.filter(|(_, stop)| *stop <= end) else {
            return Err(format!(
                "tensor `{name}`: expected {bytes} bytes from {data} + {offset} on, found a file of {end} bytes"
            ));
        };
        free = offset + bytes;
        // In range of usize: they are at most the length of a slice.
        tensors.push(Tensor { name, dtype, type_name, shape, range: start as usize..stop as usize });
    }
    Ok(tensors)
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
    elements_left: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let left = self.file.len() - self.at;
        let found = self.file.get(self.at..).and_then(|rest| rest.get(..len));
        let found =
            found.ok_or_else(|| format!("{what}: expected {len} bytes at {}, found {left}", self.at))?;
        self.at += len;
        Ok(found)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that each take some bytes of what is left, so that memory for them is no more than the file's.
    fn count(&self, count: u64, bytes_min: usize, what: &str) -> Result<usize, String> {
        let most = (self.file.len() - self.at) / bytes_min;
        match usize::try_from(count).ok().filter(|&n| n <= most) {
            Some(count) => Ok(count),
            None => {
                Err(format!("{what}: expected at most {most} in what is left of the file, found {count}"))
            }
        }
    }

    fn text(&mut self, bytes_max: usize, what: &str) -> Result<&'a str, String> {
        let len = self.u64(what)?;
        let len = usize::try_from(len)
            .ok()
            .filter(|&n| n <= bytes_max)
            .ok_or_else(|| format!("{what}: expected at most {bytes_max} bytes, found {len}"))?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| format!("{what}: expected UTF-8, found {e}"))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Whole(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Whole(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Whole(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Whole(self.u32(key)?.into()),
            5 => Value::Whole(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Number(f32::from_le_bytes(self.array(key)?).into()),
            7 => match self.array(key)? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [found] => return Err(format!("metadata `{key}`: expected 0 or 1, found {found}")),
            },
            8 => Value::Text(self.text(self.file.len(), key)?.to_owned()),
            9 => Value::Array(self.values(key)?),
            10 => {
                let found = self.u64(key)?;
                let expected = || format!("metadata `{key}`: expected a number below 2^63, found {found}");
                Value::Whole(i64::try_from(found).map_err(|_| expected())?)
            }
            11 => Value::Whole(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Number(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("metadata `{key}`: expected a type from 0 to 12, found {kind}")),
        })
    }

    fn values(&mut self, key: &str) -> Result<Array, String> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let bytes_min = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(format!("metadata `{key}`: expected no arrays of arrays, found one")),
            _ => return Err(format!("metadata `{key}`: expected a type from 0 to 12, found {kind}")),
        };
        let count = self.count(count, bytes_min, key)?;
        self.elements_left = self.elements_left.checked_sub(count).ok_or_else(|| {
            format!("metadata `{key}`: expected at most {ELEMENTS_MAX} elements in all lists, found more")
        })?;
        if kind == 8 {
            let text = |_| self.text(self.file.len(), key).map(str::to_owned);
            return Ok(Array::Texts((0..count).map(text).collect::<Result<_, _>>()?));
        }
        let values = (0..count).map(|_| self.value(key, kind)).collect::<Result<Vec<_>, _>>()?;
        Ok(Array::Values(values))
    }

    fn info(&mut self) -> Result<Info, String> {
        let name = self.text(NAME_BYTES_MAX, "the name of a tensor")?.to_owned();
        let rank = self.u32(&name)?;
        if rank > RANK_MAX {
            return Err(format!("tensor `{name}`: expected at most {RANK_MAX} dimensions, found {rank}"));
        }
        let mut shape = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            let len = self.u64(&name)?;
            let found = usize::try_from(len).ok().filter(|&n| (1..=i64::MAX as usize).contains(&n));
            let wrong = || format!("tensor `{name}`: expected dimensions from 1 to 2^63 - 1, found {len}");
            shape.push(found.ok_or_else(wrong)?);
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let Some((_, type_name, dtype)) = TYPES.iter().find(|(n, ..)| *n == number) else {
            let other = OTHER_TYPES.iter().find(|(n, _)| *n == number);
            let found = other.map_or_else(|| format!("type {number}"), |(_, name)| (*name).to_owned());
            let known = TYPES.map(|(_, name, _)| name).join(", ");
            return Err(format!("tensor `{name}`: expected one of {known}, found {found}"));
        };
        let cols = shape.last().copied().unwrap_or(1);
        let bytes = dtype
            .row_bytes(cols)
            .and_then(|row| shape.iter().rev().skip(1).try_fold(row, |n, &d| n.checked_mul(d)));
        let bytes = bytes.ok_or_else(|| {
            format!("tensor `{name}`: expected rows of whole blocks that can be addressed, found {shape:?} of {type_name}")
        })?;
        let offset = self.u64(&name)?;
        Ok(Info { name, dtype: *dtype, type_name, shape, bytes: bytes as u64, offset })
    }
}
