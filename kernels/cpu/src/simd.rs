//! Sixteen f32 lanes, whatever the machine has: the vocabulary that the kernels are written in.
//!
//! Every operation is correctly rounded and means the same on all instruction sets, so a kernel that is written
//! over [`Simd`] gives the same bits on each of them. A value of an implementing type is the witness that the
//! machine has the instructions: it is made only after they were detected.

pub(crate) mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod vnni;

/// Lanes of a vector, and output rows of a panel of packed weights.
pub const LANES: usize = 16;

/// Sixteen f32 and the operations on them.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;

    /// Rows of the largest register tile.
    const TILE: usize;

    /// Vectors that a register tile may accumulate without spilling.
    const ACCUMULATORS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { yes } else { no }`
    fn select_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;
    /// Magnitude.
    fn abs(self, a: Self::V) -> Self::V;
    /// The magnitude of `a` with the sign of `sign`.
    fn copy_sign(self, a: Self::V, sign: Self::V) -> Self::V;
    /// Adds the low bits of `n` (an integer n held as 1.5 * 2^23 + n) to the exponent of `a`: `a * 2^n`.
    fn add_exponent(self, a: Self::V, n: Self::V) -> Self::V;
    /// The sum over lanes as a tree: lane i with i + 8, then 4, 2, 1.
    fn sum(self, a: Self::V) -> f32;
    /// The maximum over lanes by the same tree.
    fn maximum(self, a: Self::V) -> f32;

    /// Reads sixteen values; no alignment is asked for.
    ///
    /// # Safety
    /// `from` is readable for 16 elements.
    unsafe fn read(self, from: *const f32) -> Self::V;
    /// Reads and widens sixteen values.
    ///
    /// # Safety
    /// `from` is readable for 16 elements.
    unsafe fn read_bf16(self, from: *const half::bf16) -> Self::V;
    /// Reads and widens sixteen values.
    ///
    /// # Safety
    /// `from` is readable for 16 elements.
    unsafe fn read_f16(self, from: *const half::f16) -> Self::V;
    /// Writes sixteen values; no alignment is asked for.
    ///
    /// # Safety
    /// `to` is writable for 16 elements.
    unsafe fn write(self, to: *mut f32, a: Self::V);
    /// Asks for a cache line that will be read; any address is fine.
    fn prefetch(self, from: *const u8);

    /// Sixteen values.
    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        // SAFETY: the array has sixteen elements.
        unsafe { self.read(from.as_ptr()) }
    }
    /// Sixteen values.
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], a: Self::V) {
        // SAFETY: the array has sixteen elements.
        unsafe { self.write(to.as_mut_ptr(), a) }
    }
}

/// What weights, keys and values are stored as; widening to f32 is exact.
pub(crate) trait Element: Copy + 'static {
    /// Reads and widens sixteen elements.
    ///
    /// # Safety
    /// `from` is readable for 16 elements.
    unsafe fn read<S: Simd>(s: S, from: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn read<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.read(from) }
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.read_bf16(from) }
    }
}

impl Element for half::f16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.read_f16(from) }
    }
}

/// Bytes and the integers that they add up to: what quantized products are written in, beside [`Simd`]. All results
/// are exact, so there is nothing to round.
pub(crate) trait Bytes: Copy {
    /// The same machine's f32.
    type Floats: Simd;
    /// 64 bytes.
    type B: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Four bytes of activations, for each of sixteen lanes.
    type Four: Copy;

    /// Whether dot products take wide bytes for themselves less 128; else a sum has to begin with -128 times that of
    /// the activations.
    const SIGNED: bool;

    /// Whether codes are best unpacked to wide bytes, though they have fewer bits.
    const WIDENS: bool;

    /// Register tiles of integer and f32 sums that do not spill: vectors of each.
    const SUMS: usize;

    /// The same machine's f32.
    fn floats(self) -> Self::Floats;
    /// Reads 64 bytes; no alignment is asked for.
    ///
    /// # Safety
    /// `from` is readable for 64 bytes.
    unsafe fn read_bytes(self, from: *const u8) -> Self::B;
    /// Writes 64 bytes; no alignment is asked for.
    ///
    /// # Safety
    /// `to` is writable for 64 bytes.
    unsafe fn write_bytes(self, to: *mut u8, a: Self::B);
    /// Each byte's bits `shift` places up (down where negative, 6 at most), then `& mask`, which holds no bit that a
    /// neighbour's bits come to.
    fn shift_and_mask(self, a: Self::B, shift: i32, mask: u8) -> Self::B;
    /// `a + b`, without carries between bytes.
    fn add_bytes(self, a: Self::B, b: u8) -> Self::B;
    /// `a | b`
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// Each byte `a`, below 16, becomes entry `a`.
    fn look_up(self, a: Self::B, table: &[u8; 16]) -> Self::B;
    /// Sixteen zeros.
    fn no_sum(self) -> Self::I;
    /// One number for all lanes.
    ///
    /// # Safety
    /// `from` is readable.
    unsafe fn sum_from(self, from: *const i32) -> Self::I;
    /// Reads four bytes for all lanes.
    ///
    /// # Safety
    /// `from` is readable for 4 bytes.
    unsafe fn read_four(self, from: *const u8) -> Self::Four;
    /// Lane i of the sum grows by the products of bytes 4 i to 4 i + 3 with the four signed numbers, none of them
    /// -128. The bytes are below 128; or, if `WIDE`, any: see [`Bytes::SIGNED`].
    fn dot<const WIDE: bool>(self, sum: Self::I, bytes: Self::B, four: Self::Four) -> Self::I;
    /// Exact below 2^24.
    fn to_f32(self, a: Self::I) -> <Self::Floats as Simd>::V;
    /// Reads sixteen signed bytes.
    ///
    /// # Safety
    /// `from` is readable for 16 bytes.
    unsafe fn read_i8(self, from: *const u8) -> <Self::Floats as Simd>::V;
    /// Reads sixteen unsigned bytes.
    ///
    /// # Safety
    /// `from` is readable for 16 bytes.
    unsafe fn read_u8(self, from: *const u8) -> <Self::Floats as Simd>::V;
    /// Writes the lowest byte of each lane's bits.
    ///
    /// # Safety
    /// `to` is writable for 16 bytes.
    unsafe fn write_low_bytes(self, to: *mut u8, a: <Self::Floats as Simd>::V);
}
