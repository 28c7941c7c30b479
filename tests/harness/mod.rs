//! Drives an executor with hand-made steps: sequences with their pages, and nothing of the engine.

use mainstay_backend_api::kv::Group;
use mainstay_backend_api::{
    AdapterId, Backend, Chunk, CopyDone, Executor, Invariance, KvDType, KvLayout, Limits, NumericClass,
    OutputRow, PAGE_TOKENS, PageBytes, PageId, PageRead, PageRef, Sampling, Step, StepOutput, StoredPage,
    Ticket, Want, oldest_page,
};
use mainstay_backend_candle::CandleBackend;
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_kernels_cpu::Isa;
use mainstay_models::{Weights, graph::Graph};

/// A backend and what failures call it.
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) backend: Box<dyn Backend>,
}

/// Every backend that must agree; candle, the reference, is the first. The cpu backend stands here once for each
/// instruction set of this machine, each on another number of threads.
pub(crate) fn backends() -> Vec<Named> {
    let mut all = vec![Named { name: "candle".into(), backend: Box::new(CandleBackend::cpu()) }];
    all.extend(Isa::supported().zip(1..).map(|(isa, threads)| cpu(isa, threads)));
    all
}

/// The cpu backend with this instruction set and number of threads.
pub(crate) fn cpu(isa: Isa, threads: usize) -> Named {
    let options = CpuOptions { threads: Some(threads), isa: Some(isa) };
    let backend = CpuBackend::new(options).unwrap_or_else(|e| panic!("{e}"));
    Named { name: format!("cpu/{} on {threads} threads", isa.name()), backend: Box::new(backend) }
}

/// Pages of each group, page 0 not counted.
const PAGES: u32 = 96;
/// Most tokens in one step.
pub(crate) const STEP_TOKENS: usize = 640;

/// A loaded model and its free pages.
pub(crate) struct Rig {
    pub(crate) executor: Box<dyn Executor>,
    /// Free pages by group; the last is taken first.
    free: Vec<Vec<PageId>>,
    windows: Vec<Option<usize>>,
    vocab: usize,
    out: StepOutput,
}

/// One sequence on a [`Rig`].
#[derive(Clone, Default)]
pub(crate) struct Sequence {
    /// Tokens that have keys and values.
    pub(crate) computed: usize,
    /// Which rope table it uses.
    pub(crate) rope_table: usize,
    /// Where the second text of a pair begins.
    pub(crate) second: Option<usize>,
    /// What its chunks are changed by.
    pub(crate) adapter: Option<AdapterId>,
    /// Pages by group; 0 where no later row sees the page.
    tables: Vec<Vec<PageId>>,
}

/// All rows of one chunk.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rows {
    /// Logits of every row.
    pub(crate) logits: Vec<Vec<f32>>,
    /// The greedy token of every row.
    pub(crate) tokens: Vec<u32>,
}

impl Rows {
    /// Puts the rows of a later chunk behind these.
    pub(crate) fn extend(&mut self, later: Rows) {
        self.logits.extend(later.logits);
        self.tokens.extend(later.tokens);
    }
}

impl Rig {
    /// Loads a model.
    pub(crate) fn new(backend: &dyn Backend, graph: &Graph, weights: &Weights, kv_dtype: KvDType) -> Self {
        let layout = mainstay_backend_api::KvLayout::of(graph, kv_dtype);
        let groups = layout.groups.len();
        let limits = Limits {
            context: graph.context,
            tokens_per_step: STEP_TOKENS,
            chunks: 16,
            output_rows: STEP_TOKENS,
            pages: vec![PAGES as usize + 1; groups],
            kv_dtype,
        };
        let name = backend.device().name;
        let executor = backend.load(graph, weights, &limits).unwrap_or_else(|e| panic!("{name}: {e}"));
        let free = vec![(1..=PAGES).rev().map(PageId).collect(); groups];
        let (windows, out) = (layout.windows(), StepOutput::default());
        let mut rig = Self { executor, free, windows, vocab: graph.vocab, out };
        rig.poison(&layout);
        rig
    }

    /// Fills page 0 of each group with bits that are no numbers: whoever reads what stands for no page shows it.
    fn poison(&mut self, layout: &KvLayout) {
        let page = |(group, layout): (usize, &Group)| {
            let bytes = vec![0xff_u8; layout.page_bytes()];
            (PageRef { group: group as u32, page: PageId(0) }, Box::new(bytes) as StoredPage)
        };
        self.executor.start_write(layout.groups.iter().enumerate().map(page).collect(), Ticket(0));
        self.wait(Ticket(0));
    }

    /// Whether equal bits are promised whatever the batch, the chunks and the pages.
    pub(crate) fn is_exact(&self) -> bool {
        self.numeric_class().invariance == Invariance::Full
    }

    /// What decides the bits of its results.
    pub(crate) fn numeric_class(&self) -> NumericClass {
        self.executor.numeric_class()
    }

