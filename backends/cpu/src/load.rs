//! Weights from the checkpoint into panels, each matrix once however many blocks name it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use mainstay_kernels_cpu::{
    Integers, Kind, LANES, PackedMatrix, PanelWriter, Reserve, SourceRows, WeightType,
};
use mainstay_models::graph::Graph;
use mainstay_models::quant::Block;
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
    /// Where they lie, in the order in which a step reads them.
    reserve: Reserve,
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
    let mut loader = Loader { weights, threads, packed: HashMap::new(), reserve: Reserve::default() };
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
        let parts = key.0.iter().map(|(n, rows)| Ok((self.weights.tensor(n)?, *rows)));
        let source = Source { parts: parts.collect::<Result<_, LoadError>>()?, order: used.order };
        let (rows, cols) = match used.order {
            RowOrder::Plain | RowOrder::Halves => (matrix.rows(), matrix.cols),
            RowOrder::Some { count, .. } => (count, matrix.cols),
            RowOrder::Columns { count, .. } => (matrix.cols, count),
        };
        let types = source.panel_types(rows, cols);
        let mut packed = PackedMatrix::mixed(&types, (rows, cols), &mut self.reserve).ok_or_else(|| {
            LoadError::Resources {
                what: format!("no memory for the {rows} x {cols} weights `{}`", key.0[0].0),
            }
        })?;
        match used.order {
            RowOrder::Columns { first, .. } => pack_columns(&mut packed, &source, first, self.threads),
            _ => pack_rows(&mut packed, &source, self.threads),
        }
        // What is packed is not read again: memory holds a matrix once.
        key.0.iter().for_each(|(name, _)| self.weights.release(name));
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

/// The tensors that a matrix is stacked from, and how many rows of each.
struct Source<'a> {
    parts: Vec<(TensorView<'a>, usize)>,
    order: RowOrder,
}

impl<'a> Source<'a> {
    /// The tensor and its row that is row `row` of all.
    fn row(&self, mut row: usize) -> (&TensorView<'a>, usize) {
        for (view, count) in &self.parts {
            if row < *count {
                return (view, row);
            }
            row -= count;
        }
        unreachable!("a row beyond all sources")
    }

    /// The tensor and its row that is packed as row `row` of `rows`.
    fn packed_row(&self, row: usize, rows: usize) -> (&TensorView<'a>, usize) {
        self.row(source_row(row, rows, self.order))
    }

    /// How each panel is packed: as it is stored, unless tensors that do not go together meet in one product.
    fn panel_types(&self, rows: usize, cols: usize) -> Vec<WeightType> {
        let of_panel = |panel: usize| match self.order {
            // Blocks lie along rows and cannot be turned.
            RowOrder::Columns { first, .. } => {
                common((first..first + cols).map(|row| weight_type(self.row(row).0.dtype, 1)))
            }
            _ => common(lanes(panel, rows).map(|row| weight_type(self.packed_row(row, rows).0.dtype, cols))),
        };
        let types: Option<Vec<_>> = (0..rows.div_ceil(LANES)).map(of_panel).collect();
        let go_together = |types: &Vec<WeightType>| {
            let integers = types.iter().all(|t| matches!(t, WeightType::Codes(_)));
            integers || types.iter().all(|t| *t == types[0])
        };
        types.filter(go_together).unwrap_or_else(|| vec![WeightType::F32; rows.div_ceil(LANES)])
    }
}

/// The type that all of these are.
fn common(mut types: impl Iterator<Item = WeightType>) -> Option<WeightType> {
    let own = types.next()?;
    types.all(|t| t == own).then_some(own)
}

/// The rows of a panel.
fn lanes(panel: usize, rows: usize) -> Range<usize> {
    panel * LANES..((panel + 1) * LANES).min(rows)
}

/// How weights of a type are packed. All keep their values, but for 8-bit floats under scales, which are rounded to
/// bfloat16.
fn weight_type(dtype: DType, cols: usize) -> WeightType {
    let kind = match dtype {
        DType::F32 => return WeightType::F32,
        DType::F16 => return WeightType::F16,
        DType::BF16 | DType::F8 => return WeightType::BF16,
        DType::Q8_0 => Kind::Eight,
        DType::Int8 => Kind::EightF32,
        DType::Q4_0 => Kind::Four,
        DType::Int4 => Kind::FourZero,
        DType::Q4_1 => Kind::FourMin,
        DType::Q5_0 => Kind::Five,
        DType::Q5_1 => Kind::FiveMin,
        DType::Q2K => Kind::NestedTwoMin,
        DType::Q3K => Kind::NestedThree,
        DType::Q4K => Kind::NestedFourMin,
        DType::Q5K => Kind::NestedFiveMin,
        DType::Q6K => Kind::NestedSix,
        DType::Iq4Nl => Kind::FourUneven,
        DType::Mxfp4 => Kind::FourFloat,
    };
    if cols.is_multiple_of(kind.block_len()) { WeightType::Codes(kind) } else { WeightType::F32 }
}

