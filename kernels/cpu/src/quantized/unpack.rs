//! From packed codes to what register tiles take: unsigned bytes, group by group, and f32 scales.

use super::kind::{Kind, Layout, Scales, Values, WIDE_BIAS};
use super::panel::planes;
use super::{GROUP_BYTES, GROUPS};
use crate::simd::{Bytes, LANES, Simd};

/// A chunk of a panel.
#[derive(Clone, Copy)]
pub(crate) struct Packed {
    /// Numbers over scales.
    pub(crate) over: *const u8,
    /// Scales, minima, zero points.
    pub(crate) records: *const u8,
    pub(crate) codes: *const u8,
    pub(crate) blocks: usize,
    /// What is asked into the cache meanwhile: the first [`Layout::lines_of_unpacking`] lines for each block.
    pub(crate) ask: *const u8,
}

/// Where unpacked blocks go.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked {
    /// `[blocks][8][64]`; left alone for 8-bit codes, which are unsigned bytes already.
    pub(crate) codes: *mut u8,
    /// `[blocks][sub-blocks][16]`
    pub(crate) scales: *mut f32,
    /// Like the scales: less the minimum, or less what bytes exceed their integers by, if they are not wide.
    pub(crate) shifts: *mut f32,
}

/// A compiled unpacking of one kind.
pub(crate) type UnpackFn = unsafe fn(&Packed, &Unpacked);

/// Unpacks blocks of kind number `KIND`.
///
/// # Safety
/// The packed blocks are readable, and the places for the unpacked ones are writable.
#[inline(always)]
pub(crate) unsafe fn unpack<C: Bytes, const KIND: usize>(c: C, from: &Packed, to: &Unpacked) {
    let layout = const { Kind::ALL[KIND].layout() };
    let mut codes = to.codes;
    let (mut scales, mut shifts) = (to.scales, to.shifts);
    // SAFETY: the caller's promise.
    let over = unsafe { over(c, &layout, from.over) };
    let mut ask = from.ask;
    for block in 0..from.blocks {
        for _ in 0..const { Kind::ALL[KIND].layout().lines_of_unpacking() } {
            c.floats().prefetch(ask);
            ask = ask.wrapping_add(GROUP_BYTES);
        }
        let record = from.records.wrapping_add(block * layout.record_bytes());
        let packed = from.codes.wrapping_add(block * layout.code_bytes());
        // SAFETY: inside the block, which the caller vouches for.
        unsafe {
            if layout.bits < 8 {
                unpack_codes::<C, KIND>(c, packed, codes);
                codes = codes.wrapping_add(GROUPS * GROUP_BYTES);
            }
            for sub in 0..layout.subs() {
                let (scale, shift) = scale_and_shift(c, &layout, over, record, sub);
                c.floats().write(scales, scale);
                c.floats().write(shifts, shift);
                scales = scales.wrapping_add(LANES);
                shifts = shifts.wrapping_add(LANES);
            }
        }
    }
}

/// What the scales and the minima of a chunk are multiplied by.
#[derive(Clone, Copy)]
pub(crate) struct Over<C: Bytes> {
    scales: Floats<C>,
    minima: Floats<C>,
}

/// Reads the numbers over a chunk's scales, where there are any.
///
/// # Safety
/// As [`unpack`], for one chunk.
#[inline(always)]
pub(crate) unsafe fn over<C: Bytes>(c: C, layout: &Layout, from: *const u8) -> Over<C> {
    let s = c.floats();
    let mut over = Over { scales: s.splat(0.0), minima: s.splat(0.0) };
    // SAFETY: the numbers are there, as the caller promises.
    unsafe {
        if matches!(layout.scales, Scales::Nested) {
            over.scales = s.read_f16(from.cast());
            if layout.has_minima() {
                over.minima = s.read_f16(from.wrapping_add(2 * LANES).cast());
            }
        }
    }
    over
}

