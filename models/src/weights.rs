//! The bytes of a checkpoint: mapped safetensors files and a table of names, every entry verified at opening.

mod header;
mod root;
mod shards;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::LoadError;
use crate::file;

pub use root::RootCheck;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 4 bytes, IEEE 754.
    F32,
    /// 2 bytes, IEEE 754 half.
    F16,
    /// 2 bytes, bfloat16.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The type that safetensors calls by this name.
    fn parse(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }
}

/// One tensor as it lies in its file, little-endian, row-major. `bytes` need not be aligned.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// `product(shape) * dtype.size_bytes()` bytes.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// Writes the elements as f32 into `out` (exact for every [`DType`]).
    ///
    /// # Panics
    /// If `out` has another length than the tensor.
    pub fn read_f32(&self, out: &mut [f32]) {
        let len = self.bytes.len() / self.dtype.size_bytes();
        assert_eq!(out.len(), len, "a tensor of {len} elements is read into {}", out.len());
        match self.dtype {
            DType::F32 => convert(self.bytes, out, f32::from_le_bytes),
            DType::F16 => convert(self.bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
            DType::BF16 => convert(self.bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    for (element, to) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *to = f(*element);
    }
}

/// All tensors of a checkpoint.
#[derive(Debug)]
pub struct Weights {
    /// The file or directory that was opened, for messages about tensors that are in no file.
    origin: PathBuf,
    files: Vec<Mapped>,
    tensors: BTreeMap<String, Entry>,
}

/// One safetensors file.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    File(memmap2::Mmap),
    Memory(Cow<'static, [u8]>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::File(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}

/// Where a tensor lies; `range` is inside the file and as long as dtype and shape say.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`LoadError::Io`] and [`LoadError::Format`], naming the file and, where there is one, the tensor.
    pub fn open_dir(dir: &Path) -> Result<Self, LoadError> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let mut weights = Self::empty(dir);
        if single.exists() || !index.exists() {
            weights.add(&single, map(&single)?)?;
            return Ok(weights);
        }
        let shards = shards::read(&index)?;
        for name in &shards.files {
            let path = dir.join(name);
            weights.add(&path, map(&path)?)?;
        }
        for (tensor, shard) in &shards.tensors {
            let found = weights.tensors.get(tensor).map(|e| &weights.files[e.file].path);
            let expected = dir.join(&shards.files[*shard]);
            if found != Some(&expected) {
                return Err(LoadError::format(
                    &index,
                    format!(
                        "tensor `{tensor}`: expected in {}, found in {}",
                        expected.display(),
                        shown(found)
                    ),
                ));
            }
        }
        Ok(weights)
    }

    /// The tensors of one safetensors file that lies in memory (the embedded model, tests with seeded weights).
    /// `origin` stands for its path in messages.
    ///
    /// # Errors
    /// [`LoadError::Format`].
    pub fn from_bytes(origin: &Path, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, LoadError> {
        let mut weights = Self::empty(origin);
        weights.add(origin, Bytes::Memory(bytes.into()))?;
        Ok(weights)
    }

    /// One tensor by its full name.
    ///
    /// # Errors
    /// [`LoadError::MissingTensor`], or [`LoadError::Format`] if its elements have a type that is not in [`DType`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        self.find(name, &[])
    }

    /// Proves that a tensor is there with this shape.
    ///
    /// # Errors
    /// As [`Weights::tensor`], and [`LoadError::Shape`].
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<(), LoadError> {
        let tensor = self.find(name, shape)?;
        if tensor.shape == shape {
            return Ok(());
        }
        let path = self.files[self.tensors[name].file].path.clone();
        let (expected, found) = (shape.to_vec(), tensor.shape.to_vec());
        Err(LoadError::Shape { path, name: name.to_owned(), expected, found })
    }

    /// The file or directory that was opened.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<TensorView<'_>, LoadError> {
        let entry = self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor {
            path: self.origin.clone(),
            name: name.to_owned(),
            expected: expected.to_vec(),
        })?;
        let file = &self.files[entry.file];
        let dtype = DType::parse(&entry.dtype).ok_or_else(|| {
            let found = &entry.dtype;
            LoadError::format(
                &file.path,
                format!("tensor `{name}`: expected dtype F32, F16 or BF16, found {found}"),
            )
        })?;
        Ok(TensorView { dtype, shape: &entry.shape, bytes: &file.bytes[entry.range.clone()] })
    }

    fn empty(origin: &Path) -> Self {
        Self { origin: origin.to_owned(), files: Vec::new(), tensors: BTreeMap::new() }
    }

    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), LoadError> {
        let file = self.files.len();
        for t in header::read(path, &bytes)? {
            let entry = Entry { file, dtype: t.dtype, shape: t.shape, range: t.range };
            if let Some(other) = self.tensors.get(&t.name) {
                let other = self.files[other.file].path.display();
                let what = format!("tensor `{}`: expected once, found in {other} too", t.name);
                return Err(LoadError::format(path, what));
            }
            self.tensors.insert(t.name, entry);
        }
        self.files.push(Mapped { path: path.to_owned(), bytes });
        Ok(())
    }
}

fn shown(path: Option<&PathBuf>) -> String {
    path.map_or_else(|| "no shard".to_owned(), |p| p.display().to_string())
}

#[expect(unsafe_code, reason = "mapping a file is the only way to share weights with the page cache")]
fn map(path: &Path) -> Result<Bytes, LoadError> {
    let (file, _) = file::open(path)?;
    // SAFETY: the map is read-only and private to `Weights`, which hands out only `&[u8]` bounded by the length at
    // mapping. What remains is another process changing the file while it is served: the operator's files are
    // trusted not to be (no reader of mapped weights can rule it out), and bytes have no invalid bit patterns.
    let map = unsafe { memmap2::Mmap::map(&file) }
        .map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
    Ok(Bytes::File(map))
}
