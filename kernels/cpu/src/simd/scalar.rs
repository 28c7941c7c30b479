//! The twin of every vector path: sixteen lanes one after another, in safe arithmetic that runs anywhere.

use super::{Bytes, LANES, Simd};

/// Needs no instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn tree(mut a: V, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            a[i] = f(a[i], a[i + half]);
        }
        half /= 2;
    }
    a[0]
}

impl Simd for Scalar {
    type V = V;
    const TILE: usize = 4;
    const ACCUMULATORS: usize = 4;

    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    fn select_less(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    fn abs(self, a: V) -> V {
        a.map(f32::abs)
    }
    fn copy_sign(self, a: V, sign: V) -> V {
        zip(a, sign, f32::copysign)
    }
    fn add_exponent(self, a: V, n: V) -> V {
        zip(a, n, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }
    fn sum(self, a: V) -> f32 {
        tree(a, |a, b| a + b)
    }
    fn maximum(self, a: V) -> f32 {
        tree(a, |a, b| if a > b { a } else { b })
    }
    unsafe fn read(self, from: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<V>().read_unaligned() }
    }
    unsafe fn read_bf16(self, from: *const half::bf16) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[half::bf16; LANES]>().read_unaligned() }.map(half::bf16::to_f32)
    }
    unsafe fn read_f16(self, from: *const half::f16) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[half::f16; LANES]>().read_unaligned() }.map(half::f16::to_f32)
    }
    unsafe fn write(self, to: *mut f32, a: V) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<V>().write_unaligned(a) }
    }
    fn prefetch(self, _from: *const u8) {}
}

impl Bytes for Scalar {
    type Floats = Self;
    type B = [u8; 64];
    type I = [i32; LANES];
    type Four = [i8; 4];
    const SIGNED: bool = false;
    const WIDENS: bool = true;
    const SUMS: usize = 4;

    fn floats(self) -> Self {
        self
    }
    unsafe fn read_bytes(self, from: *const u8) -> [u8; 64] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u8; 64]>().read_unaligned() }
    }
    unsafe fn write_bytes(self, to: *mut u8, a: [u8; 64]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; 64]>().write_unaligned(a) }
    }
    fn shift_and_mask(self, a: [u8; 64], shift: i32, mask: u8) -> [u8; 64] {
        a.map(|x| mask & if shift < 0 { x >> -shift } else { x << shift })
    }
    fn add_bytes(self, a: [u8; 64], b: u8) -> [u8; 64] {
        a.map(|x| x.wrapping_add(b))
    }
    fn or(self, a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    fn look_up(self, a: [u8; 64], table: &[u8; 16]) -> [u8; 64] {
        a.map(|x| table[usize::from(x)])
    }
    fn no_sum(self) -> [i32; LANES] {
        [0; LANES]
    }
    unsafe fn sum_from(self, from: *const i32) -> [i32; LANES] {
        // SAFETY: the caller's promise.
        [unsafe { from.read_unaligned() }; LANES]
    }
    unsafe fn read_four(self, from: *const u8) -> [i8; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; 4]>().read_unaligned() }
    }
    fn dot<const WIDE: bool>(self, sum: [i32; LANES], bytes: [u8; 64], four: [i8; 4]) -> [i32; LANES] {
        debug_assert!(WIDE || bytes.iter().all(|b| *b < 128), "bytes of {bytes:?}");
        std::array::from_fn(|lane| {
            let products = bytes[lane * 4..][..4].iter().zip(four);
            sum[lane] + products.map(|(b, x)| i32::from(*b) * i32::from(x)).sum::<i32>()
        })
    }
    fn to_f32(self, a: [i32; LANES]) -> V {
        a.map(|x| x as f32)
    }
    unsafe fn read_i8(self, from: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    unsafe fn read_u8(self, from: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(f32::from)
    }
    unsafe fn write_low_bytes(self, to: *mut u8, a: V) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(a.map(|x| x.to_bits() as u8)) }
    }
}
