//! A Hugging Face checkpoint as a GGUF file: names, order of rows, metadata. The caller does the work of encoding, in as
//! many threads as it likes.

mod config;
mod entries;
mod tokens;

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use super::mix::{self, Mix};
use super::names;
use super::read::TYPES;
use crate::LoadError;
use crate::config::Config;
use crate::families;
use crate::graph::{Attend, Graph, Op};
use crate::quant::encode_row;
use crate::sentence;
use crate::weights::{DType, Weights};
use entries::Entries;

/// Bytes that tensors are aligned to.
const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;

/// A file that is about to be written: its header, then its tensors in order.
pub struct Plan {
    weights: Weights,
    header: Vec<u8>,
    tensors: Vec<Planned>,
}

/// One tensor of the file.
#[derive(Clone, Debug)]
pub struct Planned {
    /// As GGUF calls it.
    pub name: String,
    /// How it is stored.
    pub dtype: DType,
    /// Rows of all that is stacked in it.
    pub rows: usize,
    /// Numbers in a row.
    pub cols: usize,
    /// Outermost first.
    shape: Vec<usize>,
    sources: Vec<Source>,
}

#[derive(Clone, Debug)]
enum Source {
    /// A tensor of the checkpoint.
    Stored {
        name: String,
        rows: usize,
        /// Rows of a head whose halves are put side by side.
        head_rows: Option<usize>,
        /// Added to every number.
        offset: f32,
    },
    /// Numbers that are no weights there.
    Numbers(Vec<f32>),
}

impl Planned {
    /// Bytes of some of its rows.
    pub fn row_bytes(&self, rows: usize) -> usize {
        self.dtype.row_bytes(self.cols).map_or(0, |bytes| bytes * rows)
    }

    /// Bytes of all of it, up to where the next begins.
    pub fn padded_bytes(&self) -> usize {
        self.row_bytes(self.rows).next_multiple_of(ALIGNMENT)
    }
}

impl Plan {
    /// Plans the file of a directory in the Hugging Face layout.
    ///
    /// # Errors
    /// [`LoadError`] as for opening it, and where GGUF has no way to say something of it.
    pub fn new(dir: &Path, mix: Mix) -> Result<Self, LoadError> {
        let config = Config::open(dir)?;
        let graph = families::graph(&config)?;
        let mut weights = Weights::open_dir(dir)?;
        weights.define_quantized(&config)?;
        graph.check(&weights)?;
        let described = config::Described::new(&config, &graph)?;
        let mut entries = Entries::default();
        described.write(&mut entries, dir, mix)?;
        let mut pooled = graph.clone();
        sentence::apply(dir, &mut pooled)?;
        described.write_pooling(&mut entries, &pooled);
        tokens::write(&mut entries, dir, &config, graph.vocab)?;
        let mut plan = Self { weights, header: Vec::new(), tensors: Vec::new() };
        plan.add_tensors(&described, &graph)?;
        plan.choose(&described, mix);
        plan.header = plan.finish(entries);
        Ok(plan)
    }

