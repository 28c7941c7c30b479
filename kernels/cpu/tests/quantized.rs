//! Quantized products equal their definition bit for bit, on every instruction set, however they are cut, and are as
//! close to exact products as 8-bit activations allow.

use half::f16;
use mainstay_kernels_cpu::{
    After, BLOCK, Form, Function, Gate, Integers, Isa, Kernels, Kind, LANES, Mat, MatMut, PackedMatrix, Part,
    Product, Reserve, WeightType, scratch_len,
};

const UNEVEN: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
const FLOAT: [i8; 15] = [0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12];

fn bits(i: usize) -> u32 {
    let x = (i as u32 + 1).wrapping_mul(0x9E37_79B9);
    (x ^ (x >> 15)).wrapping_mul(0x85EB_CA6B) >> 8
}

fn noise(i: usize) -> f32 {
    bits(i) as f32 / (1 << 23) as f32 - 1.0
}

/// Whether a kind has minima, and whether its scales are integers under a scale.
fn traits(kind: Kind) -> (bool, bool) {
    let minima = [Kind::FourMin, Kind::FiveMin, Kind::NestedTwoMin, Kind::NestedFourMin, Kind::NestedFiveMin];
    (minima.contains(&kind), kind.block_len() > BLOCK)
}

/// An integer that the kind can hold; extremes are frequent.
fn integer(kind: Kind, i: usize) -> i8 {
    let r = bits(i);
    let (least, most) = match kind {
        Kind::FourUneven => return UNEVEN[r as usize % 16],
        Kind::FourFloat => return FLOAT[r as usize % 15],
        Kind::Eight | Kind::EightF32 => (-128, 127),
        Kind::Four => (-8, 7),
        Kind::FourMin | Kind::NestedFourMin => (0, 15),
        // Any sixteen integers in a row; here from -11 on.
        Kind::FourZero => (-11, 4),
        Kind::Five => (-16, 15),
        Kind::FiveMin | Kind::NestedFiveMin => (0, 31),
        Kind::NestedTwoMin => (0, 3),
        Kind::NestedThree => (-4, 3),
        Kind::NestedSix => (-32, 31),
    };
    match r % 8 {
        0 => least,
        1 => most,
        _ => (least as i32 + (r / 8) as i32 % (most as i32 - least as i32 + 1)) as i8,
    }
}

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn weights(kind: Kind, seed: usize) -> Integers {
    let (minima, nested) = traits(kind);
    let scale = if matches!(kind, Kind::EightF32 | Kind::FourZero | Kind::FourFloat) {
        noise(seed) * 0.02
    } else {
        half(noise(seed) * 0.02)
    };
    let mut w = Integers { scale, ..Integers::ZERO };
    if minima {
        w.minimum = half(noise(seed + 7) * 0.1);
    }
    for s in 0..16 {
        w.scales[s] = if nested { (bits(seed * 16 + s) % 64) as i8 } else { 1 };
        w.minima[s] = match (minima, nested) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => (bits(seed * 16 + s + 5) % 64) as u8,
        };
        if nested && !minima && s % 3 == 0 {
            w.scales[s] = -w.scales[s];
        }
    }
    for i in 0..kind.block_len() {
        w.integers[i] = integer(kind, seed * 256 + i);
    }
    w
}

/// A matrix as its rows' blocks, and packed.
struct Matrix {
    kind: Kind,
    rows: Vec<Vec<Integers>>,
    cols: usize,
    packed: PackedMatrix,
}

fn fill(packed: &mut PackedMatrix, rows: &[Vec<Integers>], kinds: &[Kind]) {
    let mut first = 0;
    for mut writer in packed.panels_mut(3) {
        for panel in 0..writer.panels() {
            let own = &rows[(first + panel) * LANES..((first + panel + 1) * LANES).min(rows.len())];
            for block in 0..own[0].len() {
                let blocks: Vec<Integers> = own.iter().map(|row| row[block]).collect();
                writer.put_integers(panel, block * kinds[first + panel].block_len(), &blocks);
            }
        }
        first += writer.panels();
    }
}

fn matrix(kind: Kind, rows: usize, cols: usize) -> Matrix {
    let blocks = cols.div_ceil(kind.block_len());
    let own: Vec<Vec<Integers>> =
        (0..rows).map(|r| (0..blocks).map(|b| weights(kind, r * 97 + b)).collect()).collect();
    let mut packed = PackedMatrix::zeroed(WeightType::Codes(kind), rows, cols).expect("small");
    let panels = packed.panels();
    fill(&mut packed, &own, &vec![kind; panels]);
    Matrix { kind, rows: own, cols, packed }
}

