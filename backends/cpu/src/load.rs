//! Weights from the checkpoint into panels, each matrix once however many blocks name it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_kernels_cpu::{LANES, PackedMatrix, PanelWriter, SourceRows, WeightType};
use mainstay_models::graph::Graph;
use mainstay_models::weights::{DType, TensorView};
use mainstay_models::{LoadError, Weights};

use crate::plan::{MatrixUse, Plan, Program, RowOrder, VectorUse};

/// The weights of one block in one layer, in the order of its [`Program`].
pub(crate) struct BlockWeights {
    pub(crate) matrices: Vec<Arc<PackedMatrix>>,
    /// Padded with zeros to whole vectors.
    pub(crate) vectors: Vec<Arc<[f32]>>,
}

/// All weights of a model.
pub(crate) struct ModelWeights {
    pub(crate) prologue: BlockWeights,
    pub(crate) layers: Vec<BlockWeights>,
    pub(crate) epilogue: BlockWeights,
    pub(crate) pooled: BlockWeights,
}

/// Panels that a thread packs at a time.
const RUN_PANELS: usize = 16;

/// Columns that are packed at a time: 16 rows of them stay in the first cache.
const RUN_COLS: usize = 64;

/// Two uses of equal key are one matrix in memory.
type Key = (Vec<(String, usize)>, usize, RowOrder);

struct Loader<'a> {
    weights: &'a Weights,
    threads: usize,
    packed: HashMap<Key, Arc<PackedMatrix>>,
}

/// Packs what a plan needs, on `threads` threads.
///
/// # Errors
/// [`LoadError::Resources`] where memory is short, and what [`Weights::tensor`] finds.
pub(crate) fn load(
    graph: &Graph,
    plan: &Plan,
    weights: &Weights,
    threads: usize,
) -> Result<ModelWeights, LoadError> {
    let mut loader = Loader { weights, threads, packed: HashMap::new() };
    Ok(ModelWeights {
        prologue: loader.block(&plan.prologue, "")?,
        layers: graph
            .layers
            .iter()
            .map(|layer| loader.block(&plan.blocks[layer.block], &layer.prefix))
            .collect::<Result<_, _>>()?,
        epilogue: loader.block(&plan.epilogue, "")?,
        pooled: loader.block(&plan.pooled, "")?,
    })
}

impl Loader<'_> {
    fn block(&mut self, program: &Program, prefix: &str) -> Result<BlockWeights, LoadError> {
        let matrices = program.matrices.iter().map(|m| self.matrix(m, prefix)).collect::<Result<_, _>>()?;
        let vectors = program.vectors.iter().map(|v| self.vector(v, prefix)).collect::<Result<_, _>>()?;
        Ok(BlockWeights { matrices, vectors })
    }

    fn matrix(&mut self, used: &MatrixUse, prefix: &str) -> Result<Arc<PackedMatrix>, LoadError> {
        let matrix = &used.matrix;
        let names: Vec<_> = matrix.parts.iter().map(|(n, rows)| (format!("{prefix}{n}"), *rows)).collect();
        let key = (names, matrix.cols, used.order);
        if let Some(packed) = self.packed.get(&key) {
            return Ok(Arc::clone(packed));
        }
        let parts = key.0.iter().map(|(n, _)| self.weights.tensor(n)).collect::<Result<Vec<_>, _>>()?;
        let plain: Vec<_> = parts.iter().map(TensorView::to_plain).collect();
        let sources: Vec<Source<'_>> =
            plain.iter().zip(&key.0).map(|(p, (_, rows))| source(p, *rows)).collect();
        let first = sources.first().map_or(WeightType::F32, |s| s.rows.dtype);
        let dtype = if sources.iter().all(|s| s.rows.dtype == first) { first } else { WeightType::F32 };
        let (rows, cols) = match used.order {
            RowOrder::Plain | RowOrder::Halves => (matrix.rows(), matrix.cols),
            RowOrder::Some { count, .. } => (count, matrix.cols),
            RowOrder::Columns { count, .. } => (matrix.cols, count),
        };
        let mut packed = PackedMatrix::zeroed(dtype, rows, cols).ok_or_else(|| LoadError::Resources {
            what: format!("no memory for the {cols} x {rows} weights `{}`", key.0[0].0),
        })?;
        if let RowOrder::Columns { first, .. } = used.order {
            let bytes = columns(&sources, first, (rows, cols));
            let turned = Source { rows: SourceRows { dtype, bytes: &bytes }, count: rows };
            pack(&mut packed, &[turned], used.order, self.threads);
        } else {
            pack(&mut packed, &sources, used.order, self.threads);
        }
        let packed = Arc::new(packed);
        self.packed.insert(key, Arc::clone(&packed));
        Ok(packed)
    }

    fn vector(&mut self, used: &VectorUse, prefix: &str) -> Result<Arc<[f32]>, LoadError> {
        let len = used.vector.width();
        let plain = used.vector.read(prefix, self.weights)?;
        let mut values: Vec<f32> = (0..len).map(|row| plain[source_row(row, len, used.order)]).collect();
        values.resize(len.next_multiple_of(LANES), 0.0);
        Ok(values.into())
    }
}

