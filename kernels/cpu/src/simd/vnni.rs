//! AVX-512 with VNNI: sixteen dot products of four bytes are one instruction.

use std::arch::x86_64::*;

use super::Bytes;
use super::avx512::Avx512;

/// Witness of avx512vnni and of what [`Avx512`] witnesses.
#[derive(Clone, Copy)]
pub(crate) struct Vnni(Avx512);

impl Vnni {
    /// # Safety
    /// The machine has the features that the type witnesses.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { Avx512::new() })
    }
}

impl Bytes for Vnni {
    type Floats = Avx512;
    type B = __m512i;
    type I = __m512i;
    type Four = __m512i;
    const SIGNED: bool = false;
    const WIDENS: bool = true;
    const SUMS: usize = 12;

    #[inline(always)]
    fn floats(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    unsafe fn read_bytes(self, from: *const u8) -> __m512i {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn write_bytes(self, to: *mut u8, a: __m512i) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast(), a) }
    }
    #[inline(always)]
    fn shift_and_mask(self, a: __m512i, shift: i32, mask: u8) -> __m512i {
        // SAFETY: self witnesses the features.
        unsafe {
            let shifted = match shift {
                -6 => _mm512_srli_epi16::<6>(a),
                -5 => _mm512_srli_epi16::<5>(a),
                -4 => _mm512_srli_epi16::<4>(a),
                -3 => _mm512_srli_epi16::<3>(a),
                -2 => _mm512_srli_epi16::<2>(a),
                -1 => _mm512_srli_epi16::<1>(a),
                0 => a,
                n => _mm512_sll_epi16(a, _mm_cvtsi32_si128(n)),
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    fn add_bytes(self, a: __m512i, b: u8) -> __m512i {
        // SAFETY: self witnesses the features.
        unsafe { _mm512_add_epi8(a, _mm512_set1_epi8(b as i8)) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: self witnesses the features.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn look_up(self, a: __m512i, table: &[u8; 16]) -> __m512i {
        // SAFETY: self witnesses the features; the table has 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, a)
        }
    }
    #[inline(always)]
    fn no_sum(self) -> __m512i {
        // SAFETY: self witnesses the features.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn sum_from(self, from: *const i32) -> __m512i {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_set1_epi32(from.read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn read_four(self, from: *const u8) -> __m512i {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn dot<const WIDE: bool>(self, sum: __m512i, bytes: __m512i, four: __m512i) -> __m512i {
        // SAFETY: self witnesses the features.
        unsafe { _mm512_dpbusd_epi32(sum, bytes, four) }
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        // SAFETY: self witnesses the features.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn read_i8(self, from: *const u8) -> __m512 {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn read_u8(self, from: *const u8) -> __m512 {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn write_low_bytes(self, to: *mut u8, a: __m512) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(a))) }
    }
}
