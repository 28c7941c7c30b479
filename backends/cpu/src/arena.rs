//! Memory that the threads of a region share: activations, and the bytes of pages.
//!
//! The compiler cannot see that jobs write disjoint places, so this is where that is vouched for. Two facts carry
//! every SAFETY comment here: a [`Job`] exists once, and a phase (of run.rs, or a page's write in pages.rs) writes, for
//! a job, only the rows, columns and blocks that it derives from the job's number, and reads only slots that it does not
//! write, or what the same job wrote before (plan.rs gives values that live at the same time disjoint slots).

#![expect(unsafe_code, reason = "disjoint parts of one buffer go to several threads")]

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use mainstay_kernels_cpu::kv::{BlockShape, KvBlock, KvBlockMut, KvType};
use mainstay_kernels_cpu::{Aligned, Mat, MatMut};

use crate::pool::Job;

/// A place for a matrix: `rows` rows of `width` floats, `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// First float.
    pub(crate) offset: usize,
    /// Rows that it has room for.
    pub(crate) rows: usize,
    /// Floats from row to row.
    pub(crate) stride: usize,
    /// Floats in a row.
    pub(crate) width: usize,
}

impl Slot {
    /// Some of the columns.
    pub(crate) fn columns(self, cols: Range<usize>) -> Slot {
        assert!(cols.start <= cols.end && cols.end <= self.width, "columns {cols:?} of {}", self.width);
        Slot { offset: self.offset + cols.start, width: cols.len(), ..self }
    }

    /// Whether rows of both may share floats.
    pub(crate) fn meets(self, other: Slot) -> bool {
        let end = |slot: Slot| slot.offset + slot.rows * slot.stride;
        self.offset < end(other) && other.offset < end(self)
    }

    /// The same floats as `parts` rows of `width` for each of its rows.
    pub(crate) fn split(self, parts: usize, width: usize) -> Slot {
        assert!(
            self.stride.is_multiple_of(parts) && width <= self.stride / parts,
            "{parts} of {width} in {self:?}"
        );
        Slot { offset: self.offset, rows: self.rows * parts, stride: self.stride / parts, width }
    }
}

/// The activations of a step.
pub(crate) struct Arena {
    memory: Aligned,
}

impl Arena {
    /// Room for `len` floats, or `None` where memory is short.
    pub(crate) fn new(len: usize) -> Option<Self> {
        Some(Self { memory: Aligned::zeroed(len.checked_mul(4)?)? })
    }

    fn place(&self, slot: Slot, rows: &Range<usize>, width: usize) -> *mut f32 {
        assert!(rows.start <= rows.end && rows.end <= slot.rows, "rows {rows:?} of {slot:?}");
        assert!(width <= slot.stride, "{width} columns of {slot:?}");
        let first = slot.offset + rows.start * slot.stride;
        let end = first + (rows.len().max(1) - 1) * slot.stride + width;
        assert!(end <= self.memory.len() / 4, "{slot:?} of {}", self.memory.len() / 4);
        // SAFETY: inside the memory, as just checked.
        unsafe { self.memory.as_ptr().cast::<f32>().add(first) }
    }

    /// Rows of a slot, for reading.
    pub(crate) fn read(&self, slot: Slot, rows: Range<usize>) -> Mat<'_> {
        let data = self.place(slot, &rows, slot.width);
        // SAFETY: in bounds; no phase writes a slot that it reads (module text).
        unsafe { Mat::from_raw(data, rows.len(), slot.width, slot.stride) }
    }

    /// The first `len` floats of a slot, for reading as one slice.
    pub(crate) fn read_flat(&self, slot: Slot, len: usize) -> &[f32] {
        assert!(len <= slot.rows * slot.stride, "{len} floats of {slot:?}");
        let data = self.place(slot, &(0..slot.rows), slot.width);
        // SAFETY: in bounds; no phase writes a slot that it reads (module text).
        unsafe { std::slice::from_raw_parts(data, len) }
    }

    /// Rows of a slot, for the job that they belong to. Padding up to the stride may be part of `slot.width`.
    pub(crate) fn write(&self, slot: Slot, rows: Range<usize>, _job: &Job) -> MatMut<'_> {
        let data = self.place(slot, &rows, slot.width);
        // SAFETY: in bounds; the rows and columns belong to this job alone (module text).
        unsafe { MatMut::from_raw(data, rows.len(), slot.width, slot.stride) }
    }

    /// Floats of a slot as one slice, for the job that they belong to.
    #[expect(clippy::mut_from_ref, reason = "the job is the exclusive right")]
    pub(crate) fn write_flat(&self, slot: Slot, range: Range<usize>, _job: &Job) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= slot.rows * slot.stride, "{range:?} of {slot:?}");
        let data = self.place(slot, &(0..slot.rows), slot.width);
        // SAFETY: in bounds; the range belongs to this job alone (module text).
        unsafe { std::slice::from_raw_parts_mut(data.add(range.start), range.len()) }
    }
}

