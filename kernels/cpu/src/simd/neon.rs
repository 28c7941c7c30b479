//! NEON: a vector is four registers of four lanes.

use std::arch::aarch64::*;

use super::{Bytes, LANES, Simd};

/// Witness of neon.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// # Safety
    /// The machine has the features that the type witnesses.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

type V = [float32x4_t; 4];

macro_rules! each {
    (|$i:ident| $body:expr) => {{
        let mut out = [vdupq_n_f32(0.0); 4];
        let mut $i = 0;
        while $i < 4 {
            out[$i] = $body;
            $i += 1;
        }
        out
    }};
}

impl Simd for Neon {
    type V = V;
    const TILE: usize = 6;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: self witnesses the features.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vaddq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vsubq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vmulq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vdivq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])) }
    }
    #[inline(always)]
    fn select_less(self, a: V, b: V, yes: V, no: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vbslq_f32(vcltq_f32(a[i], b[i]), yes[i], no[i])) }
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe { each!(|i| vabsq_f32(a[i])) }
    }
    #[inline(always)]
    fn copy_sign(self, a: V, sign: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            let bit = vdupq_n_u32(0x8000_0000);
            each!(|i| vbslq_f32(bit, sign[i], a[i]))
        }
    }
    #[inline(always)]
    fn add_exponent(self, a: V, n: V) -> V {
        // SAFETY: self witnesses the features.
        unsafe {
            each!(|i| {
                let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[i]));
                vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a[i]), n))
            })
        }
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        // SAFETY: self witnesses the features.
        unsafe {
            let a = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let a = vadd_f32(vget_low_f32(a), vget_high_f32(a));
            vget_lane_f32::<0>(a) + vget_lane_f32::<1>(a)
        }
    }
    #[inline(always)]
    fn maximum(self, a: V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, a);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] = if lanes[i] > lanes[i + half] { lanes[i] } else { lanes[i + half] };
            }
            half /= 2;
        }
        lanes[0]
    }
    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { each!(|i| vld1q_f32(from.add(4 * i))) }
    }
    #[inline(always)]
    unsafe fn read_bf16(self, from: *const half::bf16) -> V {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            each!(|i| {
                let narrow = vld1_u16(from.add(4 * i).cast());
                vreinterpretq_f32_u32(vshll_n_u16::<16>(narrow))
            })
        }
    }
    #[inline(always)]
    unsafe fn read_f16(self, from: *const half::f16) -> V {
        // SAFETY: the caller's promise.
        let narrow = unsafe { from.cast::<[half::f16; LANES]>().read_unaligned() };
        self.load(&narrow.map(half::f16::to_f32))
    }
    #[inline(always)]
    unsafe fn write(self, to: *mut f32, a: V) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            for (i, &part) in a.iter().enumerate() {
                vst1q_f32(to.add(4 * i), part);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, _from: *const u8) {}
}

impl Bytes for Neon {
    type Floats = Self;
    type B = [uint8x16_t; 4];
    type I = [int32x4_t; 4];
    type Four = int8x16_t;
    const SIGNED: bool = true;
    const WIDENS: bool = false;
    const SUMS: usize = 3;

    #[inline(always)]
    fn floats(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn read_bytes(self, from: *const u8) -> Self::B {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { [vld1q_u8(from), vld1q_u8(from.add(16)), vld1q_u8(from.add(32)), vld1q_u8(from.add(48))] }
    }
    #[inline(always)]
    unsafe fn write_bytes(self, to: *mut u8, a: Self::B) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            for (i, &part) in a.iter().enumerate() {
                vst1q_u8(to.add(16 * i), part);
            }
        }
    }
    #[inline(always)]
    fn shift_and_mask(self, a: Self::B, shift: i32, mask: u8) -> Self::B {
        // SAFETY: self witnesses the features.
        unsafe {
            let (shift, mask) = (vdupq_n_s8(shift as i8), vdupq_n_u8(mask));
            a.map(|x| vandq_u8(vshlq_u8(x, shift), mask))
        }
    }
    #[inline(always)]
    fn add_bytes(self, a: Self::B, b: u8) -> Self::B {
        // SAFETY: self witnesses the features.
        unsafe { a.map(|x| vaddq_u8(x, vdupq_n_u8(b))) }
    }
    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        // SAFETY: self witnesses the features.
        unsafe { [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1]), vorrq_u8(a[2], b[2]), vorrq_u8(a[3], b[3])] }
    }
    #[inline(always)]
    fn look_up(self, a: Self::B, table: &[u8; 16]) -> Self::B {
        // SAFETY: self witnesses the features; the table has 16 bytes.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            a.map(|x| vqtbl1q_u8(table, x))
        }
    }
    #[inline(always)]
    fn no_sum(self) -> Self::I {
        // SAFETY: self witnesses the features.
        unsafe { [vdupq_n_s32(0); 4] }
    }
    #[inline(always)]
    unsafe fn sum_from(self, from: *const i32) -> Self::I {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { [vdupq_n_s32(from.read_unaligned()); 4] }
    }
    #[inline(always)]
    unsafe fn read_four(self, from: *const u8) -> int8x16_t {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(from.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    fn dot<const WIDE: bool>(self, sum: Self::I, bytes: Self::B, four: int8x16_t) -> Self::I {
        // SAFETY: self witnesses the features.
        unsafe {
            let one = |sum, bytes| {
                let bytes = if WIDE { veorq_u8(bytes, vdupq_n_u8(128)) } else { bytes };
                let bytes = vreinterpretq_s8_u8(bytes);
                // Pairs of products stay within 2^15: 128 * 127 * 2.
                let low = vmull_s8(vget_low_s8(bytes), vget_low_s8(four));
                let high = vmull_high_s8(bytes, four);
                vpadalq_s16(sum, vpaddq_s16(low, high))
            };
            [one(sum[0], bytes[0]), one(sum[1], bytes[1]), one(sum[2], bytes[2]), one(sum[3], bytes[3])]
        }
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> V {
        // SAFETY: self witnesses the features.
        unsafe { a.map(|x| vcvtq_f32_s32(x)) }
    }
    #[inline(always)]
    unsafe fn read_i8(self, from: *const u8) -> V {
        // SAFETY: the caller's promise.
        let bytes = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        self.load(&bytes.map(f32::from))
    }
    #[inline(always)]
    unsafe fn read_u8(self, from: *const u8) -> V {
        // SAFETY: the caller's promise.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        self.load(&bytes.map(f32::from))
    }
    #[inline(always)]
    unsafe fn write_low_bytes(self, to: *mut u8, a: V) {
        // SAFETY: self witnesses the features; the pointer is the caller's promise.
        unsafe {
            let words = a.map(|x| vmovn_u32(vreinterpretq_u32_f32(x)));
            let low = vmovn_u16(vcombine_u16(words[0], words[1]));
            let high = vmovn_u16(vcombine_u16(words[2], words[3]));
            vst1q_u8(to, vcombine_u8(low, high));
        }
    }
}