/// Weight number `i` of a row, and its integer, scale and minimum.
fn weight(kind: Kind, row: &[Integers], i: usize) -> (f32, i8, f32, f32) {
    let (block, i) = (&row[i / kind.block_len()], i % kind.block_len());
    let sub = i / kind.sub_len();
    let scale = block.scale * f32::from(block.scales[sub]);
    let minimum = block.minimum * f32::from(block.minima[sub]);
    (scale * f32::from(block.integers[i]) - minimum, block.integers[i], scale, minimum)
}

/// Numbers and size of each block of a row.
fn quantized(x: &[f32]) -> Vec<([i32; BLOCK], f32)> {
    let block = |x: &[f32]| {
        let greatest = x.iter().fold(0f32, |a, b| a.max(b.abs()));
        let inverse = if greatest < 2f32.powi(-100) { 0.0 } else { 127.0 / greatest };
        let size = if greatest < 2f32.powi(-100) { 0.0 } else { greatest / 127.0 };
        (std::array::from_fn(|i| (x[i] * inverse).round_ties_even() as i32), size)
    };
    x.chunks(BLOCK).map(block).collect()
}

/// The definition.
fn plainly(m: &Matrix, row: &[Integers], x: &[([i32; BLOCK], f32)], start: f32) -> f32 {
    let (minima, _) = traits(m.kind);
    let mut sum = start;
    for (b, (numbers, size)) in x.iter().enumerate() {
        let mut part = 0.0;
        for first in (0..BLOCK).step_by(m.kind.sub_len()) {
            let own = first..first + m.kind.sub_len();
            let (_, _, scale, minimum) = weight(m.kind, row, b * BLOCK + first);
            let n: i32 =
                own.clone().map(|i| i32::from(weight(m.kind, row, b * BLOCK + i).1) * numbers[i]).sum();
            let q: i32 = numbers[own].iter().sum();
            part = if first == 0 { n as f32 * scale } else { (n as f32).mul_add(scale, part) };
            if minima {
                part = (-minimum).mul_add(q as f32, part);
            }
        }
        sum = part.mul_add(*size, sum);
    }
    sum
}

fn quantize(kernels: &Kernels, input: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let per_row = Form::Integers.input_len(1, cols);
    let mut packed = vec![f32::NAN; rows * per_row];
    let tile = kernels.tile_rows();
    for (place, rows) in packed.chunks_mut(tile * per_row).zip(input.chunks(tile * cols)) {
        kernels.quantize_tile(rows.chunks_exact(cols), place);
    }
    packed
}

/// Runs a product in parts of `panels` panels and `tiles` tiles.
fn multiply(kernels: &Kernels, product: &Product<'_>, (panels, tiles): (usize, usize), out: &mut [f32]) {
    let (all, tile) = (product.weight.panels(), kernels.tile_rows());
    let halved = if matches!(product.after, After::Gate(_)) { 2 } else { 1 };
    let stride = all * LANES / halved;
    // Not on a cache line, as a caller's may be.
    let mut scratch = vec![f32::NAN; scratch_len(product.rows, tile) + 1];
    for first in (0..all).step_by(panels) {
        for row in (0..product.rows).step_by(tiles * tile) {
            let part = Part {
                panels: first..(first + panels).min(all),
                rows: row..(row + tiles * tile).min(product.rows),
            };
            let (rows, cols) = (part.rows.len(), part.panels.len() * LANES / halved);
            let place = &mut out[row * stride + first * LANES / halved..];
            kernels.matmul(product, &part, &mut MatMut::new(place, rows, cols, stride), &mut scratch[1..]);
        }
    }
}

fn activations(rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| noise(i * 7 + 1) * if i % 29 == 0 { 9.0 } else { 0.7 }).collect()
}

fn check(kernels: &Kernels, m: &Matrix, rows: usize, cut: (usize, usize)) {
    let input = activations(rows, m.cols);
    let mut bias: Vec<f32> = (0..m.rows.len()).map(|i| noise(i + 9)).collect();
    bias.resize(m.packed.panels() * LANES, 0.0);
    let packed = quantize(kernels, &input, rows, m.cols);
    let product = Product { weight: &m.packed, bias: Some(&bias), input: &packed, rows, after: After::Store };
    let stride = m.packed.panels() * LANES;
    let mut out = vec![f32::NAN; rows * stride];
    multiply(kernels, &product, cut, &mut out);
    for r in 0..rows {
        let x = quantized(&input[r * m.cols..][..m.cols]);
        for (c, row) in m.rows.iter().enumerate() {
            let (found, wanted) = (out[r * stride + c], plainly(m, row, &x, bias[c]));
            assert!(
                found.to_bits() == wanted.to_bits(),
                "{kernels:?}, {:?}, {rows} rows of {} cut by {cut:?}: row {r}, column {c}: {found}, not {wanted}",
                m.kind,
                m.cols
            );
        }
    }
}

