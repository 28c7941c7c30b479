//! The transposition of 32 rows on their way into a block.

use crate::kv::BLOCK_TOKENS;

/// Turns `[32][width]` elements of `BYTES` bytes into `[width][32]`. Elements are moved whole, whatever they mean.
///
/// # Panics
/// If the slices are not of `32 * width` elements.
pub(crate) fn transpose<const BYTES: usize>(rows: &[u8], width: usize, lines: &mut [u8]) {
    let bytes = BLOCK_TOKENS * width * BYTES;
    assert!(rows.len() == bytes && lines.len() == bytes, "{bytes} bytes: {}, {}", rows.len(), lines.len());
    let done = simd::<BYTES>(rows, width, lines);
    scalar::<BYTES>(rows, width, lines, done);
}

/// The columns from `first` on.
fn scalar<const BYTES: usize>(rows: &[u8], width: usize, lines: &mut [u8], first: usize) {
    let elements = rows.as_chunks::<BYTES>().0;
    let lines = lines.as_chunks_mut::<BYTES>().0.as_chunks_mut::<BLOCK_TOKENS>().0;
    // Whole lines are written, one after the other: the rows of a block fit the first cache, and a write to every line
    // for every token would not.
    for (dim, line) in lines.iter_mut().enumerate().skip(first) {
        let column = elements[dim..].iter().step_by(width);
        line.iter_mut().zip(column).for_each(|(to, from)| *to = *from);
    }
}

/// Columns that it did, from the first on.
#[cfg(not(target_arch = "x86_64"))]
fn simd<const BYTES: usize>(_rows: &[u8], _width: usize, _lines: &mut [u8]) -> usize {
    0
}

/// Columns that it did, from the first on.
#[cfg(target_arch = "x86_64")]
fn simd<const BYTES: usize>(rows: &[u8], width: usize, lines: &mut [u8]) -> usize {
    match BYTES {
        1 => x86_64::transpose::<1, 16>(rows, width, lines),
        2 => x86_64::transpose::<2, 8>(rows, width, lines),
        4 => x86_64::transpose::<4, 4>(rows, width, lines),
        _ => 0,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    //! SSE2, which every x86-64 has.

    use std::arch::x86_64::*;

    use super::BLOCK_TOKENS;

    /// Squares of `SIDE` elements of `BYTES` bytes, `SIDE * BYTES` = 16. Returns how many columns these made up.
    pub(super) fn transpose<const BYTES: usize, const SIDE: usize>(
        rows: &[u8],
        width: usize,
        lines: &mut [u8],
    ) -> usize {
        const { assert!(BYTES * SIDE == 16) };
        let (row_bytes, line_bytes) = (width * BYTES, BLOCK_TOKENS * BYTES);
        let columns = width - width % SIDE;
        for column in (0..columns).step_by(SIDE) {
            for token in (0..BLOCK_TOKENS).step_by(SIDE) {
                let mut square: [__m128i; SIDE] = std::array::from_fn(|i| {
                    let from: &[u8; 16] = rows[(token + i) * row_bytes + column * BYTES..][..16]
                        .try_into()
                        .expect("sixteen bytes");
                    // SAFETY: sixteen bytes are readable; no alignment is asked for.
                    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
                });
                // A square is transposed when its halves were interleaved as often as its side doubles.
                for _ in 0..SIDE.ilog2() {
                    square = std::array::from_fn(|i| {
                        let (a, b) = (square[i / 2], square[i / 2 + SIDE / 2]);
                        if i % 2 == 0 { low::<BYTES>(a, b) } else { high::<BYTES>(a, b) }
                    });
                }
                for (i, line) in square.into_iter().enumerate() {
                    let to: &mut [u8; 16] = (&mut lines[(column + i) * line_bytes + token * BYTES..][..16])
                        .try_into()
                        .expect("sixteen bytes");
                    // SAFETY: sixteen bytes are writable; no alignment is asked for.
                    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), line) };
                }
            }
        }
        columns
    }

    /// The lower halves' elements in turn.
    #[inline(always)]
    fn low<const BYTES: usize>(a: __m128i, b: __m128i) -> __m128i {
        // SAFETY: every x86-64 has SSE2.
        unsafe {
            match BYTES {
                1 => _mm_unpacklo_epi8(a, b),
                2 => _mm_unpacklo_epi16(a, b),
                _ => _mm_unpacklo_epi32(a, b),
            }
        }
    }

    /// The upper halves' elements in turn.
    #[inline(always)]
    fn high<const BYTES: usize>(a: __m128i, b: __m128i) -> __m128i {
        // SAFETY: every x86-64 has SSE2.
        unsafe {
            match BYTES {
                1 => _mm_unpackhi_epi8(a, b),
                2 => _mm_unpackhi_epi16(a, b),
                _ => _mm_unpackhi_epi32(a, b),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const BYTES: usize>() {
        for width in [0, 1, 3, 4, 7, 8, 16, 20, 33, 64, 128] {
            let rows: Vec<u8> =
                (0..BLOCK_TOKENS * width * BYTES).map(|i| (i * 151 + i / 251) as u8).collect();
            let mut lines = vec![0xee; rows.len()];
            transpose::<BYTES>(&rows, width, &mut lines);
            let mut wanted = vec![0xdd; rows.len()];
            scalar::<BYTES>(&rows, width, &mut wanted, 0);
            assert_eq!(lines, wanted, "{BYTES} bytes, width {width}");
            for (dim, token) in (0..width).flat_map(|dim| (0..BLOCK_TOKENS).map(move |token| (dim, token))) {
                let (from, to) = ((token * width + dim) * BYTES, (dim * BLOCK_TOKENS + token) * BYTES);
                assert_eq!(
                    rows[from..from + BYTES],
                    lines[to..to + BYTES],
                    "dimension {dim} of token {token}"
                );
            }
        }
    }

    #[test]
    fn every_element_comes_to_its_place() {
        check::<1>();
        check::<2>();
        check::<4>();
    }
}
