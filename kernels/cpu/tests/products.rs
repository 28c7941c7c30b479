//! Products equal plain loops bit for bit, in every shape, on every instruction set, however they are cut.

use half::{bf16, f16};
use mainstay_kernels_cpu::{
    After, Function, Gate, Isa, Kernels, LANES, Mat, MatMut, PackedMatrix, Part, Product, SourceRows,
    WeightType, pack_tile, scratch_len,
};

fn noise(i: usize) -> f32 {
    let x = (i as u32 + 1).wrapping_mul(0x9E37_79B9);
    ((x ^ (x >> 15)).wrapping_mul(0x85EB_CA6B) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Weights as packed and as the f32 that they stand for.
fn weights(dtype: WeightType, rows: usize, cols: usize) -> (PackedMatrix, Vec<f32>) {
    let values: Vec<f32> = (0..rows * cols).map(|i| noise(i * 3)).collect();
    let bytes: Vec<u8> = match dtype {
        WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        WeightType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        WeightType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        WeightType::Codes(kind) => panic!("{kind:?} is tested elsewhere"),
    };
    let stored = values.iter().map(|&v| match dtype {
        WeightType::F32 => v,
        WeightType::F16 => f16::from_f32(v).to_f32(),
        WeightType::BF16 | WeightType::Codes(_) => bf16::from_f32(v).to_f32(),
    });
    let stored = stored.collect();
    let mut packed = PackedMatrix::zeroed(dtype, rows, cols).expect("small");
    for mut writer in packed.panels_mut(usize::MAX / 1024 / LANES / cols) {
        (0..rows).for_each(|r| writer.put(r, SourceRows { dtype, bytes: &bytes }, r, 0..cols));
    }
    (packed, stored)
}

const FUNCTIONS: [Function; 7] = [
    Function::Silu,
    Function::GeluTanh,
    Function::GeluErf,
    Function::Relu,
    Function::Tanh,
    Function::Sigmoid,
    Function::Exp,
];

/// The definition: one chain per element.
fn plainly(input: &[f32], weight: &[f32], bias: Option<&[f32]>, shape: (usize, usize, usize)) -> Vec<f32> {
    let (m, n, k) = shape;
    let mut out = Vec::with_capacity(m * n);
    for r in 0..m {
        for c in 0..n {
            let start = bias.map_or(0.0, |b| b[c]);
            let pairs = weight[c * k..][..k].iter().zip(&input[r * k..][..k]);
            out.push(pairs.fold(start, |sum, (w, x)| w.mul_add(*x, sum)));
        }
    }
    out
}

fn pack(kernels: &Kernels, input: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut packed = vec![0.0; rows * cols];
    let tile = kernels.tile_rows();
    for (place, rows) in packed.chunks_mut(tile * cols).zip(input.chunks(tile * cols)) {
        pack_tile(rows.chunks_exact(cols), place);
    }
    packed
}

/// Runs a product in parts of `panels` panels and `tiles` tiles; the output's rows are padded to whole panels.
fn multiply(kernels: &Kernels, product: &Product<'_>, panels: usize, tiles: usize, out: &mut [f32]) {
    let (all, tile) = (product.weight.panels(), kernels.tile_rows());
    let halved = if matches!(product.after, After::Gate(_)) { 2 } else { 1 };
    let stride = all * LANES / halved;
    let mut scratch = vec![f32::NAN; scratch_len(product.rows, tile)];
    for first in (0..all).step_by(panels) {
        for row in (0..product.rows).step_by(tiles * tile) {
            let part = Part {
                panels: first..(first + panels).min(all),
                rows: row..(row + tiles * tile).min(product.rows),
            };
            let (rows, cols) = (part.rows.len(), part.panels.len() * LANES / halved);
            let place = &mut out[row * stride + first * LANES / halved..];
            kernels.matmul(product, &part, &mut MatMut::new(place, rows, cols, stride), &mut scratch);
        }
    }
}

fn check(kernels: &Kernels, dtype: WeightType, shape: (usize, usize, usize), cut: (usize, usize)) {
    let (m, n, k) = shape;
    let (weight, stored) = weights(dtype, n, k);
    let input: Vec<f32> = (0..m * k).map(|i| noise(i * 7 + 1)).collect();
    let mut bias: Vec<f32> = (0..n).map(|i| noise(i + 9)).collect();
    let biased = (m + n) % 2 == 0;
    let wanted = plainly(&input, &stored, biased.then_some(&bias[..]), shape);
    bias.resize(weight.panels() * LANES, 0.0);
    let packed = pack(kernels, &input, m, k);
    let bias = biased.then_some(&bias[..]);
    let product = Product { weight: &weight, bias, input: &packed, rows: m, after: After::Store };
    let stride = weight.panels() * LANES;
    let mut out = vec![f32::NAN; m * stride];
    multiply(kernels, &product, cut.0, cut.1, &mut out);
    for r in 0..m {
        for c in 0..n {
            let (found, wanted) = (out[r * stride + c], wanted[r * n + c]);
            assert!(
                found.to_bits() == wanted.to_bits(),
                "{kernels:?}, {dtype:?}, {shape:?} cut by {cut:?}, row {r}, column {c}: {found}, not {wanted}"
            );
        }
    }
}

#[test]
fn equal_plain_loops_bit_for_bit() {
    for isa in Isa::supported() {
        let kernels = Kernels::new(isa).expect("supported");
        for dtype in [WeightType::F32, WeightType::F16, WeightType::BF16] {
            for m in 1..=33 {
                let k = [1, 7, 33, 64][m % 4];
                check(&kernels, dtype, (m, [1, 16, 40, 130][(m / 4) % 4], k), (1 + m % 9, 1 + m % 3));
            }
            for (m, k) in [(64, 300), (257, 19), (1, 513), (13, 256), (5, 257)] {
                check(&kernels, dtype, (m, 70, k), (3, 2));
                check(&kernels, dtype, (m, 70, k), (8, 100));
            }
        }
    }
}

#[test]
fn endings_apply_to_the_finished_sum() {
    for isa in Isa::supported() {
        let kernels = Kernels::new(isa).expect("supported");
        for (m, n, k) in [(1, 64, 20), (3, 32, 40), (40, 96, 300)] {
            let (weight, stored) = weights(WeightType::BF16, n, k);
            let input: Vec<f32> = (0..m * k).map(|i| noise(i * 5 + 2)).collect();
            let packed = pack(&kernels, &input, m, k);
            let sums = plainly(&input, &stored, None, (m, n, k));
            let residual: Vec<f32> = (0..m * n).map(|i| noise(i + 31)).collect();
            let product = |after| Product { weight: &weight, bias: None, input: &packed, rows: m, after };

            let mut out = residual.clone();
            multiply(&kernels, &product(After::Accumulate), 2, 1, &mut out);
            assert!(out.iter().zip(&residual).zip(&sums).all(|((o, r), s)| *o == r + s), "{isa:?}: residual");

            let scalar = Kernels::new(Isa::Scalar).expect("supported");
            for f in FUNCTIONS {
                let mut out = vec![0.0; m * n];
                multiply(&kernels, &product(After::Activate(f)), 2, 1, &mut out);
                let mut wanted = sums.clone();
                scalar.activate(f, &mut wanted);
                assert!(out == wanted, "{isa:?}: {f:?}");
            }
            let clamped = Gate::Clamped { alpha: 1.702, limit: 0.5 };
            for f in FUNCTIONS.map(Gate::By).into_iter().chain([clamped]) {
                // Panels in turn are gate and up; the plain function has them side by side.
                let mut out = vec![0.0; m * n / 2];
                multiply(&kernels, &product(After::Gate(f)), 2, 1, &mut out);
                let row = |sums: &[f32]| -> Vec<f32> {
                    let (gate, up): (Vec<_>, Vec<_>) =
                        sums.chunks(LANES).enumerate().partition(|(i, _)| i % 2 == 0);
                    gate.into_iter().chain(up).flat_map(|(_, v)| v.to_vec()).collect()
                };
                let pairs: Vec<f32> = sums.chunks(n).flat_map(row).collect();
                let mut wanted = vec![0.0; m * n / 2];
                scalar.gate(f, Mat::new(&pairs, m, n, n), &mut MatMut::new(&mut wanted, m, n / 2, n / 2));
                assert!(out == wanted, "{isa:?}: gate {f:?}");
            }
        }
    }
}

#[test]
fn elementwise_functions_equal_the_scalar_twin() {
    let scalar = Kernels::new(Isa::Scalar).expect("supported");
    let values: Vec<f32> = (0..70_001).map(|i| noise(i) * if i % 3 == 0 { 100.0 } else { 4.0 }).collect();
    for isa in Isa::supported() {
        let kernels = Kernels::new(isa).expect("supported");
        for f in FUNCTIONS {
            let (mut a, mut b) = (values.clone(), values.clone());
            kernels.activate(f, &mut a);
            scalar.activate(f, &mut b);
            assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}: {f:?}");
        }
        let (mut a, mut b) = (values.clone(), values.clone());
        kernels.softcap(30.0, &mut a);
        scalar.softcap(30.0, &mut b);
        assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}: softcap");
    }
}
