//! Made-up blocks, for measurements and tests: any bits are codes, only the scales over a block must make sense.

use half::f16;

use super::Format;
use crate::weights::DType;

/// Where a block has half-precision numbers, and what they are where weights are to reach about 1.
fn halves(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        DType::Q8_0 => &[(0, 1.0 / 128.0)],
        DType::Q4_0 => &[(0, 1.0 / 8.0)],
        DType::Q4_1 => &[(0, 1.0 / 7.5), (2, -1.0)],
        DType::Q5_0 => &[(0, 1.0 / 16.0)],
        DType::Q5_1 => &[(0, 1.0 / 15.5), (2, -1.0)],
        DType::Q2K => &[(80, 1.0 / 11.0), (82, 1.0 / 7.5)],
        DType::Q3K => &[(108, 1.0 / 64.0)],
        DType::Q4K => &[(0, 1.0 / 240.0), (2, 1.0 / 32.0)],
        DType::Q5K => &[(0, 1.0 / 500.0), (2, 1.0 / 32.0)],
        DType::Q6K => &[(208, 1.0 / 2048.0)],
        DType::Iq4Nl => &[(0, 1.0 / 113.0)],
        _ => &[],
    }
}

/// Appends rows of a type that has blocks: weights around 0 that reach about `most`, from the random numbers `next`.
///
/// # Panics
/// If the type has no blocks, or a row is not made of whole ones.
pub fn seeded_blocks(
    (dtype, most): (DType, f32),
    (rows, cols): (usize, usize),
    mut next: impl FnMut() -> u64,
    out: &mut Vec<u8>,
) {
    let format = Format::of(dtype).unwrap_or_else(|| panic!("{dtype:?} has no blocks"));
    let row_bytes = dtype.row_bytes(cols).unwrap_or_else(|| panic!("{cols} columns of {dtype:?}"));
    let start = out.len();
    out.resize((start + rows * row_bytes).next_multiple_of(8), 0);
    out[start..].chunks_mut(8).for_each(|to| to.copy_from_slice(&next().to_le_bytes()[..to.len()]));
    out.truncate(start + rows * row_bytes);
    for block in out[start..].chunks_exact_mut(format.block_bytes) {
        // From half to all of it, by a byte that is random already.
        let most = most * (0.5 + f32::from(block[format.block_bytes / 2]) / 510.0);
        for (at, of_one) in halves(dtype) {
            block[*at..at + 2].copy_from_slice(&f16::from_f32(most * of_one).to_le_bytes());
        }
        if dtype == DType::Mxfp4 {
            // A power of two over integers up to 12, doubled values of the format: 2^(e - 128).
            block[0] = (128.0 + (most / 12.0).log2().round()) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Block;

    #[test]
    fn weights_are_around_zero_and_reach_what_was_asked() {
        for dtype in DType::BLOCKS {
            let (mut state, mut bytes) = (1u64, Vec::new());
            let next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state ^ (state >> 33)
            };
            seeded_blocks((dtype, 0.5), (8, 512), next, &mut bytes);
            let format = Format::of(dtype).expect("blocks");
            let (mut block, mut row) = (Block::default(), vec![0.0; format.block_len]);
            let (mut sum, mut most) = (0.0f32, 0.0f32);
            for bytes in bytes.chunks(format.block_bytes) {
                format.decode(bytes, &mut block);
                block.read(format, &mut row);
                sum += row.iter().sum::<f32>();
                most = row.iter().fold(most, |a, b| a.max(b.abs()));
            }
            let mean = sum / 4096.0;
            assert!(mean.abs() < 0.15 && most > 0.25 && most < 3.0, "{dtype:?}: mean {mean}, up to {most}");
        }
    }
}
