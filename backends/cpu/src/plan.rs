//! Graph to calls: which ops become one call, where every value lies, which weights a block needs.

use mainstay_backend_api::Limits;
use mainstay_kernels_cpu::{self as kernels, After, Function, LANES, Pairing};
use mainstay_models::LoadError;
use mainstay_models::adapter::RANK_MAX;
use mainstay_models::graph::{
    self, Activation, Block, Gate, Graph, Ids, Mask, Matrix, Op, PoolKind, Rope, RopeLayout, Value, Vector,
};

use crate::arena::Slot;
use crate::experts::{Mixture, RouteShape};
use crate::latent::LatentHeads;
use crate::place::{Draft, Places};
use crate::products::independent;

/// Index into the matrices or the vectors of a block.
pub(crate) type WeightIndex = usize;

/// A matrix as a block needs it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MatrixUse {
    pub(crate) matrix: Matrix,
    /// How its rows lie in the panels.
    pub(crate) order: RowOrder,
}

/// A vector as a block needs it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct VectorUse {
    pub(crate) vector: Vector,
    pub(crate) order: RowOrder,
}

/// Which of a weight's rows are rows in memory, in what order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RowOrder {
    /// All, as in the graph.
    Plain,
    /// Runs of 16 rows of the first half and of the second half in turn: gate and up, for [`After::Gate`].
    Halves,
    /// Some.
    Some { first: usize, count: usize },
    /// The columns of some are the rows in memory.
    Columns { first: usize, count: usize },
}

/// An element-wise function with a number in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Map {
    Scale(f32),
    Softcap(f32),
    Activate(Function),
}

/// One head's way from a product into attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HeadPath<P> {
    pub(crate) input: P,
    /// Weight and eps of the norm over a head.
    pub(crate) norm: Option<(WeightIndex, f32)>,
    /// Index into [`Plan::ropes`].
    pub(crate) rope: Option<usize>,
}

/// A planned call. `P` is where values are: [`Value`]s first, [`Slot`]s in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Call<P> {
    Embed {
        ids: Ids,
        weight: WeightIndex,
        out: P,
    },
    /// The step's output rows of a value.
    Select {
        input: P,
        out: P,
    },
    /// One row for each pooled sequence.
    Pool {
        kind: PoolKind,
        input: P,
        out: P,
    },
    Copy {
        input: P,
        out: P,
    },
    Linear {
        weight: WeightIndex,
        bias: Option<WeightIndex>,
        input: P,
        after: After,
        out: P,
    },
    Norm {
        weight: WeightIndex,
        eps: f32,
        input: P,
        out: P,
    },
    /// The norm, added to what is there.
    NormAdd {
        weight: WeightIndex,
        eps: f32,
        input: P,
        out: P,
    },
    LayerNorm {
        weight: WeightIndex,
        bias: WeightIndex,
        eps: f32,
        input: P,
        out: P,
    },
    Normalize {
        input: P,
        out: P,
    },
    Add {
        a: P,
        b: P,
        out: P,
    },
    /// In place.
    Map {
        f: Map,
        out: P,
    },
    /// In place.
    Rope {
        rope: usize,
        head_dim: usize,
        out: P,
    },
    Gate {
        f: kernels::Gate,
        input: P,
        out: P,
    },
    /// Norm and rotation of queries into `queries`, of keys into the pages, with the values. None of them is where
    /// [`Call::Attend`] writes, so that both can be one phase.
    Append {
        q: HeadPath<P>,
        k: HeadPath<P>,
        v: P,
        queries: P,
        out: P,
        shape: Heads,
    },
    Attend {
        queries: P,
        out: P,
        shape: Heads,
    },
    /// Experts and weights of every row.
    Route {
        shape: RouteShape,
        scores: P,
        out: P,
    },
    /// What lies between the products of the experts, for every row and each of its experts; rows of one expert are
    /// neighbours.
    ExpertUp {
        mixture: Mixture,
        routes: P,
        input: P,
        out: P,
    },
    /// The experts' results, in the same order.
    ExpertDown {
        mixture: Mixture,
        input: P,
        out: P,
    },
    /// The weighted sum of each row's results.
    ExpertSum {
        mixture: Mixture,
        routes: P,
        input: P,
        out: P,
    },
    /// Each head's columns times a matrix of its own; heads are `input_step` and `out_step` columns apart.
    HeadProducts {
        /// The first of so many matrices as there are heads.
        weight: WeightIndex,
        heads: usize,
        input: P,
        input_step: usize,
        out: P,
        out_step: usize,
    },
    /// Latent rows and rotated keys into the pages, the rotated part of the queries beside their other one.
    AppendLatent {
        q: HeadPath<P>,
        key: HeadPath<P>,
        latent: P,
        queries: P,
        shape: LatentHeads,
    },
    AttendLatent {
        queries: P,
        out: P,
        shape: LatentHeads,
    },
}

