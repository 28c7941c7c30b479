//! Large zeroed memory on cache-line borders, given by the system only when it is touched.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a cache line; also what a 512-bit vector wants.
pub const LINE_BYTES: usize = 64;

/// Above this size the memory asks for huge pages: a sweep over gigabytes is else bound by the TLB.
const HUGE_BYTES: usize = 4 << 20;

/// Bytes of the smallest pages of memory. A system with larger ones refuses to give memory at such a border, and gives
/// it when it is touched.
#[cfg(target_os = "linux")]
const PAGE_BYTES: usize = 4096;

/// Zeroed bytes that begin on a cache line.
pub struct Aligned {
    /// What the allocator gave.
    base: NonNull<u8>,
    layout: Layout,
    /// First byte on a line, and the length from there.
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns plain bytes; access follows the usual rules of & and &mut.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    /// `len` zeroed bytes, or `None` where the system refuses.
    pub fn zeroed(len: usize) -> Option<Self> {
        let wide = if len >= HUGE_BYTES { 2 << 20 } else { LINE_BYTES };
        // An alignment of 16 lets the allocator hand out untouched zero pages; a larger one would make it write them.
        let layout = Layout::from_size_align(len.checked_add(wide)?, 16).ok()?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let skip = base.as_ptr().align_offset(wide);
        // SAFETY: skip < wide, and len + wide bytes were allocated.
        let start = unsafe { base.add(skip) };
        let memory = Self { base, layout, start, len };
        if len >= HUGE_BYTES {
            memory.ask_for_huge_pages();
        }
        Some(memory)
    }

