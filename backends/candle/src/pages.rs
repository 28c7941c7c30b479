//! Keys and values in the host's memory, in the payload order of [`Group`], so that copying a page is copying bytes.

use std::ops::Range;

use half::{bf16, f16};
use mainstay_backend_api::kv::{Group, KvDType, KvLayout, PAGE_TOKENS};
use mainstay_backend_api::{Limits, PageId, PageRef};
use mainstay_models::LoadError;

/// All pages of all groups.
pub(crate) struct Pages {
    groups: Vec<GroupPages>,
    /// By layer: its group and its place among the group's layers.
    homes: Vec<(usize, usize)>,
}

struct GroupPages {
    layout: Group,
    /// `[page][layer][part][head][token][width]`
    bytes: Vec<u8>,
}

/// Which of a layer's parts.
#[derive(Clone, Copy)]
pub(crate) enum PartIndex {
    /// Keys, or latent rows.
    First = 0,
    /// Values, or shared keys.
    Second = 1,
}

impl PartIndex {
    /// The part that holds the scales of this one's rows, where rows have scales.
    fn scales(self) -> usize {
        self as usize + 2
    }
}

impl Pages {
    pub(crate) fn new(layout: &KvLayout, limits: &Limits) -> Result<Self, LoadError> {
        let counts = &limits.pages;
        if counts.len() != layout.groups.len() {
            let what =
                format!("expected page counts of {} groups, found {}", layout.groups.len(), counts.len());
            return Err(LoadError::Resources { what });
        }
        let mut groups = Vec::new();
        let mut homes = vec![(0, 0); layout.groups.iter().map(|g| g.layers.len()).sum()];
        for (index, (group, &count)) in layout.groups.iter().zip(counts).enumerate() {
            let mut bytes = Vec::new();
            let wanted = group.page_bytes().saturating_mul(count);
            bytes.try_reserve_exact(wanted).map_err(|e| LoadError::Resources {
                what: format!("{count} pages of {} bytes do not fit in memory: {e}", group.page_bytes()),
            })?;
            bytes.resize(wanted, 0);
            group.layers.iter().enumerate().for_each(|(place, &layer)| homes[layer] = (index, place));
            groups.push(GroupPages { layout: group.clone(), bytes });
        }
        Ok(Self { groups, homes })
    }

    /// The group whose page table a layer uses.
    pub(crate) fn group_of(&self, layer: usize) -> usize {
        self.homes[layer].0
    }

    pub(crate) fn page(&self, page: PageRef) -> &[u8] {
        let group = &self.groups[page.group as usize];
        &group.bytes[group.range(page.page)]
    }

    pub(crate) fn write_page(&mut self, page: PageRef, from: &[u8]) {
        let group = &mut self.groups[page.group as usize];
        let range = group.range(page.page);
        assert_eq!(from.len(), range.len(), "a page has another size than its group's pages");
        group.bytes[range].copy_from_slice(from);
    }

    pub(crate) fn copy_page(&mut self, from: PageRef, to: PageRef) {
        assert_eq!(from.group, to.group, "a page is copied into another group");
        let group = &mut self.groups[from.group as usize];
        let (from, to) = (group.range(from.page), group.range(to.page));
        group.bytes.copy_within(from, to.start);
    }

    /// Heads of one part.
    pub(crate) fn heads(&self, slot: &Slot) -> usize {
        self.groups[self.homes[slot.layer].0].layout.parts[slot.part as usize].rows
    }

