//! The register tile: the one inner loop behind products and attention.
//!
//! Sixteen-lane columns of a left operand times scalars of a right one, one f32 chain per output element:
//! `sum = fma(left[k], right[k], sum)` for k ascending. How many columns and rows are in flight together changes
//! speed, never bits.

use crate::simd::{Element, LANES, Simd};

/// Where a tile reads; strides count elements. Lanes of the left operand lie side by side.
pub(crate) struct Operands<E> {
    pub(crate) left: *const E,
    /// From one group of 16 lanes (a panel) to the next.
    pub(crate) left_panel: usize,
    /// From k to k.
    pub(crate) left_step: usize,
    pub(crate) right: *const f32,
    /// From row to row.
    pub(crate) right_row: usize,
    /// From k to k.
    pub(crate) right_step: usize,
    /// Values of k.
    pub(crate) len: usize,
    /// What is asked into the cache meanwhile: an address and its distances in bytes, as the left operand's.
    pub(crate) ask: *const u8,
    pub(crate) ask_panel: usize,
    pub(crate) ask_step: usize,
    /// `[rows][panels * 16]`, read, added to and written.
    pub(crate) sums: *mut f32,
    /// From row to row of the sums.
    pub(crate) sums_row: usize,
}

/// A compiled register tile: operands, panels, rows (at most the instruction set's tile).
pub(crate) type TileFn<E> = unsafe fn(&Operands<E>, usize, usize);

/// # Safety
/// The left operand is readable, the right one too, and the sums are exclusively ours, as far as `panels`, `rows`
/// and `len` reach; `rows` is in `1..=S::TILE`.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, E: Element>(s: S, o: &Operands<E>, panels: usize, rows: usize) {
    debug_assert!(rows >= 1 && rows <= S::TILE, "{rows} rows");
    // SAFETY: each arm passes the caller's promise on for its own number of rows.
    unsafe {
        match rows {
            1 => all_panels::<S, E, 1>(s, o, panels),
            2 => all_panels::<S, E, 2>(s, o, panels),
            3 => all_panels::<S, E, 3>(s, o, panels),
            4 => all_panels::<S, E, 4>(s, o, panels),
            5 if S::TILE >= 5 => all_panels::<S, E, 5>(s, o, panels),
            6 if S::TILE >= 6 => all_panels::<S, E, 6>(s, o, panels),
            7 if S::TILE >= 7 => all_panels::<S, E, 7>(s, o, panels),
            8 if S::TILE >= 8 => all_panels::<S, E, 8>(s, o, panels),
            9 if S::TILE >= 9 => all_panels::<S, E, 9>(s, o, panels),
            10 if S::TILE >= 10 => all_panels::<S, E, 10>(s, o, panels),
            11 if S::TILE >= 11 => all_panels::<S, E, 11>(s, o, panels),
            _ if S::TILE >= 12 => all_panels::<S, E, 12>(s, o, panels),
            _ => {}
        }
    }
}

/// As many panels at a time as the registers hold.
///
/// # Safety
/// As [`run`], for `T` rows.
#[inline(always)]
unsafe fn all_panels<S: Simd, E: Element, const T: usize>(s: S, o: &Operands<E>, panels: usize) {
    let mut p = 0;
    while p < panels {
        let left = panels - p;
        // SAFETY: p + the tile's panels <= panels.
        unsafe {
            if left >= 8 && 8 * T <= S::ACCUMULATORS {
                tile::<S, E, 8, T>(s, o, p);
                p += 8;
            } else if left >= 4 && 4 * T <= S::ACCUMULATORS {
                tile::<S, E, 4, T>(s, o, p);
                p += 4;
            } else if left >= 2 && 2 * T <= S::ACCUMULATORS {
                tile::<S, E, 2, T>(s, o, p);
                p += 2;
            } else {
                tile::<S, E, 1, T>(s, o, p);
                p += 1;
            }
        }
    }
}

/// `P` panels from `first` times `T` rows.
///
/// # Safety
/// As [`run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "indices over small const bounds unroll; iterators do not")]
unsafe fn tile<S: Simd, E: Element, const P: usize, const T: usize>(s: S, o: &Operands<E>, first: usize) {
    let mut acc = [[s.splat(0.0); P]; T];
    // SAFETY: all pointers stay inside what the caller vouches for; the last steps go past it but are not read.
    unsafe {
        let sums = o.sums.add(first * LANES);
        for t in 0..T {
            for p in 0..P {
                acc[t][p] = s.read(sums.add(t * o.sums_row + p * LANES));
            }
        }
        let mut left = o.left.add(first * o.left_panel);
        let mut right = o.right;
        let mut ask = o.ask.wrapping_add(first * o.ask_panel);
        for _ in 0..o.len {
            let mut w = [s.splat(0.0); P];
            for p in 0..P {
                w[p] = E::read(s, left.add(p * o.left_panel));
                s.prefetch(ask.wrapping_add(p * o.ask_panel));
            }
            for t in 0..T {
                let x = s.splat(*right.add(t * o.right_row));
                for p in 0..P {
                    acc[t][p] = s.fma(w[p], x, acc[t][p]);
                }
            }
            left = left.wrapping_add(o.left_step);
            right = right.wrapping_add(o.right_step);
            ask = ask.wrapping_add(o.ask_step);
        }
        for t in 0..T {
            for p in 0..P {
                s.write(sums.add(t * o.sums_row + p * LANES), acc[t][p]);
            }
        }
    }
}

/// Keeps the fused multiply-add units busy for some rounds; returns the flops of one round.
#[inline(always)]
pub(crate) fn fma_burst<S: Simd>(s: S, rounds: usize) -> f64 {
    // Units of 4 cycles' latency, two of them, want 8 registers in flight; sixteen lanes may be several registers.
    if S::ACCUMULATORS >= 12 { burst::<S, 12>(s, rounds) } else { burst::<S, 6>(s, rounds) }
}

#[inline(always)]
fn burst<S: Simd, const N: usize>(s: S, rounds: usize) -> f64 {
    let mut acc = [s.splat(1.0); N];
    let (a, b) = (s.splat(std::hint::black_box(0.999)), s.splat(std::hint::black_box(1e-3)));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = s.fma(*x, a, b);
        }
    }
    for x in acc {
        std::hint::black_box(s.sum(x));
    }
    (N * LANES * 2) as f64
}