/// Sizes of one attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) mask: Mask,
    pub(crate) softcap: Option<f32>,
    /// A score for each query head.
    pub(crate) sinks: Option<WeightIndex>,
}

/// A block, planned.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) calls: Vec<Call<Slot>>,
    pub(crate) matrices: Vec<MatrixUse>,
    pub(crate) vectors: Vec<VectorUse>,
}

/// A graph, planned.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) prologue: Program,
    pub(crate) blocks: Vec<Program>,
    pub(crate) epilogue: Program,
    pub(crate) pooled: Program,
    /// Distinct rotations, and where their angles are, `[tokens, dim]`.
    pub(crate) ropes: Vec<Rope>,
    pub(crate) angles: Vec<Slot>,
    /// Activations on their way into a product, tile by tile.
    pub(crate) packed: Slot,
    /// `[tokens, rank]`: rows on their way through an adapter; no rows where there are none.
    pub(crate) low: Slot,
    /// `[outputs, vocab]`
    pub(crate) logits: Slot,
    /// `[pooled sequences, width]`
    pub(crate) pooled_rows: Slot,
    /// Floats of all slots.
    pub(crate) arena_len: usize,
    /// Most key heads of a layer that keeps nothing; 0 where there is none.
    pub(crate) whole_heads: usize,
    /// Widest head, and most query heads over one key head.
    pub(crate) head_dim: usize,
    pub(crate) group: usize,
    /// Widest latent row and shared key of an attention to such rows.
    pub(crate) latent: (usize, usize),
    /// Most experts, and most of a row.
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    /// Most products of one phase.
    pub(crate) products: usize,
}

/// What may become part of the product before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fusing {
    /// Whatever can.
    All,
    /// In layers, nothing that needs a product whole: adapters are added to it first.
    LeavesProducts,
}

/// Which part of a graph a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Prologue,
    Layer,
    Epilogue,
    Pooled,
}

