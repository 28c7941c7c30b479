//! From an open checkpoint to a running engine: the backend, the budget of memory, the limits.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use mainstay_backend_api::kv::Group;
use mainstay_backend_api::{Backend, KvDType, KvLayout, Limits, PAGE_TOKENS, pages_max};
use mainstay_backend_candle::CandleBackend;
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_engine::store::Store;
use mainstay_engine::{EngineOptions, Handle, ModelIdentity};
use mainstay_kernels_cpu::Isa;
use mainstay_models::graph::Graph;
use mainstay_models::weights::{DType, RootCheck};
use mainstay_models::{Model, Weights};

use crate::exit::Usage;
use crate::memory::{Memory, MemoryChoice, Need};
use crate::options::{BackendChoice, EngineArgs, KvType};
use crate::progress::Progress;
use crate::source::{Place, Source};
use crate::{data_dir, drafting, machine, quantize, size};

/// Without --context, a model that has no room for so many tokens is not worth its memory.
const CONTEXT_LEAST: usize = 512;
/// The embedded model must not take a newcomer's memory: enough for 64 conversations of 4096 tokens.
const KV_BYTES_EMBEDDED: u64 = 256 << 20;
/// Beside the weights, so that they are not read whole at every start.
const SIDECAR: &str = ".mainstay-weights.json";
/// Weights above this size are read from disk under a progress bar before the backend sees them.
const BAR_BYTES_MIN: u64 = 64 << 20;

/// An engine that takes requests, and what is left of its model: all but the weights.
pub(crate) struct Started {
    pub(crate) handle: Handle,
    pub(crate) model: Model,
    /// Backend and kernel path, for people: `cpu avx512, 2 threads`.
    pub(crate) device: String,
    pub(crate) limits: Limits,
    /// Weights and pages.
    pub(crate) memory_bytes: u64,
}

/// The backend that the options name.
///
/// # Errors
/// [`Usage`] for backends of later versions and kernel paths that this processor lacks.
pub(crate) fn backend(args: &EngineArgs) -> Result<Box<dyn Backend>> {
    match args.backend {
        BackendChoice::Auto | BackendChoice::Cpu => {
            let isa = args.cpu.as_deref().map(Isa::named).transpose().map_err(|e| Usage(e.to_string()))?;
            if args.threads == Some(0) {
                return Err(Usage("--threads: expected at least 1, found 0".into()).into());
            }
            let backend = CpuBackend::new(CpuOptions { threads: args.threads, isa });
            let backend = backend.map_err(|e| Usage(e.to_string()))?;
            Ok(Box::new(if args.takes_adapters { backend.with_adapters() } else { backend }))
        }
        BackendChoice::Candle => Ok(Box::new(CandleBackend::best())),
        BackendChoice::Cuda => Err(Usage("--backend cuda: not in this version (try cpu)".into()).into()),
        BackendChoice::Neuron => Err(Usage("--backend neuron: not in this version (try cpu)".into()).into()),
    }
}

/// Threads that the cpu backend would compute with.
pub(crate) fn threads(args: &EngineArgs) -> usize {
    let options = CpuOptions { threads: args.threads, isa: None };
    CpuBackend::new(options).map_or_else(|_| machine::cores(), |backend| backend.threads())
}

/// What the model takes of the memory.
///
/// # Errors
/// [`Usage`] for a context that the model was not made for.
pub(crate) fn need(model: &Model, args: &EngineArgs, place: &Place) -> Result<Need> {
    let draft = drafting::open(model, args)?;
    let draft_bytes = draft.map_or(0, |draft| draft.graph.weight_bytes(&draft.weights));
    let own_bytes = match args.quant {
        Some(quant) => model.weights.bytes_at_load(quant.into()),
        None => model.graph.weight_bytes(&model.weights),
    };
    let weight_bytes = own_bytes + draft_bytes;
    if model.graph.is_whole() {
        return Ok(Need { weight_bytes, ..Need::default() });
    }
    let context = context(&model.graph, args)?;
    let tokens = if args.context.is_some() { context } else { context.min(CONTEXT_LEAST) };
    let layout = KvLayout::of(&model.graph, kv_dtype(args.kv_type, &model.weights));
    let own_bytes = bytes_alone(&layout, tokens, args.tokens_per_step);
    let kv_bytes = if draft_bytes > 0 { drafting::with_share(own_bytes) } else { own_bytes };
    let (least, most) = match (args.kv_memory, place) {
        (Some(bytes), _) => (bytes, bytes),
        (None, Place::Embedded) => (kv_bytes, KV_BYTES_EMBEDDED),
        (None, Place::Path(_)) => (kv_bytes, u64::MAX),
    };
    Ok(Need { weight_bytes, kv_least: (least, tokens), kv_most: most })
}

