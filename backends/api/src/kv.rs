//! How keys and values lie in pages: described from the graph, never assumed.

use mainstay_models::graph::{Graph, KvRows, RopeSwitch};

/// Tokens in a page, on every backend.
pub const PAGE_TOKENS: usize = 32;

/// A page's number inside its group. Number 0 is never given out: padding points at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PageId(pub u32);

/// A page of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRef {
    /// Index into [`KvLayout::groups`].
    pub group: u32,
    /// The page.
    pub page: PageId,
}

/// A page to copy out of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRead {
    /// The page.
    pub page: PageRef,
    /// How many of its tokens count. Slots from there on are zeros in the copy: what lies in them may be another's.
    pub tokens: usize,
}

/// BLAKE3 of a page's payload, made where the payload is made: a copy that went wrong on its way is known by it.
pub type PageDigest = [u8; 32];

/// The digest of a payload in this process's memory.
pub fn digest(payload: &[u8]) -> PageDigest {
    *blake3::hash(payload).as_bytes()
}

/// Names one batch of page copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// The payload of one page in the order of [`Group`].
pub type PageBytes = Box<[u8]>;

/// A payload on its way to a device, in whatever memory it was read into: a page is megabytes, and is not copied on the
/// way.
pub type StoredPage = Box<dyn AsRef<[u8]> + Send + Sync>;

/// A finished batch of page copies.
#[derive(Debug)]
pub struct CopyDone {
    /// The batch.
    pub ticket: Ticket,
    /// The pages that were read, in the order asked for; empty after a write.
    pub bytes: Vec<PageBytes>,
    /// Their digests.
    pub digests: Vec<PageDigest>,
    /// Whether the device did it.
    pub result: Result<(), crate::StepError>,
}

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDType {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest even when stored.
    BF16,
    /// 2 bytes, IEEE 754 half, rounded to nearest even when stored.
    F16,
    /// 1 byte: a code `c` of -127 to 127 for `c * scale`, where the scale is of the row, 1/127 of its largest magnitude.
    /// Scales are parts of their own, in f32, behind the others.
    Q8,
}

impl KvDType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::BF16 | KvDType::F16 => 2,
            KvDType::Q8 => 1,
        }
    }

    /// Its name in options and identities.
    pub fn name(self) -> &'static str {
        match self {
            KvDType::F32 => "f32",
            KvDType::BF16 => "bf16",
            KvDType::F16 => "f16",
            KvDType::Q8 => "q8",
        }
    }
}

/// One kind of row that a layer keeps per token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `k` and `v`, or `latent` and `key`; their scales are called the same.
    pub name: &'static str,
    /// Heads.
    pub rows: usize,
    /// Elements of a head.
    pub width: usize,
    /// Element type.
    pub dtype: KvDType,
}

/// Layers whose pages are given out together. The payload of a page is `[layer][part][row][token][width]`,
/// little-endian; slots of tokens not yet computed are unspecified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Layer indices, ascending.
    pub layers: Vec<usize>,
    /// How many positions back a token sees in these layers, itself included; `None` where it sees all.
    pub window: Option<usize>,
    /// What each layer keeps; equal for all layers of a group.
    pub parts: Vec<Part>,
}

/// Index of the oldest page that the token at a position sees through a window. No later token sees one before it.
pub fn oldest_page(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window) / PAGE_TOKENS)
}

/// The most pages of a group that a sequence of at most `context` tokens needs at a time, where it computes at most
/// `tokens_per_step` in a step.
pub fn pages_max(window: Option<usize>, context: usize, tokens_per_step: usize) -> usize {
    let whole = context.div_ceil(PAGE_TOKENS);
    let Some(window) = window else { return whole };
    // What the first token of a step sees, and all tokens of the step; where the oldest is the last of its page.
    let seen = window.saturating_add(tokens_per_step) - 1;
    whole.min((seen - 1).div_ceil(PAGE_TOKENS) + 1)
}

impl Group {
    /// Bytes of one layer in a page.
    pub fn layer_bytes(&self) -> usize {
        self.parts.iter().map(|p| p.rows * p.width * p.dtype.size_bytes() * PAGE_TOKENS).sum()
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.layer_bytes() * self.layers.len()
    }

    /// Puts zeros in the slots of a payload from `tokens` on.
    pub fn clear_from(&self, tokens: usize, payload: &mut [u8]) {
        let mut rest = payload;
        for _ in &self.layers {
            for part in &self.parts {
                let row_bytes = part.width * part.dtype.size_bytes();
                for _ in 0..part.rows {
                    let (row, after) = rest.split_at_mut(row_bytes * PAGE_TOKENS);
                    row[row_bytes * tokens.min(PAGE_TOKENS)..].fill(0);
                    rest = after;
                }
            }
        }
    }
}