impl Plan {
    /// Plans a graph that [`Graph::check`] has passed.
    ///
    /// # Errors
    /// [`LoadError::Unsupported`] for an op in a place where this backend cannot run it.
    pub(crate) fn new(graph: &Graph, limits: &Limits, fusing: Fusing) -> Result<Self, LoadError> {
        let mut ropes = Vec::new();
        let mut places = Places::new();
        let hidden = places.fixed(limits.tokens_per_step, graph.hidden);
        let mut packed_len = 0;
        let mut plan_block = |block: &Block, role: Role, places: &mut Places| {
            if block.ops.is_empty() {
                let (calls, matrices, vectors) = Default::default();
                return Ok((Program { calls, matrices, vectors }, places.fixed(0, 0)));
            }
            let widths = block.widths(graph.hidden)?;
            let mut draft = Fuse::new(block, &widths, (role, fusing), &mut ropes).run()?;
            let rows = match role {
                Role::Prologue | Role::Layer => limits.tokens_per_step,
                Role::Epilogue => limits.output_rows,
                Role::Pooled => limits.chunks,
            };
            packed_len = packed_len.max(rows.saturating_mul(draft.packed_width));
            let entry = (role != Role::Prologue).then_some(hidden);
            let exit = matches!(role, Role::Prologue | Role::Layer).then_some(hidden);
            let (calls, result) = places.assign(&mut draft, rows, entry, exit);
            Ok::<_, LoadError>((Program { calls, matrices: draft.matrices, vectors: draft.vectors }, result))
        };
        let (prologue, _) = plan_block(&graph.prologue, Role::Prologue, &mut places)?;
        let mut blocks = Vec::new();
        for block in &graph.blocks {
            blocks.push(plan_block(block, Role::Layer, &mut places)?.0);
        }
        let (epilogue, logits) = plan_block(&graph.epilogue, Role::Epilogue, &mut places)?;
        let none = Block::default();
        let block = graph.pooled.as_ref().map_or(&none, |pooled| &pooled.block);
        let (pooled, pooled_rows) = plan_block(block, Role::Pooled, &mut places)?;
        let packed = places.fixed(1, packed_len);
        let low = match fusing {
            Fusing::All => places.fixed(0, 0),
            Fusing::LeavesProducts => places.fixed(limits.tokens_per_step, RANK_MAX),
        };
        let angles = ropes.iter().map(|r| places.fixed(limits.tokens_per_step, r.dim)).collect();
        let shapes = || blocks.iter().flat_map(|b| &b.calls).filter_map(Call::heads);
        let head_dim = shapes().map(|h| h.head_dim).max().unwrap_or(1);
        let group = shapes().map(|h| h.heads / h.kv_heads).max().unwrap_or(1);
        let whole_heads = shapes().filter(|h| h.mask == Mask::Full).map(|h| h.kv_heads).max().unwrap_or(0);
        let calls = || blocks.iter().flat_map(|b| &b.calls);
        let most = |of: fn(&Call<Slot>) -> usize| calls().map(of).max().unwrap_or(0);
        let programs = blocks.iter().chain([&prologue, &epilogue, &pooled]);
        let starts = programs.flat_map(|p| (0..p.calls.len()).map(|first| &p.calls[first..]));
        let side_by_side = starts.map(independent).max().unwrap_or(0);
        let experts = most(|call| call.mixture().map_or(0, |m| m.count));
        Ok(Self {
            latent: (most(|c| c.latent().map_or(0, |l| l.latent)), most(|c| c.latent().map_or(0, |l| l.key))),
            experts,
            top_k: most(|call| call.mixture().map_or(0, |m| m.top_k)),
            products: most(|call| call.latent().map_or(1, |l| l.heads)).max(experts).max(side_by_side),
            arena_len: places.len(),
            prologue,
            blocks,
            epilogue,
            pooled,
            ropes,
            angles,
            packed,
            low,
            logits,
            pooled_rows,
            whole_heads,
            head_dim,
            group,
        })
    }
}

impl<P: Copy> Call<P> {
    fn mixture(&self) -> Option<Mixture> {
        match self {
            Call::ExpertUp { mixture, .. } => Some(*mixture),
            _ => None,
        }
    }

    fn latent(&self) -> Option<LatentHeads> {
        match self {
            Call::AttendLatent { shape, .. } => Some(*shape),
            _ => None,
        }
    }

    fn heads(&self) -> Option<Heads> {
        match self {
            Call::Attend { shape, .. } => Some(*shape),
            _ => None,
        }
    }