/// Loads the only model of this process, from wherever it is, and starts its engine.
///
/// # Errors
/// What the hub or the loader says; [`Usage`] where memory does not hold it.
pub(crate) async fn alone(source: Source, args: EngineArgs, store: Option<Arc<Store>>) -> Result<Started> {
    let (name, place) = (source.name(), source.fetched().await?);
    let model = place.clone().open().await?;
    let memory = Memory::new(MemoryChoice::Auto);
    memory.declare(&name, need(&model, &args, &place)?)?;
    // nothing else is loaded, so that what was declared has room
    let kv_bytes = memory.room(&name).unwrap_or_default();
    let started = tokio::task::spawn_blocking(move || engine(model, &args, kv_bytes, store));
    started.await.context("the loader stopped")?
}

/// Loads the model on its backend, with so much memory for keys and values, and starts the engine's thread. Blocks for
/// as long as that takes.
///
/// # Errors
/// [`Usage`] for limits that cannot be held; otherwise what the backend says.
pub(crate) fn engine(
    mut model: Model,
    args: &EngineArgs,
    kv_bytes: u64,
    store: Option<Arc<Store>>,
) -> Result<Started> {
    let backend = backend(args)?;
    if let Some(quant) = args.quant {
        quantize::at_load(&mut model, quant.into(), threads(args))?;
    }
    let draft = drafting::open(&model, args)?;
    let draft_kv_bytes = if draft.is_some() { kv_bytes / drafting::KV_SHARE } else { 0 };
    let weight_bytes = model.graph.weight_bytes(&model.weights);
    let kv_bytes = kv_bytes - draft_kv_bytes;
    let limits = limits(&model.graph, kv_dtype(args.kv_type, &model.weights), kv_bytes, args)?;
    // Those that were quantized have been read.
    if args.quant.is_none() {
        warm(&model.weights, weight_bytes);
    }
    let mut executor = {
        let _bar = (weight_bytes >= BAR_BYTES_MIN).then(|| Progress::start("preparing weights", 0));
        backend.load(&model.graph, &model.weights, &limits)?
    };
    let draft_bytes = draft.as_ref().map_or(0, |d| d.graph.weight_bytes(&d.weights) + draft_kv_bytes);
    let load_draft = |draft| drafting::load(draft, &*backend, args, draft_kv_bytes);
    let draft = draft.as_ref().map(load_draft).transpose()?;
    let mut options = EngineOptions::new(limits.clone(), args.max_waiting, model.graph.vocab);
    options.pooled_width = model.graph.pooled.as_ref().map(|pooled| pooled.width);
    // A model that keeps no keys and values has nothing to store.
    let store = store.filter(|_| !model.graph.is_whole());
    if store.is_some() {
        options.model = identity(&model, args.verify_weights);
        options.model.probe = mainstay_engine::probe(&mut *executor, &limits, model.graph.vocab)?;
    }
    // The backend has what it needs of them, and unmapped files can be deleted.
    drop(std::mem::take(&mut model.weights));
    options.store = store;
    options.restore = args.restore.into();
    options.draft = args.draft.into();
    let groups = executor.kv_layout().groups.iter().zip(&limits.pages);
    let page_bytes: u64 = groups.map(|(group, pages)| group.page_bytes() as u64 * *pages as u64).sum();
    let handle =
        Handle::start_with(executor, draft, options).context("the engine's thread could not be started")?;
    let class = handle.numeric_class();
    tracing::info!(
        family = model.graph.family,
        weights = size::show(weight_bytes),
        kv = size::show(page_bytes),
        path = class.path,
        ?limits,
        "engine started"
    );
    let memory_bytes = weight_bytes + page_bytes + draft_bytes;
    Ok(Started { handle, device: device_name(&*backend), limits, memory_bytes, model })
}

/// What of the model decides the bytes of its pages.
fn identity(model: &Model, verify: bool) -> ModelIdentity {
    let check = if verify { RootCheck::Verify } else { RootCheck::Trust };
    let origin = model.weights.origin();
    let beside = match origin.is_dir() {
        true => origin.join(SIDECAR),
        false => PathBuf::from(format!("{}{SIDECAR}", origin.display())),
    };
    let mut sidecars = vec![beside];
    // A model's directory may be read-only.
    if let Some(dir) = data_dir::resolve(None) {
        let name = blake3::hash(origin.as_os_str().as_encoded_bytes()).to_hex();
        sidecars.push(dir.join("weights").join(format!("{}.json", &name[..16])));
    }
    ModelIdentity {
        weights: model.weights.cached_root(&sidecars, check, machine::cores()),
        config: model.hashes.config,
        tokenizer: model.hashes.tokenizer,
        template: model.hashes.template,
        ..ModelIdentity::default()
    }
}