    #[cfg(target_os = "linux")]
    fn ask_for_huge_pages(&self) {
        // SAFETY: the range is ours and starts on a page; the call is advice and changes no contents.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_huge_pages(&self) {}

    /// Has the system give memory for a range of bytes, as a first write to each of its pages would, which costs more
    /// than many writes after it. No byte changes, so others may use them meanwhile. `false` where the system cannot
    /// (Linux before 5.14, other systems) or has no memory; it then comes when it is touched.
    ///
    /// # Panics
    /// If the range is outside.
    pub fn populate(&self, range: Range<usize>) -> bool {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        self.ask_for_memory(range)
    }

    #[cfg(target_os = "linux")]
    fn ask_for_memory(&self, range: Range<usize>) -> bool {
        // SAFETY: inside the memory, as just checked.
        let first = unsafe { self.start.as_ptr().add(range.start) };
        // The call wants the start of a page.
        let before = first.addr() % PAGE_BYTES;
        let first = first.wrapping_sub(before).cast();
        // SAFETY: pages that hold bytes of this memory are mapped; the call changes no contents.
        unsafe { libc::madvise(first, before + range.len(), libc::MADV_POPULATE_WRITE) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_memory(&self, _range: Range<usize>) -> bool {
        false
    }

    /// Bytes of whole pages that the system has given; `None` where it does not tell.
    #[cfg(target_os = "linux")]
    pub fn resident_bytes(&self) -> Option<usize> {
        let before = self.start.as_ptr().addr().next_multiple_of(PAGE_BYTES) - self.start.as_ptr().addr();
        let pages = self.len.saturating_sub(before) / PAGE_BYTES;
        let mut found = vec![0u8; pages];
        let first = self.start.as_ptr().wrapping_add(before).cast();
        // SAFETY: the pages lie inside the memory, and the call writes a byte for each.
        let told = unsafe { libc::mincore(first, pages * PAGE_BYTES, found.as_mut_ptr()) } == 0;
        told.then(|| found.iter().filter(|&&page| page & 1 == 1).count() * PAGE_BYTES)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte; valid for reads and writes of [`Aligned::len`] bytes under the rules of aliasing.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: start is valid for len initialised bytes, borrowed with self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// All bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in bytes, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// The bytes as f32; a remainder of up to 3 bytes is left out.
    pub fn f32s(&self) -> &[f32] {
        // SAFETY: the start is aligned to 64, and every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 4) }
    }

    /// The bytes as f32; a remainder of up to 3 bytes is left out.
    pub fn f32s_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in f32s, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len / 4) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl std::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({} bytes)", self.len)
    }
}

/// Bytes that a [`Reserve`] asks the system for at a time; what is not touched is not given.
const RESERVE_BYTES: usize = 64 << 20;

/// Memory that is given out piece by piece, so that what is small lies on huge pages too, one behind the other.
#[derive(Debug, Default)]
pub struct Reserve {
    memory: Option<Arc<Aligned>>,
    /// Bytes of it that were given out.
    used: usize,
}

/// Bytes from a [`Reserve`] that begin on a cache line. The memory goes back when all of its pieces are gone.
#[derive(Debug)]
pub struct Piece {
    memory: Arc<Aligned>,
    start: usize,
    len: usize,
}

impl Reserve {
    /// `len` zeroed bytes that nobody else is given, or `None` where the system refuses.
    pub fn take(&mut self, len: usize) -> Option<Piece> {
        let room = len.checked_next_multiple_of(LINE_BYTES)?;
        let memory = match &self.memory {
            Some(memory) if memory.len() - self.used >= room => Arc::clone(memory),
            _ => {
                self.used = 0;
                let memory = Arc::new(Aligned::zeroed(room.max(RESERVE_BYTES))?);
                self.memory = Some(Arc::clone(&memory));
                memory
            }
        };
        let start = self.used;
        self.used += room;
        Some(Piece { memory, start, len })
    }
}

impl Piece {
    /// `len` zeroed bytes in memory of their own, or `None` where the system refuses.
    pub fn zeroed(len: usize) -> Option<Self> {
        Some(Self { memory: Arc::new(Aligned::zeroed(len)?), start: 0, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: inside the memory, whose bytes are initialised; only this piece covers them and it is borrowed.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.start), self.len) }
    }

    /// All bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in bytes, and this piece is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_and_are_apart() {
        let mut reserve = Reserve::default();
        let lens = [1, 0, 64, 65, 4096, RESERVE_BYTES - 1, 5, RESERVE_BYTES + 1, 7];
        let mut pieces: Vec<Piece> = lens.iter().map(|&len| reserve.take(len).expect("memory")).collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!((piece.len(), piece.bytes().as_ptr() as usize % LINE_BYTES), (lens[i], 0));
            assert!(piece.bytes().iter().take(4096).all(|&b| b == 0), "piece {i}");
            piece.bytes_mut().fill(i as u8 + 1);
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.bytes().iter().all(|&b| b == i as u8 + 1), "piece {i}");
        }
        let at = |i: usize| pieces[i].bytes().as_ptr() as usize;
        assert_eq!((at(2) - at(0), at(4) - at(3)), (64, 128));
    }

    #[test]
    fn an_absurd_piece_is_refused() {
        let mut reserve = Reserve::default();
        assert!(reserve.take(usize::MAX).is_none());
        assert!(reserve.take(usize::MAX / 2 - 4096).is_none());
        assert_eq!(reserve.take(3).expect("small").bytes(), [0; 3]);
    }

    #[test]
    fn starts_on_a_line_and_is_zero() {
        for len in [0, 1, 63, 64, 5 << 20] {
            let memory = Aligned::zeroed(len).expect("small");
            assert_eq!(memory.as_ptr() as usize % LINE_BYTES, 0);
            assert!(memory.bytes().iter().all(|&b| b == 0));
            assert_eq!(memory.len(), len);
        }
    }

    // The emulator that other architectures are tested with takes the call and gives nothing.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[test]
    fn memory_is_given_before_it_is_touched_and_keeps_its_bytes() {
        let mut memory = Aligned::zeroed(64 << 20).expect("small");
        memory.bytes_mut()[5 << 20] = 7;
        let touched = memory.resident_bytes().expect("Linux tells");
        assert!((PAGE_BYTES..=4 << 20).contains(&touched), "{touched} bytes");
        if memory.populate((4 << 20) + 9..(36 << 20) + 100) {
            let given = memory.resident_bytes().expect("Linux tells");
            assert!((32 << 20..=36 << 20).contains(&given), "{given} bytes");
        }
        assert_eq!(memory.bytes().iter().map(|&b| usize::from(b)).sum::<usize>(), 7);
    }

    #[test]
    #[should_panic(expected = "of 64 bytes")]
    fn memory_of_others_is_not_asked_for() {
        Aligned::zeroed(64).expect("small").populate(0..65);
    }

    #[test]
    fn an_absurd_size_is_refused() {
        assert!(Aligned::zeroed(usize::MAX - 8).is_none());
        assert!(Aligned::zeroed(isize::MAX as usize - 4096).is_none());
    }
}