/// How a model's keys and values lie in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// The groups.
    pub groups: Vec<Group>,
    /// By which table the keys of a sequence are turned before they are stored: pages of one table are of no use to the
    /// other.
    pub rope_switch: RopeSwitch,
}

impl CopyDone {
    /// A batch of pages that were read into this process's memory: clears the slots that do not count, and makes
    /// the digests.
    pub fn read(layout: &KvLayout, pages: &[PageRead], mut bytes: Vec<PageBytes>, ticket: Ticket) -> Self {
        for (read, payload) in pages.iter().zip(&mut bytes) {
            if read.tokens < PAGE_TOKENS {
                layout.groups[read.page.group as usize].clear_from(read.tokens, payload);
            }
        }
        let digests = bytes.iter().map(|payload| digest(payload)).collect();
        Self { ticket, bytes, digests, result: Ok(()) }
    }

    /// A batch of pages that were written.
    pub fn written(ticket: Ticket, result: Result<(), crate::StepError>) -> Self {
        Self { ticket, bytes: Vec::new(), digests: Vec::new(), result }
    }
}

impl KvLayout {
    /// The layout of a graph: layers that keep the same and see as far share a group. Groups that see all of a
    /// sequence come first, then those of narrower windows before those of wider ones. A window that is no narrower
    /// than the graph's context hides nothing.
    pub fn of(graph: &Graph, dtype: KvDType) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (layer, spec) in graph.kv.iter().enumerate() {
            let part = |name, rows, width| Part { name, rows, width, dtype };
            let parts = match spec.rows {
                KvRows::Heads { heads, head_dim } => ["k", "v"].map(|name| part(name, heads, head_dim)),
                KvRows::Latent { latent, key } => [part("latent", 1, latent), part("key", 1, key)],
            };
            let mut parts = Vec::from(parts);
            if dtype == KvDType::Q8 {
                let scale = |part: &Part| Part { width: 1, dtype: KvDType::F32, ..part.clone() };
                parts.extend(parts.iter().map(scale).collect::<Vec<_>>());
            }
            let window = spec.window.filter(|&window| window < graph.context);
            match groups.iter_mut().find(|g| g.parts == parts && g.window == window) {
                Some(group) => group.layers.push(layer),
                None => groups.push(Group { layers: vec![layer], window, parts }),
            }
        }
        groups.sort_by_key(|group| group.window);
        Self { groups, rope_switch: graph.rope_switch }
    }

    /// The windows of the groups.
    pub fn windows(&self) -> Vec<Option<usize>> {
        self.groups.iter().map(|group| group.window).collect()
    }
}

#[cfg(test)]
mod tests {
    use mainstay_models::graph::{Block, KvSpec};

    use super::*;

    #[test]
    fn a_token_sees_its_window_and_no_more() {
        // Positions of page 0 are 0 to 31.
        for (window, position, oldest) in [
            (None, 1000, 0),
            (Some(1), 31, 0),
            (Some(1), 32, 1),
            (Some(12), 42, 0),
            (Some(12), 43, 1),
            (Some(32), 62, 0),
            (Some(32), 63, 1),
            (Some(100), 130, 0),
            (Some(100), 131, 1),
        ] {
            assert_eq!(oldest_page(window, position), oldest, "{window:?} at {position}");
        }
    }

    #[test]
    fn no_step_needs_more_pages_than_are_counted_and_some_step_needs_them_all() {
        for window in 1..100 {
            for step in [1, 2, 31, 32, 33, 64] {
                let needed = |at: usize| (at + step).div_ceil(PAGE_TOKENS) - oldest_page(Some(window), at);
                let most = (0..400).map(needed).max().unwrap();
                assert_eq!(pages_max(Some(window), 1000, step), most, "window {window}, step {step}");
            }
        }
        assert_eq!((pages_max(None, 65, 8), pages_max(Some(500), 65, 8)), (3, 3));
    }

    #[test]
    fn layers_of_one_window_share_a_group_and_full_ones_come_first() {
        let spec = |window| KvSpec { rows: KvRows::Heads { heads: 2, head_dim: 8 }, window };
        let kv = [Some(20), None, Some(64), Some(20), None, Some(4096)].map(spec).to_vec();
        let graph = Graph {
            family: "test",
            prologue: Block::default(),
            blocks: vec![],
            layers: vec![],
            epilogue: Block::default(),
            pooled: None,
            kv,
            hidden: 16,
            vocab: 10,
            context: 4096,
            rope_switch: RopeSwitch::default(),
        };
        let groups = KvLayout::of(&graph, KvDType::F32).groups;
        let found: Vec<_> = groups.iter().map(|group| (group.window, &group.layers[..])).collect();
        assert_eq!(found, [(None, &[1, 4, 5][..]), (Some(20), &[0, 3]), (Some(64), &[2])]);
    }
}