#[test]
fn equal_the_definition_bit_for_bit() {
    for kind in Kind::ALL {
        let len = kind.block_len();
        for (n, cols) in [(40, len), (70, len * 3), (130, (256 / len + 1) * len)] {
            let m = matrix(kind, n, cols);
            for kernels in Isa::supported().map(|isa| Kernels::new(isa).expect("supported")) {
                for rows in [1, 2, 3, 5, 7, 12, 13] {
                    check(&kernels, &m, rows, (1 + rows % 9, 1 + rows % 2));
                }
            }
        }
    }
}

#[test]
fn every_number_of_rows_and_every_cut_gives_the_same_bits() {
    for kind in [Kind::Eight, Kind::Four, Kind::NestedFourMin, Kind::NestedSix, Kind::NestedTwoMin] {
        let m = matrix(kind, 70, 512);
        for kernels in Isa::supported().map(|isa| Kernels::new(isa).expect("supported")) {
            for rows in (1..=33).chain([64, 257]) {
                if kernels.isa() == Isa::Scalar && rows > 9 {
                    continue;
                }
                check(&kernels, &m, rows, ([1, 2, 5, 100][rows % 4], 1 + rows % 3));
            }
        }
    }
}

#[test]
fn gathered_rows_are_the_weights() {
    for kind in Kind::ALL {
        let m = matrix(kind, 37, kind.block_len() * 3);
        let mut out = vec![f32::NAN; m.cols];
        for (r, row) in m.rows.iter().enumerate() {
            m.packed.gather(r, &mut out);
            for (i, found) in out.iter().enumerate() {
                let wanted = weight(kind, row, i).0;
                assert!(found.to_bits() == wanted.to_bits(), "{kind:?}, {r}, {i}: {found}, not {wanted}");
            }
        }
    }
}

#[test]
fn panels_of_several_kinds_are_one_product() {
    let kinds = [Kind::NestedFourMin, Kind::NestedSix, Kind::NestedFourMin, Kind::Eight, Kind::Eight];
    let (rows, cols) = (5 * LANES, 512);
    let whole: Vec<Matrix> = kinds.iter().map(|kind| matrix(*kind, rows, cols)).collect();
    let types = kinds.map(WeightType::Codes);
    let mut packed = PackedMatrix::mixed(&types, (rows, cols), &mut Reserve::default()).expect("memory");
    let own: Vec<Vec<Integers>> = (0..rows).map(|r| whole[r / LANES].rows[r].clone()).collect();
    fill(&mut packed, &own, &kinds);
    for kernels in Isa::supported().map(|isa| Kernels::new(isa).expect("supported")) {
        for m in [1, 3, 30] {
            let input = quantize(&kernels, &activations(m, cols), m, cols);
            let product =
                |weight| Product { weight, bias: None, input: &input, rows: m, after: After::Store };
            let mut found = vec![f32::NAN; m * rows];
            multiply(&kernels, &product(&packed), (5, 100), &mut found);
            for (p, one) in whole.iter().enumerate() {
                let mut wanted = vec![f32::NAN; m * rows];
                multiply(&kernels, &product(&one.packed), (5, 100), &mut wanted);
                for r in 0..m {
                    let at = r * rows + p * LANES..r * rows + (p + 1) * LANES;
                    assert!(found[at.clone()] == wanted[at], "{kernels:?}, {m} rows, panel {p}");
                }
            }
        }
    }
}