struct Source<'a> {
    rows: SourceRows<'a>,
    count: usize,
}

fn source<'a>((dtype, bytes): &'a (DType, Cow<'_, [u8]>), count: usize) -> Source<'a> {
    let dtype = match dtype {
        DType::F16 => WeightType::F16,
        DType::BF16 => WeightType::BF16,
        _ => WeightType::F32,
    };
    Source { rows: SourceRows { dtype, bytes }, count }
}

/// The columns of `cols` rows from `first` on, as `rows` rows.
fn columns(sources: &[Source<'_>], first: usize, (rows, cols): (usize, usize)) -> Vec<u8> {
    let size = sources.first().map_or(0, |s| s.rows.dtype.size_bytes());
    let mut turned = vec![0; rows * cols * size];
    for col in 0..cols {
        let (part, from) = locate(sources, first + col);
        let stored = part.bytes[from * rows * size..][..rows * size].chunks_exact(size);
        let places = turned[col * size..].chunks_mut(cols * size);
        places.zip(stored).for_each(|(to, element)| to[..size].copy_from_slice(element));
    }
    turned
}

/// The source's row that is stored as row `row` of `rows`.
fn source_row(row: usize, rows: usize, order: RowOrder) -> usize {
    match order {
        RowOrder::Plain | RowOrder::Columns { .. } => row,
        RowOrder::Some { first, .. } => first + row,
        RowOrder::Halves => {
            let (panel, lane) = (row / LANES, row % LANES);
            panel / 2 * LANES + lane + panel % 2 * (rows / 2)
        }
    }
}

/// The source that holds a row of all of them, and the row there.
fn locate<'a>(sources: &[Source<'a>], mut row: usize) -> (SourceRows<'a>, usize) {
    for source in sources {
        if row < source.count {
            return (source.rows, row);
        }
        row -= source.count;
    }
    unreachable!("a row beyond all sources")
}

fn pack(packed: &mut PackedMatrix, sources: &[Source<'_>], order: RowOrder, threads: usize) {
    let (rows, cols) = (packed.rows(), packed.cols());
    let runs: Vec<(usize, PanelWriter<'_>)> = packed.panels_mut(RUN_PANELS).enumerate().collect();
    let threads = threads.min(runs.len()).max(1);
    let runs = Mutex::new(runs);
    let work = || {
        loop {
            let run = runs.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((index, mut writer)) = run else { return };
            let first = index * RUN_PANELS;
            for panel in 0..writer.panels() {
                for col in (0..cols).step_by(RUN_COLS) {
                    let lanes = panel * LANES..((panel + 1) * LANES).min(rows - first * LANES);
                    for row in lanes {
                        let (part, from) = locate(sources, source_row(first * LANES + row, rows, order));
                        writer.put(row, part, from, col..(col + RUN_COLS).min(cols));
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
}