    /// The same call with its values elsewhere; `f` is told whether the call writes the value.
    pub(crate) fn map<Q>(self, mut f: impl FnMut(P, Access) -> Q) -> Call<Q> {
        use Access::{Read, Write};
        match self {
            Call::Embed { ids, weight, out } => Call::Embed { ids, weight, out: f(out, Write) },
            Call::Select { input, out } => Call::Select { input: f(input, Read), out: f(out, Write) },
            Call::Pool { kind, input, out } => Call::Pool { kind, input: f(input, Read), out: f(out, Write) },
            Call::Copy { input, out } => Call::Copy { input: f(input, Read), out: f(out, Write) },
            Call::Linear { weight, bias, input, after, out } => {
                Call::Linear { weight, bias, input: f(input, Read), after, out: f(out, Write) }
            }
            Call::Norm { weight, eps, input, out } => {
                Call::Norm { weight, eps, input: f(input, Read), out: f(out, Write) }
            }
            Call::NormAdd { weight, eps, input, out } => {
                Call::NormAdd { weight, eps, input: f(input, Read), out: f(out, Write) }
            }
            Call::LayerNorm { weight, bias, eps, input, out } => {
                Call::LayerNorm { weight, bias, eps, input: f(input, Read), out: f(out, Write) }
            }
            Call::Normalize { input, out } => Call::Normalize { input: f(input, Read), out: f(out, Write) },
            Call::Add { a, b, out } => Call::Add { a: f(a, Read), b: f(b, Read), out: f(out, Write) },
            Call::Map { f: function, out } => Call::Map { f: function, out: f(out, Write) },
            Call::Rope { rope, head_dim, out } => Call::Rope { rope, head_dim, out: f(out, Write) },
            Call::Gate { f: function, input, out } => {
                Call::Gate { f: function, input: f(input, Read), out: f(out, Write) }
            }
            Call::Append { q, k, v, queries, out, shape } => Call::Append {
                q: HeadPath { input: f(q.input, Read), norm: q.norm, rope: q.rope },
                k: HeadPath { input: f(k.input, Read), norm: k.norm, rope: k.rope },
                v: f(v, Read),
                queries: f(queries, Write),
                out: f(out, Write),
                shape,
            },
            Call::Attend { queries, out, shape } => {
                Call::Attend { queries: f(queries, Read), out: f(out, Write), shape }
            }
            Call::Route { shape, scores, out } => {
                Call::Route { shape, scores: f(scores, Read), out: f(out, Write) }
            }
            Call::ExpertUp { mixture, routes, input, out } => {
                Call::ExpertUp { mixture, routes: f(routes, Read), input: f(input, Read), out: f(out, Write) }
            }
            Call::ExpertDown { mixture, input, out } => {
                Call::ExpertDown { mixture, input: f(input, Read), out: f(out, Write) }
            }
            Call::ExpertSum { mixture, routes, input, out } => Call::ExpertSum {
                mixture,
                routes: f(routes, Read),
                input: f(input, Read),
                out: f(out, Write),
            },
            Call::HeadProducts { weight, heads, input, input_step, out, out_step } => {
                let (input, out) = (f(input, Read), f(out, Write));
                Call::HeadProducts { weight, heads, input, input_step, out, out_step }
            }
            Call::AppendLatent { q, key, latent, queries, shape } => Call::AppendLatent {
                q: HeadPath { input: f(q.input, Read), norm: q.norm, rope: q.rope },
                key: HeadPath { input: f(key.input, Read), norm: key.norm, rope: key.rope },
                latent: f(latent, Read),
                queries: f(queries, Write),
                shape,
            },
            Call::AttendLatent { queries, out, shape } => {
                Call::AttendLatent { queries: f(queries, Read), out: f(out, Write), shape }
            }
        }
    }
}

/// What a call does with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// Turns one block's ops into calls over values.
pub(crate) struct Fuse<'a> {
    ops: &'a [Op],
    role: Role,
    fusing: Fusing,
    ropes: &'a mut Vec<Rope>,
    /// How many ops read a value; the block's result has one reader more.
    readers: Vec<usize>,
    /// Ops that became part of a later call.
    absorbed: Vec<bool>,
    pub(crate) draft: Draft,
}

impl<'a> Fuse<'a> {
    fn new(
        block: &'a Block,
        widths: &[usize],
        (role, fusing): (Role, Fusing),
        ropes: &'a mut Vec<Rope>,
    ) -> Self {
        let ops = &block.ops;
        let mut readers = vec![0; ops.len()];
        ops.iter().flat_map(Op::inputs).for_each(|v| readers[v] += 1);
        if let Some(last) = readers.last_mut() {
            *last += 1;
        }
        Self {
            ops,
            role,
            fusing,
            ropes,
            readers,
            absorbed: vec![false; ops.len()],
            draft: Draft::new(widths),
        }
    }

