//! Products of rows with weights that are small integers under scales: how both lie in memory, and what is computed.
//!
//! Rows of activations are quantized too, 32 columns at a time, to 8 bits. For the 32 columns of block b, one or two
//! sub-blocks s of them, weights w = scale * n - minimum and activations x = size * q, an output element is
//!
//! ```text
//! part = n_0 * scale_0                      n_s: sum over the sub-block of (w's integer) * q, exact
//! part = fma(-minimum_0, q_0, part)         q_s: sum over the sub-block of q, exact; only where there are minima
//! part = fma(n_1, scale_1, part)            only where a sub-block is 16 columns
//! part = fma(-minimum_1, q_1, part)
//! sum  = fma(part, size, sum)               for b ascending, beginning with the bias or 0
//! ```
//!
//! every line in f32, rounded once. The integers have no order, so all instruction sets, tiles and thread counts give
//! the same bits.

pub(crate) mod input;
pub(crate) mod kind;
pub(crate) mod panel;
pub(crate) mod product;
pub(crate) mod row;
pub(crate) mod tile;
pub(crate) mod unpack;

/// Columns that share a size of activations, and the unit of every layout here.
pub const BLOCK: usize = 32;

/// Columns under one scale of scales.
pub(crate) const SUPER: usize = 256;

/// Blocks under them.
pub(crate) const CHUNK: usize = SUPER / BLOCK;

/// 16 rows of 4 columns: what a dot product of a whole vector takes.
pub(crate) const GROUP_BYTES: usize = 64;

/// Groups in a block.
pub(crate) const GROUPS: usize = BLOCK / 4;
