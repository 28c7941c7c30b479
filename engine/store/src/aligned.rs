//! Byte buffers whose start and length are multiples of a disk block, as direct reads want them.

#![expect(unsafe_code, reason = "one advice to the system about memory that a buffer owns")]

use std::{
    ops::{Deref, DerefMut},
    sync::Mutex,
};

use crate::pages::lock;

/// Alignment of records, buffers and direct reads, bytes.
pub const BLOCK: usize = 4096;

/// `bytes` rounded up to a whole number of blocks.
pub(crate) fn whole_blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK as u64)
}

/// Buffers from this size on lie on huge pages where the system has them: a direct read into scattered 4 KiB pages is
/// cut into a hundred pieces a megabyte, which costs a virtual disk two thirds of its rate.
const HUGE: usize = 2 << 20;

/// Zeroed bytes that begin at a multiple of [`BLOCK`]. The allocation is longer than asked for by its alignment, which
/// needs no `unsafe`.
#[derive(Debug)]
pub struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// At least `len` bytes, rounded up to whole blocks.
    pub fn new(len: usize) -> Self {
        let len = len.next_multiple_of(BLOCK);
        let align = if len < HUGE { BLOCK } else { HUGE };
        let mut bytes = vec![0; len.next_multiple_of(align) + align];
        let start = bytes.as_ptr().align_offset(align);
        assert!(start <= align, "a byte pointer aligns within one step, found {start}");
        if align == HUGE {
            ask_for_huge_pages(&mut bytes[start..][..len.next_multiple_of(HUGE)]);
        }
        Self { bytes, start, len }
    }
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(bytes: &mut [u8]) {
    use rustix::mm::{Advice, madvise};
    // SAFETY: the range is the buffer's own, and the advice changes none of its contents.
    let advised = unsafe { madvise(bytes.as_mut_ptr().cast(), bytes.len(), Advice::LinuxHugepage) };
    // A system without huge pages gives small ones.
    advised.unwrap_or_default();
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_bytes: &mut [u8]) {}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Bytes of buffers that are kept for the next read: what an engine asks for ahead of its own copies.
const SPARE_BYTES_MAX: usize = 64 << 20;

/// Buffers that were read into before. To have a page's megabytes from the system, zeroed, takes as long as to prove
/// them.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Vec<AlignedBytes>>);

impl Spare {
    /// A buffer of `len` bytes rounded up to whole blocks. What it holds is unspecified.
    pub(crate) fn take(&self, len: usize) -> AlignedBytes {
        let len = len.next_multiple_of(BLOCK);
        let mut spare = lock(&self.0);
        let place = spare.iter().rposition(|buffer| buffer.len == len);
        let found = place.map(|place| spare.swap_remove(place));
        drop(spare);
        found.unwrap_or_else(|| AlignedBytes::new(len))
    }

    /// Keeps a buffer; the oldest go where there are enough.
    pub(crate) fn give(&self, buffer: AlignedBytes) {
        let mut spare = lock(&self.0);
        while !spare.is_empty() && spare.iter().map(|b| b.len).sum::<usize>() + buffer.len > SPARE_BYTES_MAX {
            spare.remove(0);
        }
        if buffer.len <= SPARE_BYTES_MAX {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spare_buffers_are_given_again_by_size_and_not_hoarded() {
        let spare = Spare::default();
        let mut buffer = spare.take(5000);
        buffer[0] = 7;
        spare.give(buffer);
        assert_eq!(spare.take(4096)[0], 0, "another size");
        assert_eq!((spare.take(8192)[0], spare.take(8192)[0]), (7, 0));
        for _ in 0..40 {
            spare.give(AlignedBytes::new(4 << 20));
        }
        assert_eq!(lock(&spare.0).len(), 16);
    }

    #[test]
    fn buffers_start_and_end_on_blocks() {
        for len in [0, 1, 4095, 4096, 4097, 300_000] {
            let buffer = AlignedBytes::new(len);
            assert_eq!(buffer.as_ptr().addr() % BLOCK, 0);
            assert_eq!(buffer.len(), len.div_ceil(BLOCK) * BLOCK);
        }
    }
}