#[test]
fn gates_apply_to_finished_sums() {
    let gates = [Gate::By(Function::Silu), Gate::Clamped { alpha: 1.702, limit: 0.5 }];
    let scalar = Kernels::new(Isa::Scalar).expect("supported");
    for kind in [Kind::Eight, Kind::FourFloat, Kind::NestedFourMin] {
        let m = matrix(kind, 6 * LANES, 512);
        for kernels in Isa::supported().map(|isa| Kernels::new(isa).expect("supported")) {
            for rows in [1, 3, 13] {
                let (n, input) = (m.rows.len(), quantize(&kernels, &activations(rows, m.cols), rows, m.cols));
                let product = |after| Product { weight: &m.packed, bias: None, input: &input, rows, after };
                let mut sums = vec![f32::NAN; rows * n];
                multiply(&kernels, &product(After::Store), (6, 1), &mut sums);
                // Panels in turn are gate and up; the plain function has them side by side.
                let panels: Vec<&[f32]> = sums.chunks(LANES).collect();
                let side = |row: &[&[f32]], first: usize| {
                    row.iter().skip(first).step_by(2).flat_map(|panel| panel.to_vec()).collect::<Vec<f32>>()
                };
                let pairs: Vec<f32> =
                    panels.chunks(6).flat_map(|row| [side(row, 0), side(row, 1)]).flatten().collect();
                for gate in gates {
                    let mut found = vec![f32::NAN; rows * n / 2];
                    multiply(&kernels, &product(After::Gate(gate)), (2, 1), &mut found);
                    let mut wanted = vec![f32::NAN; rows * n / 2];
                    let place = &mut MatMut::new(&mut wanted, rows, n / 2, n / 2);
                    scalar.gate(gate, Mat::new(&pairs, rows, n, n), place);
                    assert!(found == wanted, "{kernels:?}, {kind:?}, {rows} rows: {gate:?}");
                }
            }
        }
    }
}

#[test]
fn products_are_close_to_exact_ones() {
    let kernels = Kernels::new(Isa::best()).expect("supported");
    for kind in Kind::ALL {
        let m = matrix(kind, 64, 1024);
        let (rows, mut error, mut power) = (4, 0.0, 0.0);
        let input = activations(rows, m.cols);
        let packed = quantize(&kernels, &input, rows, m.cols);
        let product = Product { weight: &m.packed, bias: None, input: &packed, rows, after: After::Store };
        let mut out = vec![f32::NAN; rows * 64];
        multiply(&kernels, &product, (8, 8), &mut out);
        for r in 0..rows {
            let x = &input[r * m.cols..][..m.cols];
            let numbers = quantized(x);
            for (c, row) in m.rows.iter().enumerate() {
                let weight = |i| f64::from(weight(kind, row, i).0);
                let exact: f64 = (0..m.cols).map(|i| weight(i) * f64::from(x[i])).sum();
                let rounded = |i: usize| {
                    let (numbers, size) = &numbers[i / BLOCK];
                    f64::from(numbers[i % BLOCK]) * f64::from(*size)
                };
                let near: f64 = (0..m.cols).map(|i| weight(i) * rounded(i)).sum();
                let found = f64::from(out[r * 64 + c]);
                let norm: f64 = (0..m.cols).map(|i| (weight(i) * rounded(i)).powi(2)).sum::<f64>().sqrt();
                assert!((found - near).abs() < 2e-5 * norm, "{kind:?}: {found}, with exact sums {near}");
                error += (found - exact).powi(2);
                power += exact.powi(2);
            }
        }
        // A 127th of the block's greatest value, over the square root of 12, on values of a third of it or less.
        assert!(error < 2e-4 * power, "{kind:?}: relative error {}", (error / power).sqrt());
    }
}

#[test]
fn activations_that_are_not_finite_are_not_hidden() {
    for kernels in Isa::supported().map(|isa| Kernels::new(isa).expect("supported")) {
        let m = matrix(Kind::Four, 16, 64);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut input = activations(2, 64);
            input[37] = bad;
            let packed = quantize(&kernels, &input, 2, 64);
            let product =
                Product { weight: &m.packed, bias: None, input: &packed, rows: 2, after: After::Store };
            let mut out = vec![0.0; 32];
            multiply(&kernels, &product, (1, 1), &mut out);
            assert!(out[..16].iter().all(|x| x.is_nan()), "{kernels:?}, {bad}: {out:?}");
            assert!(out[16..].iter().all(|x| x.is_finite()), "{kernels:?}, {bad}: {out:?}");
        }
        for tiny in [0.0, 1e-38, -1e-42, 1e-31] {
            let packed = quantize(&kernels, &[tiny; 32], 1, 32);
            assert!(packed[8..].iter().all(|x| *x == 0.0), "{kernels:?}, {tiny}: {packed:?}");
        }
    }
}

#[test]
#[should_panic(expected = "expected integers of 4 bits")]
fn an_integer_that_does_not_fit_is_refused() {
    let mut packed = PackedMatrix::zeroed(WeightType::Codes(Kind::Four), 1, 32).expect("small");
    let mut row = Integers { scale: 1.0, scales: [1; 16], ..Integers::ZERO };
    row.integers[3] = 8;
    packed.panels_mut(1).next().expect("one").put_integers(0, 0, &[row]);
}
