//! Products, attention and norm, by instruction set: bytes of weights or of keys and values a second, or flops.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use mainstay_kernels_cpu::attend::{AttendShape, Attention, Queries, Sight};
use mainstay_kernels_cpu::kv::{BLOCK_TOKENS, BlockShape, KvBlock};
use mainstay_kernels_cpu::{
    After, Integers, Isa, Kernels, Kind, LANES, Mat, MatMut, PackedMatrix, Part, Product, SourceRows,
    WeightType, rms_norm, scratch_len,
};

/// One product on one thread, in parts as a backend would cut it.
fn product(kernels: &Kernels, weight: &PackedMatrix, rows: usize, out: &mut [f32], scratch: &mut [f32]) {
    let input = vec![0.5; weight.form().input_len(rows, weight.cols())];
    let product = Product { weight, bias: None, input: &input, rows, after: After::Store };
    let stride = weight.panels() * LANES;
    let part_rows = 192 / kernels.tile_rows() * kernels.tile_rows();
    for first in (0..weight.panels()).step_by(8) {
        for row in (0..rows).step_by(part_rows) {
            let part = Part {
                panels: first..(first + 8).min(weight.panels()),
                rows: row..(row + part_rows).min(rows),
            };
            let place = &mut out[row * stride + first * LANES..];
            let mut place = MatMut::new(place, part.rows.len(), part.panels.len() * LANES, stride);
            kernels.matmul(&product, &part, &mut place, scratch);
        }
    }
}

/// Weights in memory of their own: pages that were never written are all one page, and lie in a cache.
fn weights(dtype: WeightType, n: usize, k: usize) -> PackedMatrix {
    let mut weight = PackedMatrix::zeroed(dtype, n, k).expect("memory");
    let line = vec![0x3c; k * 4];
    let blocks = [Integers { scale: 0.5, integers: [1; 256], ..Integers::ZERO }; LANES];
    for mut writer in weight.panels_mut(1) {
        match dtype {
            WeightType::Codes(kind) => {
                (0..k).step_by(kind.block_len()).for_each(|col| writer.put_integers(0, col, &blocks));
            }
            _ => {
                let source = SourceRows { dtype, bytes: &line };
                (0..LANES).for_each(|row| writer.put(row, source, 0, 0..k));
            }
        }
    }
    weight
}

fn products(c: &mut Criterion) {
    for isa in Isa::supported().filter(|isa| *isa != Isa::Scalar) {
        let kernels = Kernels::new(isa).expect("supported");
        let integers = [Kind::Eight, Kind::Four, Kind::NestedFourMin, Kind::NestedSix].map(WeightType::Codes);
        for dtype in [WeightType::F32, WeightType::BF16].into_iter().chain(integers) {
            // Larger than the caches: 1024 inputs, 128 MiB of weights.
            let (n, k) = ((128 << 20) / (dtype.panel_bytes(1024) / LANES), 1024);
            let weight = weights(dtype, n, k);
            let mut group = c.benchmark_group(format!("few rows/{}/{dtype:?}", isa.name()));
            group.sample_size(10).throughput(Throughput::Bytes(weight.size_bytes() as u64));
            for rows in [1, 4, 12] {
                let (mut out, mut scratch) =
                    (vec![0.0; rows * n], vec![0.0; scratch_len(192, kernels.tile_rows())]);
                group.bench_function(rows.to_string(), |b| {
                    b.iter(|| product(&kernels, &weight, rows, black_box(&mut out), &mut scratch));
                });
            }
            group.finish();
            let (n, rows) = (1024, 512);
            let weight = weights(dtype, n, k);
            let mut group = c.benchmark_group(format!("many rows/{}/{dtype:?}", isa.name()));
            group.sample_size(10).throughput(Throughput::Elements(2 * (n * k * rows) as u64));
            let (mut out, mut scratch) =
                (vec![0.0; rows * n], vec![0.0; scratch_len(192, kernels.tile_rows())]);
            group.bench_function(rows.to_string(), |b| {
                b.iter(|| product(&kernels, &weight, rows, black_box(&mut out), &mut scratch));
            });
            group.finish();
        }
    }
}

fn attention(c: &mut Criterion) {
    for isa in Isa::supported().filter(|isa| *isa != Isa::Scalar) {
        let kernels = Kernels::new(isa).expect("supported");
        let shape = AttendShape {
            group: 2,
            head_dim: 128,
            scale: 0.1,
            sight: Sight::Window(usize::MAX),
            softcap: None,
        };
        let mut group = c.benchmark_group(format!("decode attention/{}/BF16", isa.name()));
        for depth in [512, 4096, 16384] {
            let len = BlockShape::Heads { head_dim: shape.head_dim }.len();
            let blocks = vec![bf16::from_f32(0.25); len * depth / BLOCK_TOKENS];
            let queries = vec![0.5; 256];
            let mut state = Attention::new(2, shape.head_dim);
            let mut out = vec![0.0; 256];
            group.throughput(Throughput::Bytes(blocks.len() as u64 * 2));
            group.bench_function(depth.to_string(), |b| {
                b.iter(|| {
                    let rows = Mat::new(&queries, 1, 256, 256);
                    let queries = Queries { rows, position: depth - 1, sinks: None };
                    kernels.attend_start(&mut state, shape, queries);
                    let block = |i| blocks[i * len..].get(..len).map(KvBlock::BF16);
                    for i in 0..depth / BLOCK_TOKENS {
                        let next = block(i + 1);
                        kernels.attend_block(
                            &mut state,
                            KvBlock::BF16(&blocks[i * len..][..len]),
                            i * BLOCK_TOKENS,
                            next,
                        );
                    }
                    kernels.attend_finish(&state, &mut MatMut::new(black_box(&mut out), 1, 256, 256));
                });
            });
        }
        group.finish();
    }
}

fn norm(c: &mut Criterion) {
    let (x, weight, mut out) = (vec![0.5; 4096], vec![1.0; 4096], vec![0.0; 4096]);
    let mut group = c.benchmark_group("rms norm");
    group.throughput(Throughput::Bytes(4096 * 4));
    group.bench_function("4096", |b| b.iter(|| rms_norm(black_box(&x), &weight, 1e-5, black_box(&mut out))));
    group.finish();
}

criterion_group!(benches, products, attention, norm);
criterion_main!(benches);
