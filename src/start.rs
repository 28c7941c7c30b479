//! From an open checkpoint to a running engine: the backend, the budget of memory, the limits.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use mainstay_backend_api::{Backend, KvDType, KvLayout, Limits, PAGE_TOKENS};
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

/// An engine that takes requests, and what is left of its model.
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
    let page_bytes: usize = layout.groups.iter().map(|g| g.page_bytes()).sum();
    // one page is never given out
    let own_bytes = ((tokens.div_ceil(PAGE_TOKENS) + 1) * page_bytes) as u64;
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
    warm(&model.weights, weight_bytes);
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
    let layout = KvLayout::of(graph, kv_dtype);
    let page_bytes: usize = layout.groups.iter().map(|g| g.page_bytes()).sum();
    // one page is never given out
    let pages = (kv_bytes / page_bytes.max(1) as u64).min(u64::from(u32::MAX)) as usize;
    let holds = pages.saturating_sub(1) * PAGE_TOKENS;
    let wanted = context(graph, args)?;
    if holds == 0 || (args.context.is_some() && holds < wanted) {
        let context = wanted.max(PAGE_TOKENS);
        let needed = ((context.div_ceil(PAGE_TOKENS) + 1) * page_bytes) as u64;
        return refuse(format!(
            "--kv-memory: {} hold {holds} tokens; one sequence of {context} tokens needs {} (or a smaller --context)",
            size::show(kv_bytes),
            size::show(needed)
        ));
    }
    // more pages than all sequences together can use are memory for nothing but old prefixes: allow twice as many
    let useful = 2 * args.max_sequences * wanted.div_ceil(PAGE_TOKENS) + 1;
    Ok(Limits {
        context: wanted.min(holds),
        tokens_per_step: args.tokens_per_step,
        chunks: args.max_sequences,
        output_rows: args.max_sequences,
        pages: vec![pages.min(useful); layout.groups.len()],
        kv_dtype,
    })
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
    use mainstay_models::graph::{Attend, Block, KvSpec, Mask, Op, RopeSwitch};

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
            refused.contains("320") && refused.contains("321") && refused.contains("192 KiB"),
            "{refused}"
        );
        let refused = plan(1 << 14, &[]).unwrap_err();
        assert!(refused.contains("hold 0 tokens"), "{refused}");
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
