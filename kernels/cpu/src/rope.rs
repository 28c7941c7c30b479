//! Rotary position embedding (Su et al., 2021).

use crate::math::sin_cos;

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// (i, i + dim / 2)
    Half,
    /// (2i, 2i + 1)
    Interleaved,
}

/// Cosines, then sines, of `position * inv_freq[i]`, times `scale`, into `out[..2 * inv_freq.len()]`. The angle is
/// rounded to f32 first, as the reference implementations do.
///
/// # Panics
/// If `out` has another length.
pub fn rope_angles(position: usize, inv_freq: &[f32], scale: f32, out: &mut [f32]) {
    assert_eq!(out.len(), 2 * inv_freq.len());
    let (cosines, sines) = out.split_at_mut(inv_freq.len());
    for ((c, s), f) in cosines.iter_mut().zip(sines).zip(inv_freq) {
        let (sin, cos) = sin_cos(position as f32 * f);
        *c = cos * scale;
        *s = sin * scale;
    }
}

/// Turns the leading `angles.len()` elements of one head.
///
/// # Panics
/// If the head is shorter.
pub fn rope(head: &mut [f32], angles: &[f32], pairing: Pairing) {
    let half = angles.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    let turn = |a: &mut f32, b: &mut f32, c: f32, s: f32| {
        let (x, y) = (*a, *b);
        *a = x * c - y * s;
        *b = y * c + x * s;
    };
    match pairing {
        Pairing::Half => {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                turn(a, b, *c, *s);
            }
        }
        Pairing::Interleaved => {
            for ((pair, c), s) in head[..2 * half].as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                let [a, b] = pair;
                turn(a, b, *c, *s);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_pairings_turn_by_the_angle() {
        let mut angles = [0.0; 4];
        rope_angles(3, &[0.5, 0.1], 2.0, &mut angles);
        let mut half = [1.0, 0.0, 0.0, 2.0, 9.0];
        rope(&mut half, &angles, Pairing::Half);
        let mut pairs = [1.0, 0.0, 0.0, 2.0, 9.0];
        rope(&mut pairs, &angles, Pairing::Interleaved);
        let (c, s) = (2.0 * 1.5f32.cos(), 2.0 * 1.5f32.sin());
        let (c1, s1) = (2.0 * 0.3f32.cos(), 2.0 * 0.3f32.sin());
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(&half, &[c, -2.0 * s1, s, 2.0 * c1, 9.0]), "{half:?}");
        assert!(close(&pairs, &[c, s, -2.0 * s1, 2.0 * c1, 9.0]), "{pairs:?}");
    }
}
