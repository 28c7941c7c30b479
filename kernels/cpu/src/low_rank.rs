//! The two thin products of an adapter, in separate multiplications and additions of f32: the same bits on every
//! machine, whatever the rows beside them.

use crate::simd::LANES;

/// Columns of an adapter's second product that are summed together.
const BLOCK: usize = 4 * LANES;

/// `scale * (a . x)`. Lane `i` sums the products at `i, i + 16, ...` in ascending order; then lanes are added to those
/// 8, 4, 2 and 1 below.
///
/// # Panics
/// If the lengths differ.
pub fn low_rank_in(x: &[f32], a: &[f32], scale: f32) -> f32 {
    assert_eq!(x.len(), a.len(), "a row of A is as wide as the input");
    let mut lanes = [0.0f32; LANES];
    let (whole_x, rest_x) = x.as_chunks::<LANES>();
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    for (x, a) in whole_x.iter().zip(whole_a) {
        lanes.iter_mut().zip(x.iter().zip(a)).for_each(|(sum, (x, a))| *sum += x * a);
    }
    lanes.iter_mut().zip(rest_x.iter().zip(rest_a)).for_each(|(sum, (x, a))| *sum += x * a);
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    scale * lanes[0]
}

/// `out[i] += sum over r of low[r] * b[r][first + i]`, r ascending; `b` is `[low.len()][rows]`.
///
/// # Panics
/// If `b` is shorter.
pub fn low_rank_out(low: &[f32], b: &[f32], (rows, first): (usize, usize), out: &mut [f32]) {
    assert!(b.len() >= low.len() * rows && first + out.len() <= rows, "{} of {rows} from {first}", out.len());
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let first = first + block * BLOCK;
        let mut sums = [0.0f32; BLOCK];
        for (r, low) in low.iter().enumerate() {
            let b = &b[r * rows + first..][..out.len()];
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += low * b);
        }
        out.iter_mut().zip(&sums).for_each(|(out, sum)| *out += sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32)
            .map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    }

    #[test]
    fn products_are_those_of_f64_within_rounding() {
        for cols in [1, 15, 16, 33, 200] {
            let (x, a) = (numbers(cols, 1), numbers(cols, 2));
            let want: f64 = x.iter().zip(&a).map(|(x, a)| f64::from(*x) * f64::from(*a)).sum();
            let found = f64::from(low_rank_in(&x, &a, 0.5));
            assert!((found - want / 2.0).abs() < 1e-5, "{cols}: {found} of {}", want / 2.0);
        }
        for (rank, rows) in [(1, 1), (3, 65), (16, 130)] {
            let (low, b, mut out) = (numbers(rank, 3), numbers(rank * rows, 4), numbers(rows, 5));
            let before = out.clone();
            low_rank_out(&low, &b, (rows, 0), &mut out);
            for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                let want: f64 = (0..rank).map(|r| f64::from(low[r]) * f64::from(b[r * rows + i])).sum();
                assert!((f64::from(out - before) - want).abs() < 1e-5, "{rank} {rows} {i}");
            }
        }
    }

    #[test]
    fn a_part_has_the_bits_of_the_whole() {
        let (low, b, rows) = (numbers(7, 1), numbers(7 * 300, 2), 300);
        let mut whole = numbers(rows, 3);
        let mut parts = whole.clone();
        low_rank_out(&low, &b, (rows, 0), &mut whole);
        for first in (0..rows).step_by(48) {
            let end = (first + 48).min(rows);
            low_rank_out(&low, &b, (rows, first), &mut parts[first..end]);
        }
        assert_eq!(whole, parts);
    }
}