    /// Stores `rows` (`[tokens, heads * width]`) of one part for the tokens from `position` on.
    pub(crate) fn append(&mut self, slot: &Slot, position: usize, rows: &[f32]) {
        let (group, place) = self.homes[slot.layer];
        let group = &mut self.groups[group];
        let part = &group.layout.parts[slot.part as usize];
        let (heads, width, dtype) = (part.rows, part.width, part.dtype);
        for (i, row) in rows.chunks_exact(heads * width).enumerate() {
            let (page, token) = (slot.table[(position + i) / PAGE_TOKENS], (position + i) % PAGE_TOKENS);
            for (head, values) in row.chunks_exact(width).enumerate() {
                let start =
                    group.head(page, place, slot.part as usize, head) + token * width * dtype.size_bytes();
                let scale = encode(values, dtype, &mut group.bytes[start..][..width * dtype.size_bytes()]);
                if dtype == KvDType::Q8 {
                    let start = group.head(page, place, slot.part.scales(), head) + token * 4;
                    group.bytes[start..][..4].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }

    /// The tokens of one part at these positions, from the first of a page on, widened to f32: `[heads, tokens, width]`.
    pub(crate) fn gather(&self, slot: &Slot, positions: Range<usize>) -> Vec<f32> {
        assert_eq!(positions.start % PAGE_TOKENS, 0, "{positions:?} begins inside a page");
        let (group, place) = self.homes[slot.layer];
        let group = &self.groups[group];
        let part = &group.layout.parts[slot.part as usize];
        let mut out = Vec::with_capacity(part.rows * positions.len() * part.width);
        for head in 0..part.rows {
            for first in positions.clone().step_by(PAGE_TOKENS) {
                let tokens = (positions.end - first).min(PAGE_TOKENS);
                let page = slot.table[first / PAGE_TOKENS];
                let start = group.head(page, place, slot.part as usize, head);
                let bytes = &group.bytes[start..][..tokens * part.width * part.dtype.size_bytes()];
                decode(bytes, part.dtype, &mut out);
                if part.dtype == KvDType::Q8 {
                    let start = group.head(page, place, slot.part.scales(), head);
                    let scales = &group.bytes[start..][..tokens * 4];
                    let first = out.len() - tokens * part.width;
                    let rows = out[first..].chunks_exact_mut(part.width);
                    for (row, scale) in rows.zip(scales.as_chunks::<4>().0) {
                        row.iter_mut().for_each(|x| *x *= f32::from_le_bytes(*scale));
                    }
                }
            }
        }
        out
    }
}

/// One part of one layer of one sequence.
pub(crate) struct Slot<'a> {
    pub(crate) layer: usize,
    pub(crate) part: PartIndex,
    /// The sequence's pages in the layer's group.
    pub(crate) table: &'a [PageId],
}

impl GroupPages {
    fn range(&self, page: PageId) -> std::ops::Range<usize> {
        let (size, page) = (self.layout.page_bytes(), page.0 as usize);
        assert!((page + 1) * size <= self.bytes.len(), "page {page} is outside {} bytes", self.bytes.len());
        page * size..(page + 1) * size
    }

    /// Where the tokens of one head begin.
    fn head(&self, page: PageId, place: usize, part: usize, head: usize) -> usize {
        let bytes = |p: &mainstay_backend_api::kv::Part| p.width * p.dtype.size_bytes() * PAGE_TOKENS;
        let before: usize = self.layout.parts[..part].iter().map(|p| p.rows * bytes(p)).sum();
        let head = head * bytes(&self.layout.parts[part]);
        self.range(page).start + place * self.layout.layer_bytes() + before + head
    }
}

/// Stores a row; what its elements are to be multiplied by.
fn encode(values: &[f32], dtype: KvDType, out: &mut [u8]) -> f32 {
    match dtype {
        KvDType::F32 => {
            out.chunks_exact_mut(4).zip(values).for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes()));
        }
        KvDType::BF16 => {
            let round = |v: &f32| bf16::from_f32(*v).to_le_bytes();
            out.chunks_exact_mut(2).zip(values).for_each(|(b, v)| b.copy_from_slice(&round(v)));
        }
        KvDType::F16 => {
            let round = |v: &f32| f16::from_f32(*v).to_le_bytes();
            out.chunks_exact_mut(2).zip(values).for_each(|(b, v)| b.copy_from_slice(&round(v)));
        }
        KvDType::Q8 => {
            let scale = values.iter().fold(0.0_f32, |most, v| most.max(v.abs())) / 127.0;
            let code = |v: &f32| (v / scale).round_ties_even() as i8;
            out.iter_mut().zip(values).for_each(|(b, v)| *b = code(v).cast_unsigned());
            return scale;
        }
    }
    1.0
}