/// The backend and what it runs on, for people.
pub(crate) fn device_name(backend: &dyn Backend) -> String {
    let device = backend.device();
    let told = device.name.starts_with(device.backend);
    if told { device.name } else { format!("{} {}", device.backend, device.name) }
}

/// The element type of keys and values; `auto` follows the type that most of the weights' bytes have.
pub(crate) fn kv_dtype(choice: KvType, weights: &Weights) -> KvDType {
    let bytes = |f32s: bool| -> usize {
        let views = weights.names().filter_map(|n| weights.tensor(n).ok());
        views.filter(|t| (t.dtype == DType::F32) == f32s).map(|t| t.stored_bytes()).sum()
    };
    match choice {
        KvType::F32 => KvDType::F32,
        KvType::Bf16 => KvDType::BF16,
        KvType::F16 => KvDType::F16,
        KvType::Q8 => KvDType::Q8,
        KvType::Auto if bytes(true) > bytes(false) => KvDType::F32,
        KvType::Auto => KvDType::BF16,
    }
}

/// The limits that fit the model, the operator's wishes and the memory.
///
/// A context that was not asked for shrinks to what the memory holds; one that was asked for and does not fit is
/// refused.
pub(crate) fn limits(
    graph: &Graph,
    kv_dtype: KvDType,
    kv_bytes: u64,
    args: &EngineArgs,
) -> Result<Limits, Usage> {
    let refuse = |what: String| Err(Usage(what));
    if args.tokens_per_step < args.max_sequences || args.max_sequences == 0 {
        return refuse(format!(
            "--tokens-per-step {} and --max-sequences {}: every sequence needs a token of the step",
            args.tokens_per_step, args.max_sequences
        ));
    }
    if graph.is_whole() {
        return whole_limits(graph, kv_dtype, args);
    }
    let wanted = context(graph, args)?;
    let room = Room {
        layout: KvLayout::of(graph, kv_dtype),
        kv_bytes,
        tokens_per_step: args.tokens_per_step,
        sequences: args.max_sequences,
    };
    let (pages, holds) = room.divide(wanted, args.context.is_some());
    if holds == 0 || (args.context.is_some() && holds < wanted) {
        let context = wanted.max(PAGE_TOKENS);
        let needed = bytes_alone(&room.layout, context, args.tokens_per_step);
        return refuse(format!(
            "--kv-memory: {} hold {holds} tokens; one sequence of {context} tokens needs {}, {} more (or a smaller --context)",
            size::show(kv_bytes),
            size::show(needed),
            size::show(needed.saturating_sub(kv_bytes))
        ));
    }
    Ok(Limits {
        context: wanted.min(holds),
        tokens_per_step: args.tokens_per_step,
        chunks: args.max_sequences,
        output_rows: args.max_sequences,
        pages,
        kv_dtype,
    })
}

/// Memory for keys and values, to be divided among the groups of pages.
struct Room {
    layout: KvLayout,
    kv_bytes: u64,
    tokens_per_step: usize,
    sequences: usize,
}

impl Room {
    /// Pages of each group, and the longest sequence that they hold. Beside groups that keep all, those with a window get
    /// what all sequences need at a time, and the others the rest. Where that were less than half of the memory, or
    /// less than was asked for, windows get what fewer sequences need.
    fn divide(&self, context: usize, is_asked_for: bool) -> (Vec<usize>, usize) {
        for sequences in (1..=self.sequences).rev() {
            let (pages, window_bytes, holds) = self.divide_for(sequences, context);
            let is_fair = window_bytes <= self.kv_bytes / 2 && (holds >= context || !is_asked_for);
            if is_fair || sequences == 1 {
                return (pages, holds);
            }
        }
        (Vec::new(), 0)
    }

