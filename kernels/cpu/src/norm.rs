//! Root mean square normalisation.

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

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0f32; PARTIALS];
    let (whole, rest) = x.as_chunks::<PARTIALS>();
    for block in whole {
        sums.iter_mut().zip(block).for_each(|(s, x)| *s += x * x);
    }
    sums.iter_mut().zip(rest).for_each(|(s, x)| *s += x * x);
    let mut half = PARTIALS / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
        half /= 2;
    }
    1.0 / (sums[0] / x.len() as f32 + eps).sqrt()
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
        }
    }
}
