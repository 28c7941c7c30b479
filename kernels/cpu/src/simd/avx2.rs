//! AVX2 with FMA: a vector is two registers, lanes 0-7 and 8-15.

use std::arch::x86_64::*;

use super::Simd;

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
