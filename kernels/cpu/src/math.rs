//! Elementary functions with one sequence of roundings on every instruction set and every machine.

use crate::simd::Simd;

/// Element-wise functions that a product can end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// x / (1 + exp(-x))
    Silu,
    /// The tanh approximation of GELU (Hendrycks and Gimpel, 2016).
    GeluTanh,
    /// GELU by the error function.
    GeluErf,
    /// max(x, 0)
    Relu,
    /// tanh(x)
    Tanh,
    /// 1 / (1 + exp(-x))
    Sigmoid,
    /// exp(x)
    Exp,
}

/// What a gate makes of itself and of what it gates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `f(gate) * up`
    By(Function),
    /// `g / (1 + exp(-alpha * g)) * (u + 1)` with `g = min(gate, limit)` and `u = max(min(up, limit), -limit)`.
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// The bound.
        limit: f32,
    },
}

/// exp(x) within 2 units in the last place; exactly 1 at 0, exactly 0 below -87.3, at most 2^127.5 above.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r (Cephes, expf), and n added to the exponent.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let lowest = s.splat(-87.3);
    let clamped = s.max(s.min(x, s.splat(88.37)), lowest);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    let round = s.splat(12_582_912.0);
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), round);
    let n = s.sub(shifted, round);
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    s.select_less(x, lowest, s.splat(0.0), s.add_exponent(p, shifted))
}

/// tanh(x): an odd polynomial below 0.625 (Cephes, tanhf), `1 - 2 / (exp(2x) + 1)` above.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let z = s.mul(x, x);
    let mut p = s.splat(-5.704_988_7e-3);
    for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = s.fma(p, z, s.splat(c));
    }
    let small = s.fma(s.mul(p, z), x, x);
    let one = s.splat(1.0);
    let e = exp(s, s.add(a, a));
    let large = s.sub(one, s.div(s.splat(2.0), s.add(e, one)));
    s.select_less(a, s.splat(0.625), small, s.copy_sign(large, x))
}

/// erf(x) within 2e-7: Abramowitz and Stegun, 7.1.26.
#[inline(always)]
fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(s.splat(0.327_591_1), a, one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let e = exp(s, s.sub(s.splat(0.0), s.mul(a, a)));
    s.copy_sign(s.sub(one, s.mul(s.mul(p, t), e)), x)
}

#[inline(always)]
pub(crate) fn apply<S: Simd>(s: S, f: Function, x: S::V) -> S::V {
    let half = s.splat(0.5);
    let one = s.splat(1.0);
    match f {
        Function::Silu => {
            let e = exp(s, s.sub(s.splat(0.0), x));
            s.div(x, s.add(one, e))
        }
        Function::GeluTanh => {
            let cube = s.mul(s.mul(x, x), x);
            let inner = s.mul(s.splat(0.797_884_6), s.fma(s.splat(0.044_715), cube, x));
            s.mul(s.mul(half, x), s.add(one, tanh(s, inner)))
        }
        Function::GeluErf => {
            let inner = s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2));
            s.mul(s.mul(half, x), s.add(one, erf(s, inner)))
        }
        Function::Relu => s.max(x, s.splat(0.0)),
        Function::Tanh => tanh(s, x),
        Function::Sigmoid => s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x)))),
        Function::Exp => exp(s, x),
    }
}

#[inline(always)]
pub(crate) fn gate<S: Simd>(s: S, f: Gate, gate: S::V, up: S::V) -> S::V {
    match f {
        Gate::By(f) => s.mul(apply(s, f, gate), up),
        Gate::Clamped { alpha, limit } => {
            let (limit, one) = (s.splat(limit), s.splat(1.0));
            let (gate, up) = (s.min(gate, limit), s.max(s.min(up, limit), s.sub(s.splat(0.0), limit)));
            let e = exp(s, s.mul(s.splat(-alpha), gate));
            s.mul(s.div(gate, s.add(one, e)), s.add(up, one))
        }
    }
}

