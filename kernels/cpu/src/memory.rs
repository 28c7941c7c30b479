//! Large zeroed memory on cache-line borders, given by the system only when it is touched.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Bytes of a cache line; also what a 512-bit vector wants.
pub const LINE_BYTES: usize = 64;

/// Above this size the memory asks for huge pages: a sweep over gigabytes is else bound by the TLB.
const HUGE_BYTES: usize = 4 << 20;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_line_and_is_zero() {
        for len in [0, 1, 63, 64, 5 << 20] {
            let memory = Aligned::zeroed(len).expect("small");
            assert_eq!(memory.as_ptr() as usize % LINE_BYTES, 0);
            assert!(memory.bytes().iter().all(|&b| b == 0));
            assert_eq!(memory.len(), len);
        }
    }

    #[test]
    fn an_absurd_size_is_refused() {
        assert!(Aligned::zeroed(usize::MAX - 8).is_none());
        assert!(Aligned::zeroed(isize::MAX as usize - 4096).is_none());
    }
}
