//! Byte buffers whose start and length are multiples of a disk block, as direct reads want them.

use std::ops::{Deref, DerefMut};

/// Alignment of records, buffers and direct reads, bytes.
pub const BLOCK: usize = 4096;

/// `bytes` rounded up to a whole number of blocks.
pub(crate) fn whole_blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK as u64)
}

/// Zeroed bytes that begin at a multiple of [`BLOCK`]. The allocation is a block longer than asked for, which needs no
/// `unsafe`.
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
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        assert!(start <= BLOCK, "a byte pointer aligns within one block, found {start}");
        Self { bytes, start, len }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_start_and_end_on_blocks() {
        for len in [0, 1, 4095, 4096, 4097, 300_000] {
            let buffer = AlignedBytes::new(len);
            assert_eq!(buffer.as_ptr().addr() % BLOCK, 0);
            assert_eq!(buffer.len(), len.div_ceil(BLOCK) * BLOCK);
        }
    }
}
