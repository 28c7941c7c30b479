//! What decides the bytes of stored pages besides their tokens: the model, how keys and values lie, who computes.

use mainstay_backend_api::{
    Chunk, Executor, Invariance, KvDType, KvLayout, Limits, NumericClass, OutputRow, PAGE_TOKENS, PageId,
    PageRead, PageRef, Sampling, Step, StepError, StepOutput, Ticket, Want,
};
use mainstay_models::graph::RopeSwitch;
use mainstay_store::{ClassId, Content, ContentId};

use crate::Adapter;

/// What of a loaded model decides the bytes of its pages, as hashes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelIdentity {
    /// Merkle root over the bytes of all weights.
    pub weights: [u8; 32],
    /// The program that the configuration makes.
    pub config: [u8; 32],
    /// The tokenizer's file.
    pub tokenizer: [u8; 32],
    /// The chat template's source.
    pub template: [u8; 32],
    /// What [`probe`] found on the executor.
    pub probe: [u8; 32],
}

/// The identity of an engine's pages. What it is made of is kept by name, so that a session whose pages have gone
/// cold can be told why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// By the rope table that a sequence's keys are turned by.
    pub(crate) contents: [ContentId; 2],
    pub(crate) rope_switch: RopeSwitch,
    pub(crate) class: ClassId,
    parts: Vec<(&'static str, String)>,
}

impl Identity {
    pub(crate) fn of(model: &ModelIdentity, layout: &KvLayout, class: &NumericClass) -> Self {
        let kv_dtype = layout.groups.first().and_then(|g| g.parts.first()).map(|p| p.dtype);
        let kv_dtype = kv_dtype.unwrap_or(KvDType::F32).name();
        let payload_layout = layout_bytes(layout);
        let mut config = blake3::Hasher::new_derive_key("mainstay model 1");
        for part in [&model.config, &model.tokenizer, &model.template] {
            config.update(part);
        }
        let mut long = config.clone();
        long.update(b"rope table 1");
        let contents = [config, long].map(|config| {
            ContentId::of(&Content {
                weights_root: model.weights,
                config_hash: *config.finalize().as_bytes(),
                kv_dtype,
                kv_scales_hash: [0; 32],
                payload_layout: &payload_layout,
            })
        });
        let invariance: &[u8] = match class.invariance {
            Invariance::Full => b"full",
            Invariance::None => b"none",
        };
        let class = ClassId::of(&[
            ("path", class.path.as_bytes()),
            ("sources", class.sources.as_bytes()),
            ("probe", &model.probe),
            ("parallel", b"1"),
            ("invariance", invariance),
        ]);
        let parts = vec![
            ("weights", short(&model.weights)),
            ("config", short(&model.config)),
            ("tokenizer", short(&model.tokenizer)),
            ("template", short(&model.template)),
            ("kv_type", kv_dtype.to_owned()),
            ("layout", short(blake3::hash(&payload_layout).as_bytes())),
            ("numeric_class", short(&class.0)),
        ];
        Self { contents, rope_switch: layout.rope_switch, class, parts }
    }

    /// What it is made of: names and values, for people and for comparing.
    pub fn parts(&self) -> &[(&'static str, String)] {
        &self.parts
    }

    /// The same of what is computed under an adapter.
    pub fn under(&self, adapter: &Adapter) -> Self {
        let mut own = self.clone();
        own.parts.push(("adapter", short(&adapter.hash())));
        own
    }

    /// Which rope table a session of this many tokens turns by: that by which its last one was drawn, which itself need
    /// not have been computed.
    pub(crate) fn rope_table(&self, session_len: usize) -> usize {
        self.rope_switch.table(session_len.saturating_sub(1))
    }

    /// The name of the first part that is not what `earlier` says it was.
    pub fn changed<'a>(&self, earlier: impl Fn(&str) -> Option<&'a str>) -> Option<&'static str> {
        self.parts.iter().find(|(name, value)| earlier(name) != Some(value)).map(|(name, _)| *name)
    }
}

/// A hash for people, and for comparing.
fn short(hash: &[u8; 32]) -> String {
    hash[..8].iter().map(|b| format!("{b:02x}")).collect()
}

/// The layout of a payload in bytes; every list is preceded by its length, so that no two layouts give the same.
fn layout_bytes(layout: &KvLayout) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut number = |n: usize| bytes.extend((n as u64).to_le_bytes());
    number(PAGE_TOKENS);
    number(layout.groups.len());
    for group in &layout.groups {
        number(group.layers.len());
        group.layers.iter().for_each(|&l| number(l));
        number(group.parts.len());
        for part in &group.parts {
            // What a row is: heads and latent rows may have the same sizes.
            number(part.name.len());
            part.name.bytes().for_each(|byte| number(usize::from(byte)));
            number(part.rows);
            number(part.width);
            number(match part.dtype {
                KvDType::F32 => 0,
                KvDType::BF16 => 1,
                KvDType::F16 => 2,
                KvDType::Q8 => 3,
            });
        }
    }
    bytes
}