    /// Gives pages out in another order from now on.
    pub(crate) fn shuffle_pages(&mut self, mut shuffle: impl FnMut(&mut [PageId])) {
        self.free.iter_mut().for_each(|free| shuffle(free));
    }

    /// A new sequence.
    pub(crate) fn open(&self) -> Sequence {
        Sequence { tables: vec![Vec::new(); self.free.len()], ..Sequence::default() }
    }

    /// A new sequence that will have this many tokens.
    pub(crate) fn open_for(&self, len: usize) -> Sequence {
        Sequence { rope_table: self.executor.kv_layout().rope_switch.table(len), ..self.open() }
    }

    /// Gives a sequence's pages back.
    pub(crate) fn close(&mut self, sequence: Sequence) {
        for (free, table) in self.free.iter_mut().zip(sequence.tables) {
            free.extend(table.into_iter().filter(|page| page.0 != 0));
        }
    }

    /// Computes the next tokens of several sequences in one step.
    pub(crate) fn step(&mut self, chunks: &mut [(&mut Sequence, &[u32])]) -> Vec<Rows> {
        self.step_after(Vec::new(), chunks)
    }

    /// As [`Rig::step`], with page copies that the step makes first.
    fn step_after(
        &mut self,
        copies: Vec<(PageRef, PageRef)>,
        chunks: &mut [(&mut Sequence, &[u32])],
    ) -> Vec<Rows> {
        let mut step = Step { copies, return_logits: true, ..Step::default() };
        for (sequence, tokens) in chunks.iter_mut() {
            self.append(&mut step, sequence, tokens);
        }
        self.executor.submit(&step).expect("a step is computed");
        self.executor.finish(&mut self.out).expect("a step is finished");
        assert_eq!(self.out.logits.len(), step.outputs.len() * self.vocab);
        let mut rows = self.out.logits.chunks_exact(self.vocab).zip(&self.out.tokens);
        let mut take = |n: usize| {
            let (logits, tokens) = rows.by_ref().take(n).map(|(l, &t)| (l.to_vec(), t)).unzip();
            Rows { logits, tokens }
        };
        chunks.iter().map(|(_, tokens)| take(tokens.len())).collect()
    }

    /// The one row that each sequence becomes with its next tokens, all in one step.
    pub(crate) fn pool(&mut self, chunks: &mut [(&mut Sequence, &[u32])]) -> Vec<Vec<f32>> {
        let mut step = Step { pooled: (0..chunks.len()).collect(), ..Step::default() };
        for (sequence, tokens) in chunks.iter_mut() {
            self.append(&mut step, sequence, tokens);
        }
        step.outputs.clear();
        self.executor.submit(&step).expect("a step is computed");
        self.executor.finish(&mut self.out).expect("a step is finished");
        let width = self.out.pooled.len() / chunks.len();
        self.out.pooled.chunks_exact(width).map(<[f32]>::to_vec).collect()
    }

    fn append(&mut self, step: &mut Step, sequence: &mut Sequence, tokens: &[u32]) {
        let (start, first_page, position) = (step.tokens.len(), step.page_table.len(), sequence.computed);
        sequence.computed += tokens.len();
        for (table, (free, &window)) in
            sequence.tables.iter_mut().zip(self.free.iter_mut().zip(&self.windows))
        {
            let unseen = oldest_page(window, position).min(table.len());
            table[..unseen].fill(PageId(0));
            while table.len() < sequence.computed.div_ceil(PAGE_TOKENS) {
                table.push(free.pop().expect("tests stay within the pages"));
            }
            step.page_table.extend(&*table);
        }
        step.tokens.extend(tokens);
        step.chunks.push(Chunk {
            tokens: start..step.tokens.len(),
            position,
            pages: first_page..step.page_table.len(),
            rope_table: sequence.rope_table,
            second: sequence.second,
            adapter: sequence.adapter,
        });
        step.outputs.extend((0..tokens.len()).map(|i| OutputRow {
            row: start + i,
            position: position + i + 1,
            want: Want::Sample(Sampling::greedy()),
            top_logprobs: None,
        }));
    }

    /// A sequence's tokens from nothing, `chunk` tokens a step.
    pub(crate) fn prefill(&mut self, sequence: &mut Sequence, tokens: &[u32], chunk: usize) -> Rows {
        let mut rows = Rows::default();
        for part in tokens.chunks(chunk) {
            rows.extend(self.step(&mut [(sequence, part)]).remove(0));
        }
        rows
    }

    /// A sequence with the same contents in pages of its own, copied by the step that computes its next tokens.
    pub(crate) fn fork_and_step(&mut self, parent: &Sequence, tokens: &[u32]) -> (Sequence, Rows) {
        let mut child = parent.clone();
        let mut copies = Vec::new();
        for (group, (table, free)) in child.tables.iter_mut().zip(&mut self.free).enumerate() {
            for page in table.iter_mut().filter(|page| page.0 != 0) {
                let own = free.pop().expect("tests stay within the pages");
                let refer = |page| PageRef { group: group as u32, page };
                copies.push((refer(*page), refer(own)));
                *page = own;
            }
        }
        let rows = self.step_after(copies, &mut [(&mut child, tokens)]).remove(0);
        (child, rows)
    }

