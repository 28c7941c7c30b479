//! AVX2 with FMA: a vector is two registers, lanes 0-7 and 8-15.

use std::arch::x86_64::*;

use super::{Bytes, Simd};

/// Witness of avx2, fma and f16c.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The machine has the features that the type witnesses.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

type V = [__m256; 2];

impl Simd for Avx2 {
    type V = V;
    const TILE: usize = 6;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn select_less(self, a: V, b: V, yes: V, no: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            let less = [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])];
            [_mm256_blendv_ps(no[0], yes[0], less[0]), _mm256_blendv_ps(no[1], yes[1], less[1])]
        }
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(bit, a[0]), _mm256_andnot_ps(bit, a[1])]
        }
    }
    #[inline(always)]
    fn copy_sign(self, a: V, sign: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            let low = _mm256_or_ps(_mm256_andnot_ps(bit, a[0]), _mm256_and_ps(bit, sign[0]));
            let high = _mm256_or_ps(_mm256_andnot_ps(bit, a[1]), _mm256_and_ps(bit, sign[1]));
            [low, high]
        }
    }
    #[inline(always)]
    fn add_exponent(self, a: V, n: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(n[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(n[1]));
            [
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[0]), low)),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[1]), high)),
            ]
        }
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        // SAFETY: self witnesses the features.
        unsafe {
            let a = _mm256_add_ps(a[0], a[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    fn maximum(self, a: V) -> f32 {
        // SAFETY: self witnesses the features.
        unsafe {
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
        }
    }
    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn read_bf16(self, from: *const half::bf16) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn read_f16(self, from: *const half::f16) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let low = _mm_loadu_si128(from.cast());
            let high = _mm_loadu_si128(from.add(8).cast());
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn write(self, to: *mut f32, a: V) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            _mm256_storeu_ps(to, a[0]);
            _mm256_storeu_ps(to.add(8), a[1]);
        }
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        // SAFETY: a prefetch of any address has no effect but on caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}

/// One register of [`Bytes::shift_and_mask`]; a closure would not have the instructions of its caller.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn half_shift_and_mask(a: __m256i, shift: i32, mask: u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let shifted = match shift {
            -6 => _mm256_srli_epi16::<6>(a),
            -5 => _mm256_srli_epi16::<5>(a),
            -4 => _mm256_srli_epi16::<4>(a),
            -3 => _mm256_srli_epi16::<3>(a),
            -2 => _mm256_srli_epi16::<2>(a),
            -1 => _mm256_srli_epi16::<1>(a),
            0 => a,
            n => _mm256_sll_epi16(a, _mm_cvtsi32_si128(n)),
        };
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
    }
}

impl Bytes for Avx2 {
    type Floats = Self;
    type B = [__m256i; 2];
    type I = [__m256i; 2];
    type Four = __m256i;
    const SIGNED: bool = true;
    const WIDENS: bool = false;
    const SUMS: usize = 3;

    #[inline(always)]
    fn floats(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn read_bytes(self, from: *const u8) -> [__m256i; 2] {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn write_bytes(self, to: *mut u8, a: [__m256i; 2]) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            _mm256_storeu_si256(to.cast(), a[0]);
            _mm256_storeu_si256(to.add(32).cast(), a[1]);
        }
    }
    #[inline(always)]
    fn shift_and_mask(self, a: [__m256i; 2], shift: i32, mask: u8) -> [__m256i; 2] {
        // SAFETY: self witnesses the features.
        unsafe { [half_shift_and_mask(a[0], shift, mask), half_shift_and_mask(a[1], shift, mask)] }
    }
    #[inline(always)]
    fn add_bytes(self, a: [__m256i; 2], b: u8) -> [__m256i; 2] {
        // SAFETY: self witnesses the features.
        unsafe { a.map(|x| _mm256_add_epi8(x, _mm256_set1_epi8(b as i8))) }
    }
    #[inline(always)]
    fn or(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn look_up(self, a: [__m256i; 2], table: &[u8; 16]) -> [__m256i; 2] {
        // SAFETY: self witnesses the features; the table has 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            a.map(|x| _mm256_shuffle_epi8(table, x))
        }
    }
    #[inline(always)]
    fn no_sum(self) -> [__m256i; 2] {
        // SAFETY: self witnesses the features.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn sum_from(self, from: *const i32) -> [__m256i; 2] {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { [_mm256_set1_epi32(from.read_unaligned()); 2] }
    }
    #[inline(always)]
    unsafe fn read_four(self, from: *const u8) -> __m256i {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    fn dot<const WIDE: bool>(self, sum: [__m256i; 2], bytes: [__m256i; 2], four: __m256i) -> [__m256i; 2] {
        // SAFETY: self witnesses the features.
        unsafe {
            let one = |sum, bytes| {
                // Pairs of products stay below 2^15: 127 * 127 * 2, or, with the sign moved over, 128 * 127 * 2.
                let pairs = if WIDE {
                    let signed = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(four, signed))
                } else {
                    _mm256_maddubs_epi16(bytes, four)
                };
                _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
            [one(sum[0], bytes[0]), one(sum[1], bytes[1])]
        }
    }
    #[inline(always)]
    fn to_f32(self, a: [__m256i; 2]) -> V {
        // SAFETY: self witnesses the features.
        unsafe { a.map(|x| _mm256_cvtepi32_ps(x)) }
    }
    #[inline(always)]
    unsafe fn read_i8(self, from: *const u8) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            self.to_f32([_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))])
        }
    }
    #[inline(always)]
    unsafe fn read_u8(self, from: *const u8) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            self.to_f32([_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))])
        }
    }
    #[inline(always)]
    unsafe fn write_low_bytes(self, to: *mut u8, a: V) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let low = _mm256_set1_epi32(0xff);
            let words = a.map(|x| _mm256_and_si256(_mm256_castps_si256(x), low));
            // Packing works on halves of registers: lanes 0-3, 8-11, 4-7, 12-15, undone by the permutation.
            let words = _mm256_packus_epi32(words[0], words[1]);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        }
    }
}
