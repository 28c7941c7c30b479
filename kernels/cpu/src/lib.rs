//! Kernels for the CPU: functions over slices and views, the same bits on every instruction set.
//!
//! Nothing here knows models, pages, sequences or threads. A caller divides work among threads by handing out
//! disjoint parts of an output; no sum is ever divided, so the division does not change a bit.

#![expect(unsafe_code, reason = "vector instructions, aligned memory and views that threads share")]

pub mod attend;
mod elementwise;
mod isa;
pub mod kv;
pub mod latent;
mod low_rank;
mod math;
mod matmul;
mod matrix;
pub mod measure;
mod memory;
mod norm;
mod pack;
mod quantized;
mod rope;
pub mod route;
mod simd;
mod table;
mod tile;
mod transpose;

pub use isa::{ISA_VARIABLE, Isa, IsaError};
pub use low_rank::{low_rank_in, low_rank_out};
pub use math::{Function, Gate};
pub use matmul::{After, PART_ROWS, Part, Product, scratch_len};
pub use matrix::{Mat, MatMut};
pub use memory::{Aligned, LINE_BYTES, Reserve};
pub use norm::{layer_norm, mean, normalize, rms_norm, rms_norm_add, rms_norm_in_place};
pub use pack::{Form, PackedMatrix, PanelWriter, SourceRows, WeightType, pack_tile};
pub use quantized::BLOCK;
pub use quantized::kind::Kind;
pub use quantized::panel::Integers;
pub use rope::{Pairing, rope, rope_angles};
pub use simd::LANES;
pub use table::Kernels;