/// The blocks of all pages of a group, `[page][layer][head]`, each block of equal size.
pub(crate) struct Blocks {
    memory: Arc<Aligned>,
    dtype: KvType,
    /// Elements of a block.
    len: usize,
    /// These and the scales of rows behind them.
    block_bytes: usize,
    /// Blocks.
    count: usize,
}

impl Blocks {
    /// `count` zeroed blocks of this shape, or `None` where memory is short.
    pub(crate) fn new(dtype: KvType, shape: BlockShape, count: usize) -> Option<Self> {
        let (len, block_bytes) = (shape.len(), dtype.block_bytes(shape));
        let memory = Arc::new(Aligned::zeroed(block_bytes.checked_mul(count)?)?);
        Some(Self { memory, dtype, len, block_bytes, count })
    }

    /// Where they lie, for whoever has the system give it.
    pub(crate) fn memory(&self) -> &Arc<Aligned> {
        &self.memory
    }

    /// Element type.
    pub(crate) fn dtype(&self) -> KvType {
        self.dtype
    }

    fn place<T>(&self, block: usize) -> *mut T {
        assert!(block < self.count, "block {block} of {}", self.count);
        assert_eq!(size_of::<T>(), self.dtype.size_bytes());
        // SAFETY: inside the memory, as just checked; blocks are whole floats.
        unsafe { self.memory.as_ptr().add(block * self.block_bytes).cast::<T>() }
    }

    /// Where the scales of a block's rows are, and how many.
    fn scales(&self, block: usize) -> (*mut f32, usize) {
        let elements = self.len * self.dtype.size_bytes();
        // SAFETY: behind the block's elements, inside it; these are a multiple of 64 bytes, so that floats are aligned.
        let place = unsafe { self.place::<i8>(block).add(elements).cast::<f32>() };
        (place, (self.block_bytes - elements) / 4)
    }

    /// A block for reading.
    pub(crate) fn read(&self, block: usize) -> KvBlock<'_> {
        // SAFETY: in bounds, aligned to 64, every bit pattern is valid; no phase reads blocks that it writes.
        unsafe {
            match self.dtype {
                KvType::F32 => KvBlock::F32(std::slice::from_raw_parts(self.place::<f32>(block), self.len)),
                KvType::BF16 => {
                    KvBlock::BF16(std::slice::from_raw_parts(self.place::<bf16>(block), self.len))
                }
                KvType::F16 => KvBlock::F16(std::slice::from_raw_parts(self.place::<f16>(block), self.len)),
                KvType::Q8 => {
                    let (scales, count) = self.scales(block);
                    let codes = std::slice::from_raw_parts(self.place::<i8>(block), self.len);
                    KvBlock::Q8(codes, std::slice::from_raw_parts(scales, count))
                }
            }
        }
    }

    /// A block for the job that it belongs to.
    pub(crate) fn write(&self, block: usize, _job: &Job) -> KvBlockMut<'_> {
        // SAFETY: in bounds, aligned to 64, every bit pattern is valid; the block belongs to this job alone.
        unsafe {
            match self.dtype {
                KvType::F32 => {
                    KvBlockMut::F32(std::slice::from_raw_parts_mut(self.place::<f32>(block), self.len))
                }
                KvType::BF16 => {
                    KvBlockMut::BF16(std::slice::from_raw_parts_mut(self.place::<bf16>(block), self.len))
                }
                KvType::F16 => {
                    KvBlockMut::F16(std::slice::from_raw_parts_mut(self.place::<f16>(block), self.len))
                }
                KvType::Q8 => {
                    let (scales, count) = self.scales(block);
                    let codes = std::slice::from_raw_parts_mut(self.place::<i8>(block), self.len);
                    KvBlockMut::Q8(codes, std::slice::from_raw_parts_mut(scales, count))
                }
            }
        }
    }

    /// Copies `count` blocks from `from` to `to`.
    pub(crate) fn copy(&mut self, from: usize, to: usize, count: usize) {
        let bytes = self.block_bytes;
        assert!(from.max(to) + count <= self.count, "{count} blocks from {from} to {to} of {}", self.count);
        let memory = self.memory.as_ptr();
        // SAFETY: both inside the memory, as just checked; nobody else reads or writes blocks while they are borrowed
        // exclusively.
        unsafe { std::ptr::copy(memory.add(from * bytes), memory.add(to * bytes), count * bytes) };
    }
}