    fn run(mut self) -> Result<Draft, LoadError> {
        for v in 0..self.ops.len() {
            self.mark(v);
        }
        for v in 0..self.ops.len() {
            if !self.absorbed[v]
                && let Some(call) = self.emit(v)?
            {
                self.draft.calls.push(call);
            }
        }
        Ok(self.draft)
    }

    /// Whether `v` is an op that only one reader needs, so that it may become part of it.
    fn only_for_one(&self, v: Value) -> bool {
        self.readers[v] == 1 && !self.absorbed[v]
    }

    /// Decides what op `v` absorbs.
    fn mark(&mut self, v: Value) {
        let ops = self.ops;
        match &ops[v] {
            Op::Activate { input, .. } if self.is_free_linear(*input) => self.absorbed[*input] = true,
            Op::GatedActivate { input, .. }
                if self.is_free_linear(*input) && halves_in_panels(&ops[*input]) =>
            {
                self.absorbed[*input] = true;
            }
            Op::Add { a, b } => {
                if let Some((addend, _)) = self.residual(v, *a, *b) {
                    self.absorbed[addend] = true;
                }
            }
            Op::AttendLatent(attend) => {
                for (head, width) in
                    [(attend.q, attend.plain_dim + attend.key_dim), (attend.key, attend.key_dim)]
                {
                    let is_last =
                        |rope: &Rope| rope.head_dim == width && rope.first + attend.key_dim >= width;
                    if matches!(&ops[head], Op::Rope { rope, .. } if is_last(rope)) && self.only_for_one(head)
                    {
                        self.absorbed[head] = true;
                    }
                }
            }
            Op::Attend(attend) => {
                for mut head in [attend.q, attend.k] {
                    if matches!(&ops[head], Op::Rope { rope, .. } if rope.head_dim == attend.head_dim)
                        && self.only_for_one(head)
                    {
                        self.absorbed[head] = true;
                        head = ops[head].inputs()[0];
                    }
                    if matches!(&ops[head], Op::RmsNorm { weight, .. } if weight.width() == attend.head_dim)
                        && self.only_for_one(head)
                    {
                        self.absorbed[head] = true;
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether `v` is a product that an element-wise function may become part of.
    fn is_free_linear(&self, v: Value) -> bool {
        let is_whole = self.role == Role::Layer && self.fusing == Fusing::LeavesProducts;
        !is_whole && matches!(self.ops[v], Op::Linear { .. }) && self.only_for_one(v)
    }

    /// For the sum `v`: the product or norm to add, and the value that dies here and takes it.
    fn residual(&self, v: Value, a: Value, b: Value) -> Option<(Value, Value)> {
        if matches!(self.role, Role::Epilogue | Role::Pooled) {
            return None;
        }
        [(b, a), (a, b)].into_iter().find(|&(addend, rest)| {
            let free = matches!(self.ops[addend], Op::Linear { .. } | Op::RmsNorm { .. })
                && self.readers[addend] == 1;
            let own =
                !self.ops[addend].inputs().contains(&rest) && !matches!(self.ops[rest], Op::Slice { .. });
            let sliced = self.ops.iter().any(|op| matches!(op, Op::Slice { input, .. } if *input == rest));
            free && own && !sliced && (v + 1..self.ops.len()).all(|later| !self.may_read(later, rest))
        })
    }

    /// Whether op `reader` reads `v` itself, or through ops that may become part of it.
    fn may_read(&self, reader: Value, v: Value) -> bool {
        self.ops[reader].inputs().into_iter().any(|i| {
            let may_move = matches!(self.ops[i], Op::Linear { .. } | Op::RmsNorm { .. } | Op::Rope { .. });
            i == v || (may_move && self.readers[i] == 1 && self.may_read(i, v))
        })
    }

    /// The last call that computes `v`; `None` where `v` is a view.
    fn emit(&mut self, v: Value) -> Result<Option<Call<Value>>, LoadError> {
        let ops = self.ops;
        let allowed = match &ops[v] {
            Op::Input => self.role != Role::Prologue,
            Op::SelectRows { .. } => self.role == Role::Epilogue,
            Op::Attend(_) | Op::AttendLatent(_) | Op::Experts(_) | Op::Rope { .. } => {
                self.role == Role::Layer
            }
            Op::Embed { .. } => self.role == Role::Prologue,
            // Its other ops have one row for each pooled sequence.
            Op::Pool { input, .. } => self.role == Role::Pooled && matches!(ops[*input], Op::Input),
            op if self.role == Role::Pooled => op.inputs().iter().all(|&i| !matches!(ops[i], Op::Input)),
            _ => true,
        };
        if !allowed {
            let what = format!("{} in the {:?} of a graph", ops[v].name(), self.role).to_lowercase();
            return Err(LoadError::Unsupported { backend: "cpu", what });
        }
        Ok(Some(match &ops[v] {
            Op::Input | Op::SelectRows { .. } | Op::Slice { .. } => {
                self.view(v);
                return Ok(None);
            }
            Op::Embed { ids, weight } => {
                Call::Embed { ids: *ids, weight: self.draft.matrix(weight, RowOrder::Plain), out: v }
            }
            Op::Pool { input, kind } => Call::Pool { kind: *kind, input: *input, out: v },
            Op::LayerNorm { input, weight, bias, eps } => Call::LayerNorm {
                weight: self.draft.vector(weight, RowOrder::Plain),
                bias: self.draft.vector(bias, RowOrder::Plain),
                eps: *eps,
                input: *input,
                out: v,
            },
            Op::Normalize { input } => Call::Normalize { input: *input, out: v },
            Op::Linear { .. } => self.linear(v, v, After::Store),
            Op::RmsNorm { input, weight, eps } => Call::Norm {
                weight: self.draft.vector(weight, RowOrder::Plain),
                eps: *eps,
                input: *input,
                out: v,
            },
            Op::Add { a, b } => match self.absorbed_residual(v, *a, *b) {
                Some((addend, rest)) => {
                    self.draft.alias(v, rest);
                    match &ops[addend] {
                        Op::RmsNorm { input, weight, eps } => {
                            let weight = self.draft.vector(weight, RowOrder::Plain);
                            Call::NormAdd { weight, eps: *eps, input: *input, out: v }
                        }
                        _ => self.linear(addend, v, After::Accumulate),
                    }
                }
                None => Call::Add { a: *a, b: *b, out: v },
            },
            Op::Scale { input, factor } => self.map(v, *input, Map::Scale(*factor)),
            Op::Softcap { input, cap } => self.map(v, *input, Map::Softcap(*cap)),
            Op::Activate { input, f } if self.absorbed[*input] => {
                self.linear(*input, v, After::Activate(function(*f)))
            }
            Op::Activate { input, f } => self.map(v, *input, Map::Activate(function(*f))),
            Op::GatedActivate { input, f } if self.absorbed[*input] => {
                self.linear(*input, v, After::Gate(gate(*f)))
            }
            Op::GatedActivate { input, f } => Call::Gate { f: gate(*f), input: *input, out: v },
            Op::Rope { input, rope } => {
                self.draft.calls.push(Call::Copy { input: *input, out: v });
                Call::Rope { rope: self.rope(rope), head_dim: rope.head_dim, out: v }
            }
            Op::Attend(attend) => self.attend(v, attend),
            Op::AttendLatent(attend) => self.attend_latent(v, attend)?,
            Op::Experts(experts) => self.experts(v, experts)?,
        }))
    }

    /// Makes `v` another look at a value.
    fn view(&mut self, v: Value) {
        match &self.ops[v] {
            Op::SelectRows { input } => self.draft.alias(v, *input),
            Op::Slice { input, start, .. } => self.draft.slice(v, *input, *start),
            _ => self.draft.enter(v, self.role == Role::Epilogue),
        }
    }

    /// Which of a sum's operands was absorbed.
    fn absorbed_residual(&self, v: Value, a: Value, b: Value) -> Option<(Value, Value)> {
        self.residual(v, a, b).filter(|&(addend, _)| self.absorbed[addend])
    }

    /// In the place of its input, where nobody else reads that.
    fn map(&mut self, v: Value, input: Value, f: Map) -> Call<Value> {
        let is_view = matches!(self.ops[input], Op::Input | Op::SelectRows { .. } | Op::Slice { .. });
        if self.readers[input] == 1 && !is_view {
            self.draft.alias(v, input);
        } else {
            self.draft.calls.push(Call::Copy { input, out: v });
        }
        Call::Map { f, out: v }
    }

    fn linear(&mut self, linear: Value, out: Value, after: After) -> Call<Value> {
        let Op::Linear { input, weight, bias } = &self.ops[linear] else {
            unreachable!("op {linear} is a product")
        };
        let order = if matches!(after, After::Gate(_)) { RowOrder::Halves } else { RowOrder::Plain };
        let weight = self.draft.matrix(weight, order);
        let bias = bias.as_ref().map(|b| self.draft.vector(b, order));
        Call::Linear { weight, bias, input: *input, after, out }
    }

    fn rope(&mut self, rope: &Rope) -> usize {
        self.ropes.iter().position(|r| r == rope).unwrap_or_else(|| {
            self.ropes.push(rope.clone());
            self.ropes.len() - 1
        })
    }

    pub(crate) fn head(&mut self, mut v: Value) -> HeadPath<Value> {
        let ops = self.ops;
        let mut path = HeadPath { input: v, norm: None, rope: None };
        if let Op::Rope { input, rope } = &ops[v]
            && self.absorbed[v]
        {
            path.rope = Some(self.rope(rope));
            v = *input;
        }
        if let Op::RmsNorm { input, weight, eps } = &ops[v]
            && self.absorbed[v]
        {
            path.norm = Some((self.draft.vector(weight, RowOrder::Plain), *eps));
            v = *input;
        }
        path.input = v;
        path
    }

    fn attend(&mut self, v: Value, a: &graph::Attend) -> Call<Value> {
        let shape = Heads {
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            scale: a.scale,
            mask: a.mask,
            softcap: a.softcap,
            sinks: a.sinks.as_ref().map(|sinks| self.draft.vector(sinks, RowOrder::Plain)),
        };
        let (q, k) = (self.head(a.q), self.head(a.k));
        let queries = self.draft.extra(a.heads * a.head_dim);
        self.draft.calls.push(Call::Append { q, k, v: a.v, queries, out: v, shape });
        Call::Attend { queries, out: v, shape }
    }
}

/// Whether the halves of a product's rows fill whole panels.
fn halves_in_panels(op: &Op) -> bool {
    matches!(op, Op::Linear { weight, .. } if weight.rows().is_multiple_of(2 * LANES))
}

pub(crate) fn function(f: Activation) -> Function {
    match f {
        Activation::Silu => Function::Silu,
        Activation::GeluTanh => Function::GeluTanh,
        Activation::GeluErf => Function::GeluErf,
        Activation::Relu => Function::Relu,
        Activation::Tanh => Function::Tanh,
        Activation::Sigmoid => Function::Sigmoid,
    }
}

pub(crate) fn gate(f: Gate) -> kernels::Gate {
    match f {
        Gate::By(f) => kernels::Gate::By(function(f)),
        Gate::Clamped { alpha, limit } => kernels::Gate::Clamped { alpha, limit },
    }
}

pub(crate) fn pairing(layout: RopeLayout) -> Pairing {
    match layout {
        RopeLayout::Half => Pairing::Half,
        RopeLayout::Interleaved => Pairing::Interleaved,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
