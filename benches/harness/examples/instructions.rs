//! Fixed pieces of work for `benches/instructions/check.py`, which counts the instructions inside of [`measured`]: one
//! thread, the instruction set that `MAINSTAY_CPU` names, the same numbers at every call.

use std::hint::black_box;

use half::bf16;
use mainstay_backend_api::KvDType;
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_bench::{Bench, Case, Plan};
use mainstay_kernels_cpu::attend::{AttendShape, Attention, Queries, Sight};
use mainstay_kernels_cpu::kv::{BLOCK_TOKENS, BlockShape, KvBlock};
use mainstay_kernels_cpu::{
    After, ISA_VARIABLE, Isa, Kernels, Kind, LANES, Mat, MatMut, PackedMatrix, Part, Product, WeightType,
    rms_norm, scratch_len,
};
use mainstay_models::Model;

/// Inputs and outputs of a product: its weights fill a whole number of blocks of every type.
const SIDE: usize = 512;
/// Tokens that a decode draws.
const DECODED: usize = 32;

/// The work that is counted. Nothing else has this name in its own.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn product(kernels: &Kernels, dtype: WeightType, rows: usize) {
    let weight = PackedMatrix::zeroed(dtype, SIDE, SIDE).expect("memory for a small matrix");
    let input = vec![0.5; weight.form().input_len(rows, SIDE)];
    let product = Product { weight: &weight, bias: None, input: &input, rows, after: After::Store };
    let stride = weight.panels() * LANES;
    let mut out = vec![0.0; rows * stride];
    let mut scratch = vec![0.0; scratch_len(rows, kernels.tile_rows())];
    measured(&mut || {
        let part = Part { panels: 0..weight.panels(), rows: 0..rows };
        let mut place = MatMut::new(black_box(&mut out), rows, stride, stride);
        kernels.matmul(&product, &part, &mut place, &mut scratch);
    });
}

fn attention(kernels: &Kernels) {
    const DEPTH: usize = 1024;
    let shape =
        AttendShape { group: 2, head_dim: 128, scale: 0.1, sight: Sight::Window(usize::MAX), softcap: None };
    let len = BlockShape::Heads { head_dim: shape.head_dim }.len();
    let blocks = vec![bf16::from_f32(0.25); len * DEPTH / BLOCK_TOKENS];
    let queries = vec![0.5; 256];
    let mut state = Attention::new(2, shape.head_dim);
    let mut out = vec![0.0; 256];
    measured(&mut || {
        let rows = Mat::new(&queries, 1, 256, 256);
        kernels.attend_start(&mut state, shape, Queries { rows, position: DEPTH - 1, sinks: None });
        for (i, block) in blocks.chunks(len).enumerate() {
            kernels.attend_block(&mut state, KvBlock::BF16(block), i * BLOCK_TOKENS, None);
        }
        kernels.attend_finish(&state, &mut MatMut::new(black_box(&mut out), 1, 256, 256));
    });
}

fn norm() {
    let (x, weight, mut out) = (vec![0.5; 4096], vec![1.0; 4096], vec![0.0; 4096]);
    measured(&mut || rms_norm(black_box(&x), &weight, 1e-5, black_box(&mut out)));
}

/// A cell of `mainstay bench latency` on the model in the binary.
fn model(isa: Isa, case: &str) {
    let case: Case = case.parse().expect("a case");
    let plan = Plan {
        prompt: 128,
        cases: vec![case],
        gen_steps: DECODED,
        repeats: 1,
        tokens_per_step: 128,
        kv_dtype: KvDType::BF16,
    };
    let backend = CpuBackend::new(CpuOptions { threads: Some(1), isa: Some(isa) }).expect("a backend");
    let model = Model::embedded().expect("the model in the binary");
    let mut bench =
        Bench::new(&backend, (&model.graph, &model.weights), &plan, |_| ()).expect("a model that loads");
    let mut run = bench.empty(case);
    measured(&mut || bench.measure(&mut run).expect("a step"));
}

/// What is counted, by the names in the baseline.
const ALL: [&str; 12] = [
    "decode 32 tokens",
    "prefill 128 tokens",
    "product f32, 1 row",
    "product bf16, 1 row",
    "product bf16, 16 rows",
    "product 8 bits, 1 row",
    "product 8 bits, 16 rows",
    "product 4 bits, 1 row",
    "product 4 bits, 16 rows",
    "product nested 4 bits, 1 row",
    "attention, 1024 tokens",
    "rms norm, 4096",
];

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own")]
fn main() {
    let Some(name) = std::env::args().nth(1) else {
        println!("{}", ALL.join("\n"));
        return;
    };
    let wanted = std::env::var(ISA_VARIABLE).unwrap_or_else(|_| "avx2".into());
    let isa = match Isa::named(&wanted) {
        Ok(isa) => isa,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(3);
        }
    };
    let kernels = Kernels::new(isa).expect("what is named is supported");
    match name.as_str() {
        "decode 32 tokens" => model(isa, "decode@0x1"),
        "prefill 128 tokens" => model(isa, "prefill@0"),
        "product f32, 1 row" => product(&kernels, WeightType::F32, 1),
        "product bf16, 1 row" => product(&kernels, WeightType::BF16, 1),
        "product bf16, 16 rows" => product(&kernels, WeightType::BF16, 16),
        "product 8 bits, 1 row" => product(&kernels, WeightType::Codes(Kind::Eight), 1),
        "product 8 bits, 16 rows" => product(&kernels, WeightType::Codes(Kind::Eight), 16),
        "product 4 bits, 1 row" => product(&kernels, WeightType::Codes(Kind::Four), 1),
        "product 4 bits, 16 rows" => product(&kernels, WeightType::Codes(Kind::Four), 16),
        "product nested 4 bits, 1 row" => product(&kernels, WeightType::Codes(Kind::NestedFourMin), 1),
        "attention, 1024 tokens" => attention(&kernels),
        "rms norm, 4096" => norm(),
        other => {
            eprintln!("expected one of {}, found `{other}`", ALL.join("; "));
            std::process::exit(2);
        }
    }
}