    fn pages_of(&self, sequence: &Sequence) -> Vec<PageRef> {
        let tables = sequence.tables.iter().enumerate();
        let page = |(g, t): (usize, &Vec<PageId>)| {
            let held: Vec<PageId> = t.iter().copied().filter(|page| page.0 != 0).collect();
            held.into_iter().map(move |page| PageRef { group: g as u32, page })
        };
        tables.flat_map(page).collect()
    }

    fn wait(&mut self, ticket: Ticket) -> CopyDone {
        let mut done = Vec::new();
        while !done.iter().any(|d: &CopyDone| d.ticket == ticket) {
            self.executor.poll(&mut done);
            std::thread::yield_now();
        }
        assert_eq!(done.len(), 1, "one batch of copies was started");
        let done = done.remove(0);
        done.result.as_ref().expect("pages are copied");
        done
    }

    /// The bytes of the pages that a sequence needs to go on, group by group.
    pub(crate) fn read(&mut self, sequence: &Sequence) -> Vec<PageBytes> {
        let mut needed = sequence.clone();
        for (table, &window) in needed.tables.iter_mut().zip(&self.windows) {
            table[..oldest_page(window, sequence.computed)].fill(PageId(0));
        }
        let pages = self.pages_of(&needed);
        let read = |&page: &PageRef| PageRead { page, tokens: PAGE_TOKENS };
        let reads: Vec<PageRead> = pages.iter().map(read).collect();
        self.executor.start_read(&reads, Ticket(1));
        let bytes = self.wait(Ticket(1)).bytes;
        let layout = self.executor.kv_layout();
        let sizes = pages.iter().map(|p| layout.groups[p.group as usize].page_bytes());
        assert!(bytes.iter().map(|b| b.len()).eq(sizes), "pages have the layout's size");
        bytes
    }

    /// A sequence of this many computed tokens on fresh pages that hold these bytes.
    pub(crate) fn restore(&mut self, computed: usize, rope_table: usize, bytes: Vec<PageBytes>) -> Sequence {
        let count = computed.div_ceil(PAGE_TOKENS);
        let fresh = |(free, &window): (&mut Vec<PageId>, &Option<usize>)| {
            let unseen = oldest_page(window, computed);
            let held = free.split_off(free.len() - (count - unseen));
            [vec![PageId(0); unseen], held].concat()
        };
        let tables = self.free.iter_mut().zip(&self.windows).map(fresh).collect();
        let restored = Sequence { computed, rope_table, tables, ..Sequence::default() };
        let bytes = bytes.into_iter().map(|bytes| Box::new(bytes) as StoredPage);
        let pages: Vec<_> = self.pages_of(&restored).into_iter().zip(bytes).collect();
        let held = restored.tables.iter().flatten().filter(|page| page.0 != 0).count();
        assert_eq!(pages.len(), held, "bytes of every page");
        self.executor.start_write(pages, Ticket(2));
        assert!(self.wait(Ticket(2)).bytes.is_empty(), "a write returns no bytes");
        restored
    }
}

/// The largest difference of two sets of rows, and where.
pub(crate) fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> (f32, usize, usize) {
    assert_eq!(a.len(), b.len(), "rows");
    let mut worst = (0.0, 0, 0);
    for (row, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.len(), b.len(), "width");
        for (column, (a, b)) in a.iter().zip(b).enumerate() {
            let d = (a - b).abs();
            // A NaN must not pass for equal.
            if d > worst.0 || d.is_nan() {
                worst = (if d.is_nan() { f32::INFINITY } else { d }, row, column);
            }
        }
    }
    worst
}

/// Fails unless rows are equal: in every bit for an exact backend, else within the tolerance.
pub(crate) fn assert_same(found: &[Vec<f32>], expected: &[Vec<f32>], rule: Rule, what: &str) {
    let (d, row, column) = difference(found, expected);
    match rule {
        Rule::Bits => {
            let bits =
                |rows: &[Vec<f32>]| -> Vec<u32> { rows.iter().flatten().map(|l| l.to_bits()).collect() };
            assert!(bits(found) == bits(expected), "{what}: not the same bits, {d:e} at [{row}][{column}]");
        }
        Rule::Within(tolerance) => {
            assert!(d <= tolerance, "{what}: {d:e} at [{row}][{column}], tolerance {tolerance:e}");
        }
    }
}

/// How equal two results must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// Every bit.
    Bits,
    /// Absolute difference of every logit.
    Within(f32),
}

impl Rule {
    /// Bits for a backend that promises them, else a tolerance.
    pub(crate) fn of(rig: &Rig, tolerance: f32) -> Self {
        if rig.is_exact() { Rule::Bits } else { Rule::Within(tolerance) }
    }
}
