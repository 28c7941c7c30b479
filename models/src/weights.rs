//! The bytes of a checkpoint: mapped files and a table of names, every entry verified at opening.
//!
//! A tensor that a backend asks for need not be one that is stored: the table maps the names that the families know
//! (those of Hugging Face) to rows, columns or combinations of what the files hold.

mod at_load;
mod define;
mod dtype;
mod experts;
mod gguf;
mod groups;
mod header;
mod memory;
mod nested;
mod quantized;
mod root;
mod shards;
mod tiles;
mod view;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::LoadError;
use crate::file;

use view::{RowMap, Storage};

pub use at_load::AtLoad;
pub(crate) use define::{Cut, Rows};
pub use dtype::DType;
pub use memory::MemoryTensor;
pub use root::RootCheck;
pub use view::TensorView;

/// All tensors of a checkpoint; by default none.
#[derive(Debug, Default)]
pub struct Weights {
    /// The file or directory that was opened, for messages about tensors that are in no file.
    origin: PathBuf,
    files: Vec<Mapped>,
    /// What the files hold, by the names there.
    stored: BTreeMap<String, Entry>,
    /// What can be asked for.
    tensors: BTreeMap<String, Tensor>,
}

/// One file with tensors.
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

/// A stored tensor; its span is inside the file and as long as dtype and shape say.
#[derive(Debug)]
struct Entry {
    /// Its elements as the file calls them.
    type_name: String,
    /// `None` where they are no weights, or only with another tensor.
    dtype: Option<DType>,
    shape: Vec<usize>,
    span: Span,
}

/// Bytes of a file.
#[derive(Clone, Debug)]
struct Span {
    file: usize,
    range: Range<usize>,
}

/// A tensor that can be asked for.
#[derive(Debug)]
struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    storage: Storage<Span>,
    rows: RowMap,
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
            weights.name_experts()?;
            weights.name_text_model()?;
            return Ok(weights);
        }
        let shards = shards::read(&index)?;
        for name in &shards.files {
            let path = dir.join(name);
            weights.add(&path, map(&path)?)?;
        }
        for (tensor, shard) in &shards.tensors {
            let found = weights.stored.get(tensor).map(|e| &weights.files[e.span.file].path);
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
        weights.name_experts()?;
        weights.name_text_model()?;
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
        let path = self.origin_of(name).to_owned();
        let (expected, found) = (shape.to_vec(), tensor.shape.to_vec());
        Err(LoadError::Shape { path, name: name.to_owned(), expected, found })
    }

    /// Gives the pages of the file that hold a tensor back to the system, for whoever has read them and made something
    /// of them: they count to this process no longer, and whoever asks for them again gets them from the file.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.tensors.get(name) {
            tensor.storage.map(|span| self.release_span(span));
        }
    }

    fn release_span(&self, span: &Span) {
        if let Bytes::File(map) = &self.files[span.file].bytes {
            release(map, span.range.clone());
        }
    }

    /// The file or directory that was opened.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The bytes of every stored tensor, in the order of their names.
    pub fn stored_bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.stored.values().map(|entry| self.bytes(&entry.span))
    }

    /// The names of all tensors that can be asked for, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<TensorView<'_>, LoadError> {
        if let Some(tensor) = self.tensors.get(name) {
            let Tensor { dtype, shape, storage, rows } = tensor;
            let storage = storage.map(|span| self.bytes(span));
            let view = TensorView { dtype: *dtype, shape, storage, rows: *rows };
            // A vector is read element by element.
            if matches!(storage, Storage::Rows(_)) && dtype.row_bytes(view.cols()).is_none() {
                let what = format!(
                    "tensor `{name}`: expected floats or rows of whole blocks, found {shape:?} of {dtype:?}"
                );
                return Err(LoadError::format(self.origin_of(name), what));
            }
            return Ok(view);
        }
        let Some(entry) = self.stored.get(name) else {
            let (path, name, expected) = (self.origin.clone(), name.to_owned(), expected.to_vec());
            return Err(LoadError::MissingTensor { path, name, expected });
        };
        let found = &entry.type_name;
        let what = format!("tensor `{name}`: expected dtype F32, F16 or BF16, found {found}");
        Err(LoadError::format(self.origin_of(name), what))
    }

    fn bytes(&self, span: &Span) -> &[u8] {
        &self.files[span.file].bytes[span.range.clone()]
    }

    /// The file that holds a tensor (the first of what it is made of), or all of them.
    fn origin_of(&self, name: &str) -> &Path {
        let first = match self.tensors.get(name).map(|t| &t.storage) {
            Some(Storage::Rows(span) | Storage::Columns { bytes: span, .. }) => Some(span),
            Some(Storage::Mxfp4 { codes, .. }) => Some(codes),
            Some(Storage::Tiles(tiles)) => Some(&tiles.codes),
            Some(Storage::Groups(groups)) => Some(&groups.codes),
            None => self.stored.get(name).map(|e| &e.span),
        };
        first.map_or(&self.origin, |span| &self.files[span.file].path)
    }

    fn empty(origin: &Path) -> Self {
        let (files, stored, tensors) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { origin: origin.to_owned(), files, stored, tensors }
    }

    /// Adds a safetensors file; its plain tensors can be asked for by their own names.
    fn add(&mut self, path: &Path, bytes: Bytes) -> Result<(), LoadError> {
        let file = self.files.len();
        for t in header::read(path, &bytes)? {
            let span = Span { file, range: t.range };
            let dtype = DType::parse(&t.dtype);
            if let Some(dtype) = dtype {
                let (shape, storage) = (t.shape.clone(), Storage::Rows(span.clone()));
                let tensor = Tensor { dtype, shape, storage, rows: RowMap::PLAIN };
                self.tensors.insert(t.name.clone(), tensor);
            }
            self.store(path, t.name, Entry { type_name: t.dtype, dtype, shape: t.shape, span })?;
        }
        self.files.push(Mapped { path: path.to_owned(), bytes });
        Ok(())
    }

    /// Enters a stored tensor of the file at `path`.
    fn store(&mut self, path: &Path, name: String, entry: Entry) -> Result<(), LoadError> {
        if let Some(other) = self.stored.get(&name) {
            let other = self.files.get(other.span.file).map_or(path, |f| &f.path).display();
            let what = format!("tensor `{name}`: expected once, found in {other} too");
            return Err(LoadError::format(path, what));
        }
        self.stored.insert(name, entry);
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

/// The system's pages that lie in a range of a map, whole ones only.
#[cfg(unix)]
#[expect(unsafe_code, reason = "the crate cannot know which maps may lose what they hold")]
fn release(map: &memmap2::Mmap, range: Range<usize>) {
    use memmap2::UncheckedAdvice::DontNeed;

    /// The largest page of the systems we know, so that no page is given back for a part of it.
    const PAGE_BYTES: usize = 64 << 10;
    let (start, end) = (range.start.next_multiple_of(PAGE_BYTES), range.end / PAGE_BYTES * PAGE_BYTES);
    if start < end {
        // SAFETY: the map is of a file and nobody writes to it, so that the next reader finds the same bytes.
        // It is advice: whether it was taken makes no difference to anyone.
        let _ = unsafe { map.unchecked_advise_range(DontNeed, start, end - start) };
    }
}

#[cfg(not(unix))]
fn release(_map: &memmap2::Mmap, _range: Range<usize>) {}
