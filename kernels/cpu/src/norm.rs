//! Normalisation of rows, and their average.

use crate::Mat;

/// Partial sums per group, added in one fixed tree; plain multiplications and additions, so that one source gives
/// the same bits on every machine and still becomes vector code.
const PARTIALS: usize = 16;

/// `out = x / sqrt(mean(x^2) + eps) * weight`, for each group of `weight.len()` elements of a row.
///
/// # Panics
/// If the lengths differ or are no multiple of the weight's.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()), "{} by {}", x.len(), weight.len());
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let factor = inverse_rms(x, eps);
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * factor * w;
        }
    }
}

/// [`rms_norm`], added to what is there.
///
/// # Panics
/// As [`rms_norm`].
pub fn rms_norm_add(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()), "{} by {}", x.len(), weight.len());
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let factor = inverse_rms(x, eps);
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o += x * factor * w;
        }
    }
}

/// [`rms_norm`] in place.
///
/// # Panics
/// As [`rms_norm`].
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(x.len().is_multiple_of(weight.len()), "{} by {}", x.len(), weight.len());
    for x in x.chunks_exact_mut(weight.len()) {
        let factor = inverse_rms(x, eps);
        x.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * factor * w);
    }
}

/// `out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`.
///
/// # Panics
/// If the lengths differ.
pub fn layer_norm(x: &[f32], (weight, bias): (&[f32], &[f32]), eps: f32, out: &mut [f32]) {
    let len = x.len();
    assert!(out.len() == len && weight.len() == len && bias.len() == len, "{len} by {}", weight.len());
    let mean = sum(x, |x| x) / len as f32;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / len as f32;
    let factor = 1.0 / (variance + eps).sqrt();
    for (((o, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *o = (x - mean) * factor * w + b;
    }
}

/// Shortest row that [`normalize`] makes longer, as torch has it.
const LENGTH_MIN: f32 = 1e-12;

/// `out = x / max(|x|, 1e-12)`.
///
/// # Panics
/// If the lengths differ.
pub fn normalize(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let length = sum(x, |x| x * x).sqrt();
    let factor = 1.0 / if length > LENGTH_MIN { length } else { LENGTH_MIN };
    out.iter_mut().zip(x).for_each(|(o, x)| *o = x * factor);
}

/// The average of rows, added up from the first to the last.
///
/// # Panics
/// If there is no row, or the widths differ.
pub fn mean(rows: Mat<'_>, out: &mut [f32]) {
    assert!(rows.rows() > 0 && rows.cols() == out.len(), "{} rows of {}", rows.rows(), rows.cols());
    out.copy_from_slice(rows.row(0));
    for row in 1..rows.rows() {
        out.iter_mut().zip(rows.row(row)).for_each(|(o, x)| *o += x);
    }
    let factor = 1.0 / rows.rows() as f32;
    out.iter_mut().for_each(|o| *o *= factor);
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x, |x| x * x) / x.len() as f32 + eps).sqrt()
}

/// The sum of `f(x)`: partial sums of every sixteenth element, then a tree over them.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; PARTIALS];
    let (whole, rest) = x.as_chunks::<PARTIALS>();
    for block in whole {
        sums.iter_mut().zip(block).for_each(|(s, x)| *s += f(*x));
    }
    sums.iter_mut().zip(rest).for_each(|(s, x)| *s += f(*x));
    let mut half = PARTIALS / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
        half /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64() {
        for len in [1, 15, 16, 33, 128, 1000] {
            let x: Vec<f32> = (0..len * 2).map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.3).collect();
            let weight: Vec<f32> = (0..len).map(|i| 1.0 + i as f32 * 0.01).collect();
            let mut out = vec![0.0; len * 2];
            rms_norm(&x, &weight, 1e-5, &mut out);
            for (g, x) in x.chunks(len).enumerate() {
                let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / len as f64;
                for (i, &x) in x.iter().enumerate() {
                    let wanted = f64::from(x) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!((f64::from(out[g * len + i]) - wanted).abs() < 1e-5 * wanted.abs().max(1.0));
                }
            }
            let mut same = x.clone();
            rms_norm_in_place(&mut same, &weight, 1e-5);
            assert_eq!(same, out);
            let mut sum = x.clone();
            rms_norm_add(&x, &weight, 1e-5, &mut sum);
            let added = out.iter().zip(&x).map(|(norm, x)| x + norm);
            assert!(added.eq(sum.iter().copied()));
        }
    }

    /// The definition in plain loops over one element after another of each partial sum.
    fn sum_plainly(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
        let mut sums: Vec<f32> =
            (0..16).map(|lane| x.iter().skip(lane).step_by(16).fold(0.0, |s, &x| s + f(x))).collect();
        while sums.len() > 1 {
            sums = (0..sums.len() / 2).map(|i| sums[i] + sums[i + sums.len() / 2]).collect();
        }
        sums[0]
    }

    fn row(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 % 19) as f32 - 7.0) * 0.3).collect()
    }

    #[test]
    fn layer_norm_equals_plain_loops_bit_for_bit_and_agrees_with_f64() {
        for len in [1, 15, 16, 33, 128, 1000] {
            let (x, weight) = (row(len), (0..len).map(|i| 1.0 + i as f32 * 0.01).collect::<Vec<f32>>());
            let bias: Vec<f32> = (0..len).map(|i| i as f32 * 0.02 - 1.0).collect();
            let mut out = vec![0.0; len];
            layer_norm(&x, (&weight, &bias), 1e-5, &mut out);
            let mean = sum_plainly(&x, |x| x) / len as f32;
            let variance = sum_plainly(&x, |x| (x - mean) * (x - mean)) / len as f32;
            let exact = x.iter().map(|&x| f64::from(x)).sum::<f64>() / len as f64;
            let spread = x.iter().map(|&x| (f64::from(x) - exact).powi(2)).sum::<f64>() / len as f64;
            for i in 0..len {
                let wanted = (x[i] - mean) * (1.0 / (variance + 1e-5).sqrt()) * weight[i] + bias[i];
                assert_eq!(out[i].to_bits(), wanted.to_bits(), "{len}, element {i}");
                let exact = (f64::from(x[i]) - exact) / (spread + 1e-5).sqrt() * f64::from(weight[i]);
                assert!((f64::from(wanted) - exact - f64::from(bias[i])).abs() < 2e-5 * exact.abs().max(1.0));
            }
        }
    }

    #[test]
    fn a_normalized_row_has_length_1_and_nothing_stays_nothing() {
        for len in [1, 16, 33, 384] {
            let (x, mut out) = (row(len), vec![0.0; len]);
            normalize(&x, &mut out);
            let length: f64 = out.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-6, "{len}: {length}");
            let factor = 1.0 / sum_plainly(&x, |x| x * x).sqrt();
            assert!(out.iter().zip(&x).all(|(o, x)| o.to_bits() == (x * factor).to_bits()));
            normalize(&vec![0.0; len], &mut out);
            assert!(out.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn the_mean_of_rows_is_added_up_in_order() {
        let rows: Vec<f32> = (0..7 * 20).map(|i| ((i * 31 % 23) as f32 - 11.0) * 0.17).collect();
        let mut out = vec![0.0; 17];
        mean(Mat::new(&rows, 7, 17, 20), &mut out);
        for (i, found) in out.iter().enumerate() {
            let total = (1..7).fold(rows[i], |sum, row| sum + rows[row * 20 + i]);
            assert_eq!(found.to_bits(), (total * (1.0 / 7.0)).to_bits());
        }
    }
}