/// A sub-block's scales, and its minima or what its bytes exceed their integers by, less 0.
///
/// # Safety
/// As [`unpack`], for one block.
#[inline(always)]
pub(crate) unsafe fn scale_and_shift<C: Bytes>(
    c: C,
    layout: &Layout,
    over: Over<C>,
    record: *const u8,
    sub: usize,
) -> (Floats<C>, Floats<C>) {
    let s = c.floats();
    let less = |x| s.sub(s.splat(0.0), x);
    let rest = record.wrapping_add(layout.scale_bytes());
    // SAFETY: inside the block's record, which the caller vouches for.
    unsafe {
        let scale = match layout.scales {
            Scales::F16 => s.read_f16(record.cast()),
            Scales::F32 => s.read(record.cast()),
            Scales::Nested => s.mul(over.scales, c.read_i8(record.wrapping_add(sub * LANES))),
        };
        let shift = match layout.values {
            Values::Minimum if matches!(layout.scales, Scales::Nested) => {
                less(s.mul(over.minima, c.read_u8(rest.wrapping_add(sub * LANES))))
            }
            Values::Minimum => less(s.read_f16(rest.cast())),
            Values::Zero => less(c.read_u8(rest)),
            // Not read where bytes are wide.
            Values::Less(_) | Values::Table(_) => s.splat(-f32::from(layout.bias())),
        };
        (scale, shift)
    }
}

/// Sixteen f32 of a machine.
pub(crate) type Floats<C> = <<C as Bytes>::Floats as Simd>::V;

/// # Safety
/// As [`unpack`], for one block.
#[inline(always)]
unsafe fn unpack_codes<C: Bytes, const KIND: usize>(c: C, from: *const u8, to: *mut u8) {
    macro_rules! groups {
        ($($group:literal)*) => {
            // SAFETY: the caller's promise.
            unsafe { $(c.write_bytes(to.add($group * GROUP_BYTES), group::<C, KIND, $group>(c, from, C::WIDENS));)* }
        };
    }
    groups!(0 1 2 3 4 5 6 7);
}

/// The unsigned bytes of group `GROUP`; wide ones if `widens` and the kind may be.
///
/// # Safety
/// As [`unpack`], for one block.
#[inline(always)]
pub(crate) unsafe fn group<C: Bytes, const KIND: usize, const GROUP: usize>(
    c: C,
    from: *const u8,
    widens: bool,
) -> C::B {
    let layout = const { Kind::ALL[KIND].layout() };
    let [(width, _), (upper, first)] = const { planes(Kind::ALL[KIND].layout().bits) };
    // SAFETY: both planes are inside the block.
    let code = unsafe {
        let lower = c.read_bytes(from.add(GROUP % width * GROUP_BYTES));
        let lower = c.shift_and_mask(lower, -((GROUP / width * width) as i32), ((1u16 << width) - 1) as u8);
        if upper == 0 {
            lower
        } else {
            let bits = c.read_bytes(from.add((width + GROUP % upper) * GROUP_BYTES));
            let shift = first as i32 - (GROUP / upper * upper) as i32;
            c.or(lower, c.shift_and_mask(bits, shift, (((1u16 << upper) - 1) << first) as u8))
        }
    };
    match layout.values {
        Values::Table(_) if widens => c.look_up(code, const { &biased(KIND, true) }),
        Values::Table(_) => c.look_up(code, const { &biased(KIND, false) }),
        Values::Less(bias) if widens => c.add_bytes(code, WIDE_BIAS - bias),
        _ => code,
    }
}

/// A table's entries as unsigned bytes.
const fn biased(kind: usize, widens: bool) -> [u8; 16] {
    let layout = Kind::ALL[kind].layout();
    let bias = if layout.is_wide(widens) { WIDE_BIAS } else { layout.bias() };
    let mut out = [0; 16];
    if let Values::Table(table) = layout.values {
        let mut i = 0;
        while i < 16 {
            out[i] = (table.integers[i] as i16 + bias as i16) as u8;
            i += 1;
        }
    }
    out
}
