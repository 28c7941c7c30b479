//! Integers of 4 or 8 bits whose scales, and zeros where they have some, stand in tensors of their own, one for a group
//! of columns.

use super::DType;
use super::view::convert;
use crate::quant::Block;

/// A matrix of them: element `(code - zero) * scale`, exact but for the rounding of this one product to f32.
#[derive(Clone, Copy, Debug)]
pub(super) struct Groups<B> {
    pub(super) codes: B,
    pub(super) scales: B,
    /// A plain float.
    pub(super) scale_type: DType,
    /// `None` where every zero is the middle.
    pub(super) zeros: Option<B>,
    /// The group of each column, 4 bytes each; `None` where they follow each other.
    pub(super) order: Option<B>,
    pub(super) layout: Layout,
    pub(super) bits: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Columns of a group.
    pub(super) group: usize,
}

/// Where the codes of a matrix lie in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Layout {
    /// AutoAWQ's gemm: stored transposed, a word holds eight neighbouring rows, out of order.
    Awq,
    /// GPTQ's: stored transposed, a word holds neighbouring columns, of zeros neighbouring rows. `zero_plus` is added to a
    /// stored zero.
    Gptq { zero_plus: i32 },
    /// compressed-tensors': a word holds neighbouring columns, of zeros neighbouring rows.
    Rows,
}

/// The place in a word of the eight rows that AutoAWQ packs together.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl<B> Groups<B> {
    pub(super) fn map<C>(&self, f: impl Fn(&B) -> C) -> Groups<C> {
        Groups {
            codes: f(&self.codes),
            scales: f(&self.scales),
            scale_type: self.scale_type,
            zeros: self.zeros.as_ref().map(&f),
            order: self.order.as_ref().map(&f),
            layout: self.layout,
            bits: self.bits,
            rows: self.rows,
            cols: self.cols,
            group: self.group,
        }
    }

    fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// The code that stands for zero where no tensor says.
    fn middle(&self) -> i32 {
        1 << (self.bits - 1)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = &bytes[at * 4..][..4];
    u32::from_le_bytes([word[0], word[1], word[2], word[3]])
}

impl Groups<&[u8]> {
    /// A field of a word.
    fn field(&self, bytes: &[u8], at: usize, place: usize) -> i32 {
        let mask = (1u32 << self.bits) - 1;
        (word(bytes, at) >> (place * self.bits) & mask) as i32
    }

    fn code(&self, row: usize, col: usize) -> i32 {
        let per_word = 32 / self.bits;
        match self.layout {
            Layout::Awq => self.field(self.codes, col * (self.rows / 8) + row / 8, AWQ_PLACES[row % 8]),
            Layout::Gptq { .. } => self.field(self.codes, col / per_word * self.rows + row, col % per_word),
            Layout::Rows => {
                let words = self.cols.div_ceil(per_word);
                self.field(self.codes, row * words + col / per_word, col % per_word)
            }
        }
    }

    pub(super) fn zero(&self, row: usize, group: usize) -> i32 {
        let Some(zeros) = self.zeros else { return self.middle() };
        let per_word = 32 / self.bits;
        match self.layout {
            Layout::Awq => self.field(zeros, group * (self.rows / 8) + row / 8, AWQ_PLACES[row % 8]),
            Layout::Gptq { zero_plus } => {
                let words = self.rows / per_word;
                self.field(zeros, group * words + row / per_word, row % per_word) + zero_plus
            }
            Layout::Rows => self.field(zeros, row / per_word * self.groups() + group, row % per_word),
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        let at = match self.layout {
            Layout::Awq | Layout::Gptq { .. } => group * self.rows + row,
            Layout::Rows => row * self.groups() + group,
        };
        let size = self.scale_type.element_bytes().unwrap_or_default();
        let mut scale = [0.0];
        convert(self.scale_type, &self.scales[at * size..][..size], &mut scale);
        scale[0]
    }

    /// The group of a column; proved to be one when the tensor was defined.
    pub(super) fn group_of(&self, col: usize) -> usize {
        self.order.map_or(col / self.group, |order| word(order, col) as usize)
    }

    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let mut known = (usize::MAX, 0.0, 0);
        for (col, to) in out.iter_mut().enumerate() {
            let group = self.group_of(col);
            if known.0 != group {
                known = (group, self.scale(row, group), self.zero(row, group));
            }
            *to = (self.code(row, col) - known.2) as f32 * known.1;
        }
    }

    /// 32 columns of one group.
    pub(super) fn block(&self, row: usize, index: usize, block: &mut Block) {
        const LEN: usize = 32;
        let group = self.group_of(index * LEN);
        let zero = self.zero(row, group);
        block.d = self.scale(row, group);
        for (i, code) in block.codes[..LEN].iter_mut().enumerate() {
            *code = (self.code(row, index * LEN + i) - zero) as i8;
        }
    }

    /// Whether every zero is the middle, so that their tensor says nothing.
    pub(super) fn is_symmetric(&self) -> bool {
        (0..self.groups()).all(|group| (0..self.rows).all(|row| self.zero(row, group) == self.middle()))
    }

    /// Whether columns are in groups one after the other, whatever a tensor of their order says.
    pub(super) fn is_ordered(&self) -> bool {
        (0..self.cols).all(|col| self.group_of(col) == col / self.group)
    }
}
