//! One table of functions per instruction set, and the choice among them.

use half::{bf16, f16};

use crate::attend::{self, SoftmaxTile};
use crate::elementwise;
use crate::isa::{Isa, IsaError};
use crate::math::{Function, Gate};
use crate::quantized::kind::Kind;
use crate::quantized::row::{RowFn, RowOperands};
use crate::quantized::tile::{CodeTileFn, MODES, Operands as CodeOperands};
use crate::quantized::unpack::{Packed, UnpackFn, Unpacked};
use crate::quantized::{input, row, tile as code_tile, unpack};
use crate::simd::{Bytes, Simd, scalar::Scalar};
use crate::tile::{self, Operands, TileFn};

/// The functions that differ by instruction set. All are unsafe to call on a machine without it.
pub(crate) struct Table {
    pub(crate) tile_rows: usize,
    pub(crate) tile_f32: TileFn<f32>,
    pub(crate) tile_f16: TileFn<f16>,
    pub(crate) tile_bf16: TileFn<bf16>,
    pub(crate) widen_f16: unsafe fn(*const f16, &mut [f32]),
    pub(crate) widen_bf16: unsafe fn(*const bf16, &mut [f32]),
    pub(crate) activate: unsafe fn(Function, &mut [f32]),
    pub(crate) gate_pairs: unsafe fn(Gate, &[f32], &mut [f32]),
    pub(crate) softcap: unsafe fn(f32, &mut [f32]),
    pub(crate) softmax: unsafe fn(SoftmaxTile<'_>),
    pub(crate) sum: unsafe fn(&[f32]) -> f32,
    pub(crate) fma_burst: unsafe fn(usize) -> f64,
}

macro_rules! table {
    ($module:ident, $set:ty, $witness:expr $(, #[$features:meta])?) => {
        mod $module {
            use super::*;

            pub(super) static TABLE: Table = Table {
                tile_rows: <$set>::TILE,
                tile_f32,
                tile_f16,
                tile_bf16,
                widen_f16,
                widen_bf16,
                activate,
                gate_pairs,
                softcap,
                softmax,
                sum,
                fma_burst,
            };

            /// # Safety
            /// The machine has the instruction set.
            #[inline(always)]
            unsafe fn set() -> $set {
                $witness
            }

            table!(@functions [$(#[$features])?]
                fn tile_f32(o: &Operands<f32>, panels: usize, rows: usize) => tile::run;
                fn tile_f16(o: &Operands<f16>, panels: usize, rows: usize) => tile::run;
                fn tile_bf16(o: &Operands<bf16>, panels: usize, rows: usize) => tile::run;
                fn widen_f16(from: *const f16, out: &mut [f32]) => elementwise::widen;
                fn widen_bf16(from: *const bf16, out: &mut [f32]) => elementwise::widen;
                fn activate(f: Function, values: &mut [f32]) => elementwise::activate;
                fn gate_pairs(f: Gate, pairs: &[f32], out: &mut [f32]) => elementwise::gate_pairs;
                fn softcap(cap: f32, values: &mut [f32]) => elementwise::softcap;
                fn softmax(tile: SoftmaxTile<'_>) => attend::softmax;
                fn sum(lanes: &[f32]) -> f32 => attend::sum;
                fn fma_burst(rounds: usize) -> f64 => tile::fma_burst;
            );
        }
    };
    (@functions $features:tt $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? => $body:path;)*) => {
        $(table!(@function $features $name ($($arg: $type),*) ($($out)?) $body);)*
    };
    (@function [$(#[$features:meta])?] $name:ident ($($arg:ident: $type:ty),*) ($($out:ty)?) $body:path) => {
        /// # Safety
        /// The machine has the instruction set, and what the body asks for.
        $(#[$features])?
        unsafe fn $name($($arg: $type),*) $(-> $out)? {
            // SAFETY: the caller's promise.
            unsafe { $body(set(), $($arg),*) }
        }
    };
}

table!(scalar, Scalar, Scalar);

#[cfg(target_arch = "x86_64")]
table!(
    avx2,
    crate::simd::avx2::Avx2,
    // SAFETY: the caller's promise.
    unsafe { crate::simd::avx2::Avx2::new() },
    #[target_feature(enable = "avx2,fma,f16c")]
);

#[cfg(target_arch = "x86_64")]
table!(
    avx512,
    crate::simd::avx512::Avx512,
    // SAFETY: the caller's promise.
    unsafe { crate::simd::avx512::Avx512::new() },
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
);

#[cfg(target_arch = "aarch64")]
table!(
    neon,
    crate::simd::neon::Neon,
    // SAFETY: the caller's promise.
    unsafe { crate::simd::neon::Neon::new() },
    #[target_feature(enable = "neon")]
);

/// The functions of quantized products that differ by instruction set; as unsafe to call.
pub(crate) struct CodeTable {
    pub(crate) quantize: unsafe fn(&[f32], *mut u8, usize, usize),
    /// By kind.
    pub(crate) unpack: [UnpackFn; Kind::ALL.len()],
    /// Rows that [`CodeTable::rows`] are for, at most.
    pub(crate) rows_max: usize,
    /// By kind.
    pub(crate) rows: [RowFn; Kind::ALL.len()],
    /// By kind.
    pub(crate) tiles: [CodeTileFn; Kind::ALL.len()],
}

macro_rules! code_table {
    ($module:ident, $set:ty, $witness:expr $(, #[$features:meta])?) => {
        mod $module {
            use super::*;

            const MODE_TILES: [CodeTileFn; MODES.len()] =
                [tile::<0>, tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>];

            pub(super) static TABLE: CodeTable = CodeTable {
                quantize,
                unpack: [
                    unpack::<0>, unpack::<1>, unpack::<2>, unpack::<3>, unpack::<4>, unpack::<5>, unpack::<6>,
                    unpack::<7>, unpack::<8>, unpack::<9>, unpack::<10>, unpack::<11>, unpack::<12>, unpack::<13>,
                ],
                rows_max: row::rows_max::<$set>(),
                rows: [
                    row::<0>, row::<1>, row::<2>, row::<3>, row::<4>, row::<5>, row::<6>,
                    row::<7>, row::<8>, row::<9>, row::<10>, row::<11>, row::<12>, row::<13>,
                ],
                tiles: code_tile::of_kinds(MODE_TILES, <$set>::WIDENS),
            };

            /// # Safety
            /// The machine has the instruction set, and what the body asks for.
            $(#[$features])?
            unsafe fn quantize(values: &[f32], tile: *mut u8, row: usize, rows: usize) {
                // SAFETY: the caller's promise.
                unsafe { input::quantize($witness, values, tile, row, rows) }
            }

            /// # Safety
            /// The machine has the instruction set, and what the body asks for.
            $(#[$features])?
            unsafe fn unpack<const KIND: usize>(from: &Packed, to: &Unpacked) {
                // SAFETY: the caller's promise.
                unsafe { unpack::unpack::<_, KIND>($witness, from, to) }
            }

            /// # Safety
            /// The machine has the instruction set, and what the body asks for.
            $(#[$features])?
            unsafe fn row<const KIND: usize>(o: &RowOperands, panels: usize, rows: usize) {
                // SAFETY: the caller's promise.
                unsafe { row::run::<_, KIND>($witness, o, panels, rows) }
            }

            /// # Safety
            /// The machine has the instruction set, and what the body asks for.
            $(#[$features])?
            unsafe fn tile<const MODE: usize>(o: &CodeOperands, panels: usize, rows: usize) {
                // SAFETY: the caller's promise.
                unsafe { code_tile::run::<_, MODE>($witness, o, panels, rows) }
            }
        }
    };
}

code_table!(scalar_codes, Scalar, Scalar);

#[cfg(target_arch = "x86_64")]
code_table!(
    avx2_codes,
    crate::simd::avx2::Avx2,
    crate::simd::avx2::Avx2::new(),
    #[target_feature(enable = "avx2,fma,f16c")]
);

#[cfg(target_arch = "x86_64")]
code_table!(
    vnni_codes,
    crate::simd::vnni::Vnni,
    crate::simd::vnni::Vnni::new(),
    #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
);

#[cfg(target_arch = "aarch64")]
code_table!(
    neon_codes,
    crate::simd::neon::Neon,
    crate::simd::neon::Neon::new(),
    #[target_feature(enable = "neon")]
);

/// The kernels of one instruction set, on a machine that has it.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    table: &'static Table,
    codes: &'static CodeTable,
}

impl Kernels {
    /// The kernels of an instruction set.
    ///
    /// # Errors
    /// If this machine does not have it.
    pub fn new(isa: Isa) -> Result<Self, IsaError> {
        let isa = Isa::named(isa.name())?;
        let (table, codes) = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => (&avx512::TABLE, &vnni_codes::TABLE),
            // Without VNNI, wider vectors do little for bytes.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => (&avx512::TABLE, &avx2_codes::TABLE),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => (&avx2::TABLE, &avx2_codes::TABLE),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => (&neon::TABLE, &neon_codes::TABLE),
            _ => (&scalar::TABLE, &scalar_codes::TABLE),
        };
        Ok(Self { isa, table, codes })
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Rows of the largest register tile; see [`crate::pack_tile`].
    pub fn tile_rows(&self) -> usize {
        self.table.tile_rows
    }

    pub(crate) fn table(&self) -> &'static Table {
        self.table
    }

    pub(crate) fn codes(&self) -> &'static CodeTable {
        self.codes
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernels({})", self.isa.name())
    }
}