    /// As [`Room::divide`], where windows have room for so many sequences; and the bytes of that.
    fn divide_for(&self, sequences: usize, context: usize) -> (Vec<usize>, u64, usize) {
        let groups = || self.layout.groups.iter();
        let keeps_all = groups().any(|group| group.window.is_none());
        let is_main = |group: &Group| group.window.is_none() == keeps_all;
        // One page is never given out, and one is left for each sequence that runs when another starts.
        let window_pages = |group: &Group| sequences * (self.needed(group, context) + 1);
        let window_bytes = groups().filter(|group| !is_main(group));
        let window_bytes = window_bytes.map(|group| (window_pages(group) * group.page_bytes()) as u64).sum();
        let main_bytes: usize = groups().filter(|group| is_main(group)).map(Group::page_bytes).sum();
        let rest = self.kv_bytes.saturating_sub(window_bytes) / main_bytes.max(1) as u64;
        let rest = rest.min(u64::from(u32::MAX)) as usize;
        // More pages than all sequences together can use are memory for nothing but old prefixes: allow twice as many.
        let useful = |group: &Group| 2 * self.sequences * self.needed(group, context) + 1;
        let pages =
            |group: &Group| if is_main(group) { rest.min(useful(group)) } else { window_pages(group) };
        let pages: Vec<usize> = groups().map(pages).collect();
        let holds = groups().zip(&pages).map(|(group, &pages)| {
            let pages = pages.saturating_sub(1);
            if self.needed(group, context) <= pages { context } else { pages * PAGE_TOKENS }
        });
        let holds = holds.min().unwrap_or(0);
        (pages, window_bytes, holds)
    }

    /// Pages of a group that a sequence needs at a time.
    fn needed(&self, group: &Group, context: usize) -> usize {
        pages_max(group.window, context, self.tokens_per_step)
    }
}

/// What the pages of a single sequence take.
fn bytes_alone(layout: &KvLayout, context: usize, tokens_per_step: usize) -> u64 {
    // one page is never given out
    let pages = |group: &Group| pages_max(group.window, context, tokens_per_step) + 1;
    layout.groups.iter().map(|group| (pages(group) * group.page_bytes()) as u64).sum()
}

/// The context that was asked for, else what the model was made for.
pub(crate) fn context(graph: &Graph, args: &EngineArgs) -> Result<usize, Usage> {
    let (wanted, made_for) = (args.context.unwrap_or(graph.context), graph.context);
    if wanted == 0 || wanted > made_for {
        let what = format!("--context {wanted}: expected 1 to {made_for}, what the model was made for");
        return Err(Usage(what));
    }
    Ok(wanted)
}

/// The limits of a model that computes every text whole, in one step, and keeps nothing of it.
fn whole_limits(graph: &Graph, kv_dtype: KvDType, args: &EngineArgs) -> Result<Limits, Usage> {
    let context = context(graph, args)?;
    Ok(Limits {
        context,
        tokens_per_step: args.tokens_per_step.max(context),
        chunks: args.max_sequences,
        output_rows: args.max_sequences,
        pages: Vec::new(),
        kv_dtype,
    })
}

