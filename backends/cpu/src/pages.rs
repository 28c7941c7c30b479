//! The bytes of keys and values: `[page][layer][head]` blocks per group, and their way to and from the payload order.

use std::sync::Arc;

use mainstay_backend_api::kv::{Group, PAGE_TOKENS, Part};
use mainstay_backend_api::{KvDType, KvLayout, Limits, PageBytes, PageRef, Step, StepError};
use mainstay_kernels_cpu::kv::{BLOCK_TOKENS, BlockPart, BlockShape, KvType};
use mainstay_models::LoadError;

use crate::ahead::Ahead;
use crate::arena::Blocks;
use crate::machine;
use crate::pool::{Job, Pool};

const _: () = assert!(BLOCK_TOKENS == PAGE_TOKENS);

/// All pages of an executor.
pub(crate) struct Pages {
    groups: Vec<GroupPages>,
    /// Group of each layer, and its place in the group.
    homes: Vec<(usize, usize)>,
    /// Keeps memory ready.
    ahead: Ahead,
}

struct GroupPages {
    blocks: Blocks,
    layers: usize,
    heads: usize,
    /// What a block holds.
    shape: BlockShape,
    pages: usize,
    page_bytes: usize,
}

impl Pages {
    /// Zeroed pages as many as the limits say; the system gives memory for some of them ahead of their use.
    ///
    /// # Errors
    /// [`LoadError::Resources`] if there are more than the machine's memory, or the system refuses.
    pub(crate) fn new(layout: &KvLayout, limits: &Limits) -> Result<Self, LoadError> {
        assert_eq!(limits.pages.len(), layout.groups.len(), "limits on pages of each group");
        let needed =
            layout.groups.iter().zip(&limits.pages).map(|(g, &n)| g.page_bytes() as u128 * n as u128);
        let needed: u128 = needed.sum();
        let short = |found: String| LoadError::Resources {
            what: format!(
                "expected room for {needed} bytes of keys and values ({:?} pages), {found}",
                limits.pages
            ),
        };
        if let Some(memory) = machine::memory_bytes()
            && needed > u128::from(memory)
        {
            return Err(short(format!("found {memory} bytes of memory")));
        }
        let groups = layout.groups.iter().zip(&limits.pages);
        let groups =
            groups.map(|(g, &n)| GroupPages::new(g, n).ok_or_else(|| short("the system refused".into())));
        let groups = groups.collect::<Result<Vec<_>, _>>()?;
        let mut homes = vec![(0, 0); layout.groups.iter().map(|g| g.layers.len()).sum()];
        for (group, g) in layout.groups.iter().enumerate() {
            for (index, &layer) in g.layers.iter().enumerate() {
                homes[layer] = (group, index);
            }
        }
        let memories: Vec<_> = groups.iter().map(|group| Arc::clone(group.blocks.memory())).collect();
        Ok(Self { groups, homes, ahead: Ahead::start(&memories) })
    }

    /// The pages that a step writes are in use.
    pub(crate) fn prepare(&self, step: &Step) {
        for chunk in &step.chunks {
            for group in 0..self.groups.len() {
                let written =
                    chunk.table(step, group).get(chunk.position / PAGE_TOKENS..).unwrap_or_default();
                let furthest = written.iter().map(|page| page.0).max();
                furthest.into_iter().for_each(|page| self.used(group, page));
            }
        }
    }

    fn used(&self, group: usize, page: u32) {
        let bytes = self.groups[group].memory_bytes();
        self.ahead.used(group, (page as usize + 1) * bytes);
    }