/// The row of all that is packed as row `row` of `rows`.
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

fn pack_rows(packed: &mut PackedMatrix, source: &Source<'_>, threads: usize) {
    let (rows, cols) = (packed.rows(), packed.cols());
    pack(packed, threads, |writer, panel, own| {
        let own = own.map(|row| source.packed_row(row, rows));
        match writer.dtype(panel) {
            WeightType::Codes(kind) => put_integers(writer, panel, own, (kind, cols)),
            dtype => put_floats(writer, panel, own.map(|(view, row)| line(view, row, dtype)), (dtype, cols)),
        }
    });
}

/// Packs columns of the source's rows, from row `first` on, as rows.
fn pack_columns(packed: &mut PackedMatrix, source: &Source<'_>, first: usize, threads: usize) {
    let (rows, cols) = (packed.rows(), packed.cols());
    let dtype = source.panel_types(rows, cols)[0];
    let size = dtype.panel_bytes(1) / LANES;
    let mut turned = vec![0; rows * cols * size];
    for col in 0..cols {
        let (view, row) = source.row(first + col);
        let elements = line(view, row, dtype);
        let places = turned[col * size..].chunks_mut(cols * size);
        places.zip(elements.chunks_exact(size)).for_each(|(to, element)| to[..size].copy_from_slice(element));
    }
    pack(packed, threads, |writer, panel, own| {
        let lines = own.map(|row| Cow::Borrowed(&turned[row * cols * size..][..cols * size]));
        put_floats(writer, panel, lines, (dtype, cols));
    });
}

/// Has every panel written, by a function of its writer, its number there and its rows.
fn pack(
    packed: &mut PackedMatrix,
    threads: usize,
    put: impl Fn(&mut PanelWriter<'_>, usize, Range<usize>) + Sync,
) {
    let rows = packed.rows();
    let runs: Vec<(usize, PanelWriter<'_>)> = packed.panels_mut(RUN_PANELS).enumerate().collect();
    let threads = threads.min(runs.len()).max(1);
    let runs = Mutex::new(runs);
    let work = || {
        loop {
            let run = runs.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some((index, mut writer)) = run else { return };
            for panel in 0..writer.panels() {
                put(&mut writer, panel, lanes(index * RUN_PANELS + panel, rows));
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

fn put_integers<'a>(
    writer: &mut PanelWriter<'_>,
    panel: usize,
    rows: impl Iterator<Item = (&'a TensorView<'a>, usize)>,
    (kind, cols): (Kind, usize),
) {
    let rows: Vec<_> = rows.collect();
    let len = kind.block_len();
    let mut blocks = [Integers::ZERO; LANES];
    let mut block = Block::default();
    for col in (0..cols).step_by(len) {
        for (to, (view, row)) in blocks.iter_mut().zip(&rows) {
            view.read_block(*row, col / len, &mut block);
            (to.scale, to.minimum, to.scales, to.minima) = (block.d, block.dmin, block.scales, block.mins);
            // Of lengths known here, so that there is no call for each of so many.
            match (to.integers.first_chunk_mut(), block.codes.first_chunk::<32>()) {
                (Some(to), Some(codes)) if len == 32 => *to = *codes,
                _ => to.integers = block.codes,
            }
        }
        writer.put_integers(panel, col, &blocks[..rows.len()]);
    }
}

fn put_floats<'a>(
    writer: &mut PanelWriter<'_>,
    panel: usize,
    lines: impl Iterator<Item = Cow<'a, [u8]>>,
    (dtype, cols): (WeightType, usize),
) {
    let lines: Vec<_> = lines.collect();
    for col in (0..cols).step_by(RUN_COLS) {
        for (lane, bytes) in lines.iter().enumerate() {
            let source = SourceRows { dtype, bytes };
            writer.put(panel * LANES + lane, source, 0, col..(col + RUN_COLS).min(cols));
        }
    }
}

/// A row as bytes of floats of this type.
fn line<'a>(view: &TensorView<'a>, row: usize, dtype: WeightType) -> Cow<'a, [u8]> {
    let as_stored = matches!(
        (view.dtype, dtype),
        (DType::F32, WeightType::F32) | (DType::F16, WeightType::F16) | (DType::BF16, WeightType::BF16)
    );
    if let Some(bytes) = view.row_bytes(row).filter(|_| as_stored) {
        return Cow::Borrowed(bytes);
    }
    let mut values = vec![0.0; view.cols()];
    view.read_row(row, &mut values);
    match dtype {
        WeightType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        WeightType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}
