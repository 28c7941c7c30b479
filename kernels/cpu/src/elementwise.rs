//! Functions of single elements over rows.

use crate::math::{self, Function, Gate, apply, tanh};
use crate::simd::{Element, LANES, Simd};
use crate::{Kernels, Mat, MatMut};

/// `x = f(x)`, whole vectors.
#[inline(always)]
pub(crate) fn activate<S: Simd>(s: S, f: Function, values: &mut [f32]) {
    for v in values.as_chunks_mut::<LANES>().0 {
        let y = apply(s, f, s.load(v));
        s.store(v, y);
    }
}

/// Gate and up, in alternating vectors, become one.
#[inline(always)]
pub(crate) fn gate_pairs<S: Simd>(s: S, f: Gate, pairs: &[f32], out: &mut [f32]) {
    let (pairs, _) = pairs.as_chunks::<LANES>();
    for (pair, out) in pairs.chunks_exact(2).zip(out.as_chunks_mut::<LANES>().0) {
        let y = math::gate(s, f, s.load(&pair[0]), s.load(&pair[1]));
        s.store(out, y);
    }
}

/// `x = cap * tanh(x / cap)`, whole vectors.
#[inline(always)]
pub(crate) fn softcap<S: Simd>(s: S, cap: f32, values: &mut [f32]) {
    for v in values.as_chunks_mut::<LANES>().0 {
        let y = softcap_vector(s, cap, s.load(v));
        s.store(v, y);
    }
}

#[inline(always)]
pub(crate) fn softcap_vector<S: Simd>(s: S, cap: f32, x: S::V) -> S::V {
    s.mul(s.splat(cap), tanh(s, s.div(x, s.splat(cap))))
}

/// Widens whole vectors.
///
/// # Safety
/// `from` is readable for `out.len()` elements.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, E: Element>(s: S, from: *const E, out: &mut [f32]) {
    for (i, v) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { E::read(s, from.add(i * LANES)) };
        s.store(v, x);
    }
}

/// Runs a whole-vector function over a row of any length.
fn in_vectors(values: &mut [f32], mut f: impl FnMut(&mut [f32])) {
    let whole = values.len() / LANES * LANES;
    let (body, rest) = values.split_at_mut(whole);
    f(body);
    if !rest.is_empty() {
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        f(&mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

impl Kernels {
    /// `x = f(x)`
    pub fn activate(&self, f: Function, values: &mut [f32]) {
        // SAFETY: the table was chosen for this machine.
        in_vectors(values, |v| unsafe { (self.table().activate)(f, v) });
    }

    /// `x = cap * tanh(x / cap)`
    pub fn softcap(&self, cap: f32, values: &mut [f32]) {
        // SAFETY: the table was chosen for this machine.
        in_vectors(values, |v| unsafe { (self.table().softcap)(cap, v) });
    }

    /// The input's rows hold gate and up side by side, the output's what becomes of them.
    ///
    /// # Panics
    /// If the input is not twice as wide as the output.
    pub fn gate(&self, f: Gate, input: Mat<'_>, out: &mut MatMut<'_>) {
        assert!(input.cols() == 2 * out.cols() && input.rows() == out.rows(), "gate and up");
        for r in 0..out.rows() {
            let (gate, up) = input.row(r).split_at(out.cols());
            let sides = gate.chunks(LANES).zip(up.chunks(LANES));
            for (out, (gate, up)) in out.row(r).chunks_mut(LANES).zip(sides) {
                let (mut pair, mut both) = ([0.0; 2 * LANES], [0.0; LANES]);
                pair[..gate.len()].copy_from_slice(gate);
                pair[LANES..LANES + up.len()].copy_from_slice(up);
                // SAFETY: the table was chosen for this machine.
                unsafe { (self.table().gate_pairs)(f, &pair, &mut both) };
                out.copy_from_slice(&both[..out.len()]);
            }
        }
    }
}