fn decode(bytes: &[u8], dtype: KvDType, out: &mut Vec<f32>) {
    match dtype {
        KvDType::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        KvDType::BF16 => {
            out.extend(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()));
        }
        KvDType::F16 => {
            out.extend(bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()));
        }
        KvDType::Q8 => out.extend(bytes.iter().map(|b| f32::from(b.cast_signed()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mainstay_backend_api::kv::Part;

    fn layout(dtype: KvDType) -> KvLayout {
        let part = |name| Part { name, rows: 2, width: 3, dtype };
        KvLayout {
            rope_switch: Default::default(),
            groups: vec![
                Group { layers: vec![0, 2], window: None, parts: vec![part("k"), part("v")] },
                Group { layers: vec![1], window: None, parts: vec![part("k"), part("v")] },
            ],
        }
    }

    fn limits(dtype: KvDType) -> Limits {
        Limits {
            context: 96,
            tokens_per_step: 96,
            chunks: 1,
            output_rows: 1,
            pages: vec![5, 4],
            kv_dtype: dtype,
        }
    }

    fn pages(dtype: KvDType) -> Pages {
        Pages::new(&layout(dtype), &limits(dtype)).unwrap()
    }

    #[test]
    fn rows_come_back_by_head_and_move_with_their_pages() {
        let mut pages = pages(KvDType::F32);
        let rows: Vec<f32> = (0..70 * 6).map(|i| i as f32).collect();
        let table = [PageId(3), PageId(1), PageId(2)];
        let slot = |table| Slot { layer: 2, part: PartIndex::Second, table };
        pages.append(&slot(&table), 0, &rows[..40 * 6]);
        pages.append(&slot(&table), 40, &rows[40 * 6..]);
        let expected: Vec<f32> = (0..2)
            .flat_map(|head| (0..70).flat_map(move |t| (0..3).map(move |i| (t * 6 + head * 3 + i) as f32)))
            .collect();
        assert_eq!(pages.gather(&slot(&table), 0..70), expected);
        let page = |p| PageRef { group: 0, page: PageId(p) };
        pages.copy_page(page(1), page(4));
        let bytes = pages.page(page(3)).to_vec();
        pages.write_page(page(1), &bytes);
        let moved = [PageId(1), PageId(4), PageId(2)];
        assert_eq!(pages.gather(&slot(&moved), 0..70), expected);
        let other = Slot { layer: 1, part: PartIndex::Second, table: &table };
        assert!(pages.gather(&other, 0..70).iter().all(|&v| v == 0.0));
    }

    #[test]
    fn a_payload_has_the_documented_order() {
        let mut pages = pages(KvDType::F32);
        let slot = Slot { layer: 2, part: PartIndex::Second, table: &[PageId(1)] };
        pages.append(&slot, 5, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let payload = pages.page(PageRef { group: 0, page: PageId(1) });
        // [layer 1 of 2][part 1 of 2][head 1 of 2][token 5 of 32][element 2 of 3]
        let index = (((2 + 1) * 2 + 1) * 32 + 5) * 3 + 2;
        assert_eq!(payload[index * 4..][..4], 6f32.to_le_bytes());
        assert_eq!(payload.iter().filter(|&&b| b != 0).count(), 11);
    }

    #[test]
    fn codes_of_a_row_are_of_its_largest_magnitude() {
        let mut layout = layout(KvDType::Q8);
        for group in &mut layout.groups {
            let scales = group.parts.clone().into_iter();
            group.parts.extend(scales.map(|part| Part { width: 1, dtype: KvDType::F32, ..part }));
        }
        let mut pages = Pages::new(&layout, &limits(KvDType::Q8)).unwrap();
        let slot = Slot { layer: 2, part: PartIndex::Second, table: &[PageId(1)] };
        pages.append(&slot, 5, &[254.0, 3.0, -5.0, 0.0, 0.0, 0.0]);
        let found = pages.gather(&slot, 0..6);
        assert_eq!((&found[15..18], &found[33..36]), (&[254.0, 4.0, -4.0][..], &[0.0; 3][..]));
        // [layer 1 of 2], behind k and v of both heads the scales of k, then of v: [head 0 of 2][token 5 of 32].
        let layer_bytes = 2 * 2 * 32 * (3 + 4);
        let payload = pages.page(PageRef { group: 0, page: PageId(1) });
        let at = layer_bytes + 2 * 2 * 32 * 3 + 2 * 32 * 4 + 5 * 4;
        assert_eq!((payload.len(), &payload[at..at + 4]), (2 * layer_bytes, &2f32.to_le_bytes()[..]));
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let mut pages = pages(KvDType::BF16);
        let slot = Slot { layer: 0, part: PartIndex::First, table: &[PageId(1)] };
        let tie = f32::from_bits(0x3f80_8000);
        pages.append(&slot, 0, &[1.0, tie, f32::from_bits(0x3f80_8001), -2.5, 0.0, 3.0]);
        let next = f32::from_bits(0x3f81_0000);
        assert_eq!(pages.gather(&slot, 0..1), [1.0, 1.0, next, -2.5, 0.0, 3.0]);
    }
}