/// Brings mapped weights from disk into memory with a bar that shows how far it is; the backend's own pass over them
/// shows none.
fn warm(weights: &Weights, weight_bytes: u64) {
    if weight_bytes < BAR_BYTES_MIN {
        return;
    }
    const SYSTEM_PAGE_BYTES: usize = 4096;
    let mut progress = Progress::start("reading weights", weight_bytes);
    for bytes in weights.stored_bytes() {
        for piece in bytes.chunks(1 << 24) {
            let touched = piece.iter().step_by(SYSTEM_PAGE_BYTES).fold(0u8, |sum, b| sum.wrapping_add(*b));
            std::hint::black_box(touched);
            progress.advance(piece.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use mainstay_models::graph::{Attend, Block, KvRows, KvSpec, Mask, Op, RopeSwitch};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        engine: EngineArgs,
    }

    fn args(words: &[&str]) -> EngineArgs {
        Command::parse_from(std::iter::once(&"test").chain(words)).engine
    }

    /// A page of f32 takes 2 layers * (K and V) * 4 heads * 8 * 4 bytes * 32 tokens = 16 KiB.
    fn graph() -> Graph {
        Graph {
            family: "test",
            prologue: Block::default(),
            blocks: vec![],
            layers: vec![],
            epilogue: Block::default(),
            pooled: None,
            kv: vec![KvSpec::heads(4, 8, None); 2],
            hidden: 32,
            vocab: 100,
            context: 1000,
            rope_switch: RopeSwitch::default(),
        }
    }

    /// Four layers of which two see 100 tokens: a page of each group takes 16 KiB.
    fn windowed() -> Graph {
        let spec = |window| KvSpec { rows: KvRows::Heads { heads: 4, head_dim: 8 }, window };
        Graph { kv: [None, Some(100), None, Some(100)].map(spec).to_vec(), ..graph() }
    }

    fn plan(kv_bytes: u64, words: &[&str]) -> Result<Limits, String> {
        limits(&graph(), KvDType::F32, kv_bytes, &args(words)).map_err(|e| e.to_string())
    }

    #[test]
    fn pages_follow_memory() {
        let limits = plan(100 << 14, &[]).unwrap();
        assert_eq!((limits.pages, limits.context), (vec![100], 1000));
        let limits = plan(u64::MAX, &["--max-sequences", "10"]).unwrap();
        assert_eq!(limits.pages, vec![2 * 10 * 32 + 1]);
    }

    #[test]
    fn an_open_context_shrinks_and_a_wanted_one_is_refused() {
        assert_eq!(plan(11 << 14, &[]).unwrap().context, 320);
        assert_eq!(plan(11 << 14, &["--context", "320"]).unwrap().context, 320);
        let refused = plan(11 << 14, &["--context", "321"]).unwrap_err();
        assert!(
            refused.contains("320")
                && refused.contains("321")
                && refused.contains("needs 192 KiB, 16.0 KiB more"),
            "{refused}"
        );
        let refused = plan(1 << 14, &[]).unwrap_err();
        assert!(refused.contains("hold 0 tokens"), "{refused}");
    }

    #[test]
    fn windows_get_what_sequences_need_and_the_rest_keeps_all() {
        let words = ["--max-sequences", "10", "--tokens-per-step", "64"];
        let plan = |kv_bytes, more: &[&str]| {
            let words = [&words[..], more].concat();
            limits(&windowed(), KvDType::F32, kv_bytes, &args(&words)).map_err(|e| e.to_string())
        };
        // 100 tokens and a step of 64 lie in 7 pages at most, and one more is for whoever starts.
        let found = plan(400 << 14, &[]).unwrap();
        assert_eq!((found.pages, found.context), (vec![320, 80], 1000));
        assert_eq!(plan(u64::MAX, &[]).unwrap().pages, [2 * 10 * 32 + 1, 80]);
        // Half of 100 pages is what 6 sequences need; of 20 pages, what one needs.
        let found = plan(100 << 14, &[]).unwrap();
        assert_eq!((found.pages, found.context), (vec![52, 48], 1000));
        let found = plan(20 << 14, &[]).unwrap();
        assert_eq!((found.pages, found.context), (vec![12, 8], 352));
        // A context that was asked for goes before sequences.
        let found = plan(45 << 14, &["--context", "1000"]).unwrap();
        assert_eq!((found.pages, found.context), (vec![37, 8], 1000));
        let refused = plan(40 << 14, &["--context", "1000"]).unwrap_err();
        assert!(
            refused.contains("hold 992 tokens") && refused.contains("needs 656 KiB, 16.0 KiB more"),
            "{refused}"
        );
    }

    #[test]
    fn where_every_layer_has_a_window_memory_follows_it() {
        let graph = Graph { kv: windowed().kv[1..2].to_vec(), ..graph() };
        let args = args(&["--max-sequences", "10", "--tokens-per-step", "64"]);
        let plan =
            |kv_bytes| limits(&graph, KvDType::F32, kv_bytes, &args).map_err(|e| e.to_string()).unwrap();
        for (kv_bytes, pages, context) in [(8 << 13, 8, 1000), (7 << 13, 7, 192), (u64::MAX, 141, 1000)] {
            let found = plan(kv_bytes);
            assert_eq!((found.pages, found.context), (vec![pages], context));
        }
    }

    #[test]
    fn a_model_that_keeps_nothing_has_room_for_a_whole_text_in_a_step() {
        let attend = Attend {
            q: 0,
            k: 0,
            v: 0,
            heads: 4,
            kv_heads: 4,
            head_dim: 8,
            scale: 1.0,
            mask: Mask::Full,
            softcap: None,
            sinks: None,
        };
        let block = Block { ops: vec![Op::Input, Op::Attend(attend)] };
        let graph = Graph { blocks: vec![block], kv: vec![], ..graph() };
        let limits =
            |words: &[&str]| super::limits(&graph, KvDType::F32, 0, &args(words)).map_err(|e| e.to_string());
        let found = limits(&[]).unwrap();
        assert_eq!((found.context, found.tokens_per_step, found.pages), (1000, 1000, vec![]));
        let found = limits(&["--context", "100"]).unwrap();
        assert_eq!((found.context, found.tokens_per_step), (100, 256));
        assert!(limits(&["--context", "1001"]).unwrap_err().contains("1000"));
    }

    #[test]
    fn impossible_limits_are_refused_with_numbers() {
        let refused = plan(1 << 24, &["--context", "1001"]).unwrap_err();
        assert!(refused.contains("1001") && refused.contains("1000"), "{refused}");
        let refused = plan(1 << 24, &["--max-sequences", "65", "--tokens-per-step", "64"]).unwrap_err();
        assert!(refused.contains("65") && refused.contains("64"), "{refused}");
    }
}