    /// The bytes before the tensors.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> &[Planned] {
        &self.tensors
    }

    /// Encodes some rows of a tensor.
    ///
    /// # Errors
    /// [`LoadError::Format`] where a number is not finite.
    ///
    /// # Panics
    /// If `out` has another length than these rows.
    pub fn encode(&self, tensor: &Planned, rows: Range<usize>, out: &mut [u8]) -> Result<(), LoadError> {
        let row_bytes = tensor.row_bytes(1);
        assert_eq!(out.len(), row_bytes * rows.len(), "bytes of rows {rows:?} of {}", tensor.name);
        let mut row = vec![0.0; tensor.cols];
        for (at, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
            self.read_row(tensor, at, &mut row)?;
            if let Some(found) = row.iter().find(|x| !x.is_finite()) {
                let what = format!("tensor `{}`: expected finite numbers, found {found}", tensor.name);
                return Err(LoadError::format(self.weights.origin(), what));
            }
            encode_row(tensor.dtype, &row, out);
        }
        Ok(())
    }

    fn read_row(&self, tensor: &Planned, mut at: usize, row: &mut [f32]) -> Result<(), LoadError> {
        for source in &tensor.sources {
            match source {
                Source::Numbers(numbers) => {
                    row.copy_from_slice(&numbers[at * row.len()..][..row.len()]);
                    return Ok(());
                }
                Source::Stored { name, rows, head_rows, offset } if at < *rows => {
                    if let Some(head_rows) = head_rows {
                        let (in_head, half) = (at % head_rows, head_rows / 2);
                        at = at - in_head + in_head / 2 + in_head % 2 * half;
                    }
                    let view = self.weights.tensor(name)?;
                    match view.cols() == row.len() {
                        true => view.read_row(at, row),
                        // a vector is one row here, and one of each number there
                        false => view.read_f32(row),
                    }
                    row.iter_mut().for_each(|x| *x += offset);
                    return Ok(());
                }
                Source::Stored { rows, .. } => at -= rows,
            }
        }
        unreachable!("row {at} beyond the sources of {}", tensor.name)
    }

    fn add_tensors(&mut self, described: &config::Described<'_>, graph: &Graph) -> Result<(), LoadError> {
        let stored: HashSet<String> = self.weights.names().map(str::to_owned).collect();
        let mut used = HashSet::new();
        for name in names::candidates(described.architecture, graph.layers.len()) {
            let Some(own) = names::hugging_face(described.architecture, &name) else { continue };
            let own = described.stored_name(&own);
            if own == "lm_head.weight" && described.tied {
                continue;
            }
            if stored.contains(&own) {
                self.add(described, name, std::slice::from_ref(&own), None)?;
                used.insert(own);
            }
        }
        for (name, experts) in names::expert_stacks(graph.layers.len()) {
            let sources: Vec<String> =
                (0..).map(experts).take_while(|n| self.weights.tensor(n).is_ok()).collect();
            if !sources.is_empty() {
                self.add(described, name, &sources, Some(sources.len()))?;
                used.extend(sources);
            }
        }
        let unused = |name: &&str| {
            let ignored = [
                "rotary_emb.inv_freq",
                "position_ids",
                "lm_head.weight",
                "pooler.dense.weight",
                "pooler.dense.bias",
            ];
            !used.contains(*name)
                && !name.starts_with("cls.")
                && !ignored.iter().any(|end| name.ends_with(end))
        };
        if let Some(name) = stored.iter().map(String::as_str).filter(unused).min() {
            let what = format!("expected tensors that GGUF has names for, found `{name}`");
            return Err(LoadError::format(self.weights.origin(), what));
        }
        for (name, numbers) in &described.factors {
            let (cols, shape) = (numbers.len(), vec![numbers.len()]);
            let sources = vec![Source::Numbers(numbers.clone())];
            let name = (*name).to_owned();
            self.tensors.push(Planned { name, dtype: DType::F32, rows: 1, cols, shape, sources });
        }
        Ok(())
    }

    fn add(
        &mut self,
        described: &config::Described<'_>,
        name: String,
        sources: &[String],
        stacked: Option<usize>,
    ) -> Result<(), LoadError> {
        let view = self.weights.tensor(&sources[0])?;
        let shape: Vec<usize> = stacked.into_iter().chain(view.shape.iter().copied()).collect();
        // Rows as GGUF counts them: the last dimension is one, also of a vector.
        let cols = view.shape.last().copied().unwrap_or(1);
        let rows = view.len().checked_div(cols).unwrap_or(0);
        let head_rows = described.head_rows(&name, view.shape.first().copied().unwrap_or(1));
        let offset = if name.ends_with("_norm.weight") { described.norm_offset } else { 0.0 };
        let mut planned = Vec::with_capacity(sources.len());
        for source in sources {
            self.weights.expect(source, view.shape)?;
            planned.push(Source::Stored { name: source.clone(), rows, head_rows, offset });
        }
        if head_rows.is_some() && view.shape.len() == 1 {
            // A vector in another order is few numbers: they are put in order here.
            let (mut numbers, len) = (vec![0.0; view.len()], head_rows.unwrap_or(1));
            view.read_f32(&mut numbers);
            let half = len / 2;
            let order = |at: usize| at - at % len + at % len / 2 + at % len % 2 * half;
            planned = vec![Source::Numbers((0..numbers.len()).map(|at| numbers[order(at)]).collect())];
        }
        let rows = rows * sources.len();
        self.tensors.push(Planned { name, dtype: view.dtype, rows, cols, shape, sources: planned });
        Ok(())
    }

    fn choose(&mut self, described: &config::Described<'_>, mix: Mix) {
        for tensor in &mut self.tensors {
            let seen = mix::Tensor {
                name: &tensor.name,
                rank: tensor.shape.len(),
                cols: tensor.cols,
                from: tensor.dtype,
            };
            tensor.dtype = mix.dtype(&seen, &described.shape);
        }
    }

    fn finish(&self, entries: Entries) -> Vec<u8> {
        let mut header = b"GGUF".to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend(entries.count().to_le_bytes());
        header.extend(entries.bytes());
        let mut offset = 0u64;
        for tensor in &self.tensors {
            entries::text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&n| header.extend((n as u64).to_le_bytes()));
            let number = TYPES.iter().find(|(.., dtype)| *dtype == tensor.dtype).map_or(0, |(n, ..)| *n);
            header.extend(number.to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += tensor.padded_bytes() as u64;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        header
    }
}

/// The attention of a graph's first layer.
fn attention(graph: &Graph) -> Option<&Attend> {
    graph.blocks.iter().flat_map(|b| &b.ops).find_map(|op| match op {
        Op::Attend(attend) => Some(attend),
        _ => None,
    })
}