/// Tokens of the probe.
const PROBE_TOKENS: usize = 4;

/// Runs a fixed step through the loaded kernels and hashes the logits, keys and values that it gives. Pages of two
/// machines are taken for each other's only where this agrees too. Call it before an engine owns the executor.
///
/// # Errors
/// [`StepError`] if the device failed.
pub fn probe(executor: &mut dyn Executor, limits: &Limits, vocab: usize) -> Result<[u8; 32], StepError> {
    let len = PROBE_TOKENS.min(limits.tokens_per_step).min(limits.context).max(1);
    let groups = limits.pages.len();
    let want = Want::Sample(Sampling::greedy());
    let step = Step {
        tokens: (0..len).map(|i| (i * vocab / (len + 1)) as u32).collect(),
        chunks: vec![Chunk {
            tokens: 0..len,
            position: 0,
            pages: 0..groups,
            rope_table: 0,
            second: None,
            adapter: None,
        }],
        page_table: vec![PageId(1); groups],
        outputs: vec![OutputRow { row: len - 1, position: len, want, top_logprobs: None }],
        return_logits: true,
        ..Step::default()
    };
    let mut out = StepOutput::default();
    executor.submit(&step)?;
    executor.finish(&mut out)?;
    let mut hasher = blake3::Hasher::new_derive_key("mainstay probe 1");
    out.logits.iter().for_each(|logit| {
        hasher.update(&logit.to_bits().to_le_bytes());
    });
    let read = |group| PageRead { page: PageRef { group: group as u32, page: PageId(1) }, tokens: len };
    let pages: Vec<PageRead> = (0..groups).map(read).collect();
    executor.start_read(&pages, Ticket(u64::MAX));
    let mut done = Vec::new();
    while done.is_empty() {
        executor.poll(&mut done);
        std::thread::yield_now();
    }
    for copy in done {
        copy.result?;
        copy.digests.iter().for_each(|digest| {
            hasher.update(digest);
        });
    }
    Ok(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_backend_api::echo::EchoExecutor;
    use mainstay_backend_api::kv::{Group, Part};

    fn layout(dtype: KvDType) -> KvLayout {
        let part = |name| Part { name, rows: 2, width: 8, dtype };
        let group = Group { layers: vec![0, 1], window: None, parts: vec![part("k"), part("v")] };
        KvLayout { groups: vec![group], rope_switch: RopeSwitch::default() }
    }

    fn class(path: &str, sources: &'static str) -> NumericClass {
        NumericClass { path: path.to_owned(), sources, invariance: Invariance::Full }
    }

    #[test]
    fn every_part_changes_the_identity_and_is_named() {
        let model = ModelIdentity::default();
        let base = Identity::of(&model, &layout(KvDType::F32), &class("cpu/a", "1"));
        let of = |model: ModelIdentity| Identity::of(&model, &layout(KvDType::F32), &class("cpu/a", "1"));
        let mut latent = layout(KvDType::F32);
        let names = ["latent", "key"];
        latent.groups[0].parts.iter_mut().zip(names).for_each(|(part, name)| part.name = name);
        let others = [
            ("weights", of(ModelIdentity { weights: [1; 32], ..model.clone() })),
            ("config", of(ModelIdentity { config: [1; 32], ..model.clone() })),
            ("tokenizer", of(ModelIdentity { tokenizer: [1; 32], ..model.clone() })),
            ("template", of(ModelIdentity { template: [1; 32], ..model.clone() })),
            ("kv_type", Identity::of(&model, &layout(KvDType::BF16), &class("cpu/a", "1"))),
            ("layout", Identity::of(&model, &latent, &class("cpu/a", "1"))),
            ("numeric_class", of(ModelIdentity { probe: [1; 32], ..model.clone() })),
            ("numeric_class", Identity::of(&model, &layout(KvDType::F32), &class("cpu/b", "1"))),
            ("numeric_class", Identity::of(&model, &layout(KvDType::F32), &class("cpu/a", "2"))),
        ];
        for (name, other) in others {
            let value = |n: &str| base.parts.iter().find(|(name, _)| *name == n).map(|(_, v)| v.as_str());
            assert_eq!(other.changed(value), Some(name));
            assert_eq!(other.class != base.class, name == "numeric_class", "{name}");
            assert_eq!(other.contents[0] != base.contents[0], name != "numeric_class", "{name}");
            assert_eq!(base.changed(value), None);
            assert_ne!(other.contents[0], other.contents[1], "pages of one table are not those of the other");
        }
    }

    #[test]
    fn the_probe_is_the_same_for_the_same_executor_and_differs_for_another() {
        let limits = Limits {
            context: 64,
            tokens_per_step: 8,
            chunks: 1,
            output_rows: 1,
            pages: vec![3, 3],
            kv_dtype: KvDType::F32,
        };
        let probe = |vocab| probe(&mut EchoExecutor::new(vocab, limits.clone()), &limits, 40).unwrap();
        assert_eq!(probe(40), probe(40));
        assert_ne!(probe(40), probe(41), "the logits are of another number");
    }
}