/// Sine and cosine of an angle in radians, correctly rounded to f32 but for rare ties, for |x| up to 2^20.
///
/// Reduced by multiples of pi/2 in f64 and summed by Taylor series; only + and *, so it is the same on every
/// machine, unlike the C library's.
pub(crate) fn sin_cos(x: f32) -> (f32, f32) {
    // pi/2 in two parts, the first with zeros at its end so that n times it is exact for n below 2^20.
    const HIGH: f64 = f64::from_bits(0x3FF9_21FB_5440_0000);
    const LOW: f64 = 6.077_100_506_506_192e-11;
    let x = f64::from(x);
    let n = (x * std::f64::consts::FRAC_2_PI).round();
    let r = (x - n * HIGH) - n * LOW;
    let z = r * r;
    let mut sin = 0.0;
    let mut cos = 0.0;
    for k in (1..=8).rev() {
        let k = f64::from(k) * 2.0;
        cos = (1.0 + cos) * (-z / ((k - 1.0) * k));
        sin = (1.0 + sin) * (-z / (k * (k + 1.0)));
    }
    let (sin, cos) = (r + r * sin, 1.0 + cos);
    let (sin, cos) = match (n as i64) & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    };
    (sin as f32, cos as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::scalar::Scalar;

    fn close(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, range: f32, tolerance: f64) {
        for i in -2000..=2000 {
            let x = i as f32 / 2000.0 * range;
            let (found, wanted) = (f64::from(f(x)), exact(f64::from(x)));
            assert!(
                (found - wanted).abs() <= tolerance * wanted.abs().max(1.0),
                "{x}: {found}, expected {wanted}"
            );
        }
    }

    #[test]
    fn exp_is_close_and_exact_at_its_ends() {
        let f = |x: f32| exp(Scalar, [x; 16])[0];
        for i in -870..=880 {
            let x = i as f32 / 10.0;
            let relative = f64::from(f(x)) / f64::from(x).exp() - 1.0;
            assert!(relative.abs() < 2.5e-7, "{x}: off by {relative}");
        }
        assert_eq!(f(0.0), 1.0);
        assert_eq!(f(-0.0), 1.0);
        assert_eq!(f(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(f(-200.0).to_bits(), 0);
        assert!(f(1000.0).is_finite());
    }

    #[test]
    fn functions_are_close() {
        let f = |f: Function| move |x: f32| apply(Scalar, f, [x; 16])[3];
        close(f(Function::Silu), |x| x / (1.0 + (-x).exp()), 40.0, 3e-7);
        close(f(Function::Tanh), f64::tanh, 12.0, 3e-7);
        close(f(Function::Sigmoid), |x| 1.0 / (1.0 + (-x).exp()), 40.0, 3e-7);
        close(f(Function::Relu), |x| x.max(0.0), 3.0, 0.0);
        let gelu = |x: f64| 0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh());
        close(f(Function::GeluTanh), gelu, 10.0, 1e-6);
        // The two GELUs differ by less than 5e-4 everywhere; the error function itself is checked at known points.
        close(f(Function::GeluErf), gelu, 10.0, 5e-4);
        for (x, y) in
            [(0.5f32, 0.5204998778), (1.0, 0.8427007929), (2.0, 0.9953222650), (-0.25, -0.2763263902)]
        {
            assert!((f64::from(erf(Scalar, [x; 16])[0]) - y).abs() < 3e-7, "erf({x})");
        }
    }

    #[test]
    fn a_clamped_gate_is_close_and_bounded() {
        let f = |g: f32, u: f32| gate(Scalar, Gate::Clamped { alpha: 1.7, limit: 3.0 }, [g; 16], [u; 16])[5];
        let exact = |g: f64, u: f64| {
            let (g, u) = (g.min(3.0), u.clamp(-3.0, 3.0));
            g / (1.0 + (-f64::from(1.7f32) * g).exp()) * (u + 1.0)
        };
        for (g, u) in
            [(0.5, 0.25), (-2.0, 1.0), (7.0, 1.0), (1.0, 9.0), (1.0, -9.0), (-60.0, 2.0), (3.0, -3.0)]
        {
            let wanted = exact(f64::from(g), f64::from(u));
            assert!((f64::from(f(g, u)) - wanted).abs() < 2e-6, "{g}, {u}: {}, expected {wanted}", f(g, u));
        }
    }

    #[test]
    fn sin_cos_is_within_half_a_unit_or_so() {
        for i in 0..20_000 {
            let x = i as f32 * 6.7;
            let (s, c) = sin_cos(x);
            assert!((f64::from(s) - f64::from(x).sin()).abs() < 6.1e-8, "sin {x}");
            assert!((f64::from(c) - f64::from(x).cos()).abs() < 6.1e-8, "cos {x}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }
}