    /// The blocks that hold a layer, and its group.
    pub(crate) fn layer(&self, layer: usize) -> LayerPages<'_> {
        let (group, index) = self.homes[layer];
        LayerPages { pages: &self.groups[group], group, index }
    }

    /// Copies a page whole.
    pub(crate) fn copy(&mut self, from: PageRef, to: PageRef) {
        assert_eq!(from.group, to.group, "a page stays in its group");
        let group = &mut self.groups[from.group as usize];
        let blocks = group.layers * group.heads;
        group.blocks.copy(from.page.0 as usize * blocks, to.page.0 as usize * blocks, blocks);
    }

    /// A page's payload.
    pub(crate) fn read(&self, page: PageRef) -> PageBytes {
        let group = &self.groups[page.group as usize];
        let mut out = vec![0; group.page_bytes].into_boxed_slice();
        let mut rest = &mut out[..];
        for layer in 0..group.layers {
            for part in group.shape.parts() {
                for head in 0..group.heads {
                    let (rows, after) = rest.split_at_mut(group.part_bytes(part));
                    let block = group.blocks.read(group.block(page.page.0 as usize, layer, head));
                    block.read_part(part, rows);
                    rest = after;
                }
            }
            for part in group.shape.parts() {
                for head in 0..group.heads {
                    let (scales, after) = rest.split_at_mut(group.scale_bytes());
                    let block = group.blocks.read(group.block(page.page.0 as usize, layer, head));
                    block.read_scales(part, scales);
                    rest = after;
                }
            }
        }
        out
    }

    /// Overwrites a page by a payload, its layers shared out to the threads: much of it is memory that was never
    /// touched.
    ///
    /// # Errors
    /// If the payload has another length than a page.
    pub(crate) fn write(&mut self, pool: &mut Pool, page: PageRef, payload: &[u8]) -> Result<(), StepError> {
        let group = &self.groups[page.group as usize];
        if payload.len() != group.page_bytes {
            let what = format!("expected a page of {} bytes, found {}", group.page_bytes, payload.len());
            return Err(StepError::Device { device: "cpu", what });
        }
        let layer_bytes = group.page_bytes / group.layers.max(1);
        let write_layer = |job: &Job| {
            let layer = job.index();
            let mut rest = &payload[layer * layer_bytes..][..layer_bytes];
            for part in group.shape.parts() {
                for head in 0..group.heads {
                    let (rows, after) = rest.split_at(group.part_bytes(part));
                    let block = group.block(page.page.0 as usize, layer, head);
                    group.blocks.write(block, job).write_part(part, rows);
                    rest = after;
                }
            }
            for part in group.shape.parts() {
                for head in 0..group.heads {
                    let (scales, after) = rest.split_at(group.scale_bytes());
                    let block = group.block(page.page.0 as usize, layer, head);
                    group.blocks.write(block, job).write_scales(part, scales);
                    rest = after;
                }
            }
        };
        pool.run(&|worker| worker.each(group.layers, |job| write_layer(&job)));
        self.used(page.group as usize, page.page.0);
        Ok(())
    }
}

impl GroupPages {
    fn new(group: &Group, pages: usize) -> Option<Self> {
        let (layers, heads, shape) = (group.layers.len(), group.parts.first()?.rows, block_shape(group));
        let dtype = match group.parts.first()?.dtype {
            KvDType::F32 => KvType::F32,
            KvDType::BF16 => KvType::BF16,
            KvDType::F16 => KvType::F16,
            KvDType::Q8 => KvType::Q8,
        };
        let count = pages.checked_mul(layers)?.checked_mul(heads)?;
        let blocks = Blocks::new(dtype, shape, count)?;
        Some(Self { blocks, layers, heads, shape, pages, page_bytes: group.page_bytes() })
    }

    /// Bytes of a page as it lies in memory, where rows may be padded.
    fn memory_bytes(&self) -> usize {
        self.blocks.memory().len() / self.pages.max(1)
    }

    /// Bytes of one head's part in a payload.
    fn part_bytes(&self, part: BlockPart) -> usize {
        BLOCK_TOKENS * part.width() * self.blocks.dtype().size_bytes()
    }

    /// Bytes of the scales of one head's part in a payload.
    fn scale_bytes(&self) -> usize {
        if self.blocks.dtype() == KvType::Q8 { BLOCK_TOKENS * 4 } else { 0 }
    }

    fn block(&self, page: usize, layer: usize, head: usize) -> usize {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        (page * self.layers + layer) * self.heads + head
    }
}

/// What a block of a group holds.
fn block_shape(group: &Group) -> BlockShape {
    match &group.parts[..] {
        [latent, key, ..] if (latent.name, key.name) == ("latent", "key") => {
            BlockShape::Latent { latent: latent.width, key: key.width }
        }
        [k, v, ..] if (k.name, v.name) == ("k", "v") && k == &(Part { name: "k", ..v.clone() }) => {
            BlockShape::Heads { head_dim: k.width }
        }
        parts => unreachable!("no layer keeps {parts:?}"),
    }
}

/// One layer's share of all pages.
#[derive(Clone, Copy)]
pub(crate) struct LayerPages<'a> {
    pages: &'a GroupPages,
    /// Index of the group.
    pub(crate) group: usize,
    index: usize,
}

impl<'a> LayerPages<'a> {
    /// The number of the block of a page and a head.
    pub(crate) fn block(&self, page: mainstay_backend_api::PageId, head: usize) -> usize {
        self.pages.block(page.0 as usize, self.index, head)
    }

    /// All blocks of the group.
    pub(crate) fn blocks(&self) -> &'a Blocks {
        &self.pages.blocks
    }
}
