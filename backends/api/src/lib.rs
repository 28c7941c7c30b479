//! The seam between the engine and the devices: a backend compiles a graph, an executor runs its steps.

pub mod echo;
pub mod kv;
pub mod sample;
pub mod step;

use mainstay_models::{AdapterWeights, LoadError, Weights, graph::Graph};

pub use kv::{
    CopyDone, KvDType, KvLayout, PAGE_TOKENS, PageBytes, PageDigest, PageId, PageRead, PageRef, StoredPage,
    Ticket, oldest_page, pages_max,
};
pub use step::{AdapterId, Chunk, OutputRow, Sampling, Step, StepOutput, Want};

/// Counts fixed at start. An executor allocates for them once and is never asked for more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest sequence, tokens.
    pub context: usize,
    /// Most tokens in one step, prefill and decode together.
    pub tokens_per_step: usize,
    /// Most chunks (sequences) in one step.
    pub chunks: usize,
    /// Most output rows in one step.
    pub output_rows: usize,
    /// Pages of each group, by group index; page 0 of each is never given out: padding points at it. Without groups the
    /// model keeps no keys and values, and every sequence is computed whole, in one step.
    pub pages: Vec<usize>,
    /// Element type of stored keys and values.
    pub kv_dtype: KvDType,
}

/// What a backend runs on.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Short name of the backend: `cpu`, `cuda`, `candle`.
    pub backend: &'static str,
    /// The hardware and the kernel path chosen on it, for people.
    pub name: String,
    /// Memory that weights and pages may use, bytes; `None` where the system does not tell.
    pub memory_bytes: Option<u64>,
}

/// How far a result is independent of what ran beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invariance {
    /// Same bits whatever the batch, the chunking of the prompt, the thread count and the page placement.
    Full,
    /// Within tolerance only.
    None,
}

/// What decides the bits of a result besides model and tokens. Two executors of equal class give equal bits; the
/// class is part of the identity of stored pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NumericClass {
    /// Backend, and the kernel path actually chosen on this machine, such as `cpu/avx512`.
    pub path: String,
    /// Stands for the code that computes: a hash over the sources of backend and kernels and the compiler's version.
    pub sources: &'static str,
    /// What the executor promises.
    pub invariance: Invariance,
}

/// A step failed on the device; the sequences in it are lost, their tokens are not.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The device reported an error.
    #[error("{device}: {what}")]
    Device {
        /// The backend's name.
        device: &'static str,
        /// What it said.
        what: String,
    },
}

/// Compiles graphs for one device.
pub trait Backend: Send + Sync {
    /// What it runs on.
    fn device(&self) -> DeviceInfo;

    /// Turns a graph and its weights into an executor. An op or a variant that the backend lacks is found here.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`], [`LoadError::Resources`], or what [`Graph::check`] finds.
    fn load(&self, graph: &Graph, weights: &Weights, limits: &Limits)
    -> Result<Box<dyn Executor>, LoadError>;
}

/// One loaded model on one device. It knows chunks and pages; it does not know sequences, sessions or text.
///
/// The caller keeps every step inside the [`Limits`] it loaded with; a step outside them is a bug and asserts.
pub trait Executor: Send {
    /// Groups of layers, parts, bytes of a page.
    fn kv_layout(&self) -> &KvLayout;

    /// What decides the bits of its results.
    fn numeric_class(&self) -> NumericClass;

    /// Starts a step; may return before the work is done.
    ///
    /// # Errors
    /// [`StepError`] if the device failed.
    fn submit(&mut self, step: &Step) -> Result<(), StepError>;

    /// Waits for the oldest submitted step and overwrites `out` with its result.
    ///
    /// # Errors
    /// [`StepError`] if the device failed.
    fn finish(&mut self, out: &mut StepOutput) -> Result<(), StepError>;

    /// Starts to copy pages out of the device, after the steps already submitted.
    fn start_read(&mut self, pages: &[PageRead], ticket: Ticket);

    /// Starts to copy pages into the device, after the steps already submitted and before later ones.
    fn start_write(&mut self, pages: Vec<(PageRef, StoredPage)>, ticket: Ticket);

    /// Appends the copies that are done.
    fn poll(&mut self, done: &mut Vec<CopyDone>);

    /// Takes an adapter, which chunks may name from the next step on, or lets one go.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] where the backend has none, [`LoadError::Resources`] where memory is short.
    fn set_adapter(&mut self, id: AdapterId, weights: Option<&AdapterWeights>) -> Result<(), LoadError> {
        let _ = (id, weights);
        Err(LoadError::Unsupported { backend: "loaded", what: "adapters".to_owned() })
    }
}
