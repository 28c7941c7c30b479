//! Quantized safetensors: what `quantization_config` of a configuration says about tensors that only together are one.
//!
//! Which modules were left as they were shows in the tensors themselves, so lists of them are not read.

use super::groups::{Groups, Layout};
use super::tiles::{Codes, Tiles};
use super::view::{RowMap, Storage};
use super::{DType, Entry, Span, Tensor, Weights};
use crate::LoadError;
use crate::config::Config;

/// Groups beyond this are a row.
const GROUP_MAX: usize = 1 << 20;

impl Weights {
    /// Makes the weights of a quantized checkpoint available under the names they had before.
    ///
    /// # Errors
    /// [`LoadError::Format`] for a method that is not supported, or tensors that contradict it.
    pub fn define_quantized(&mut self, config: &Config) -> Result<(), LoadError> {
        let Some(quantization) = config.object("quantization_config")? else { return Ok(()) };
        match quantization.text("quant_method")?.unwrap_or_default() {
            "fp8" | "fbgemm_fp8" => self.define_bytes(&quantization),
            "awq" => self.define_awq(&quantization),
            "gptq" => self.define_gptq(&quantization),
            "compressed-tensors" => self.define_compressed(&quantization),
            // the family's tensors say all there is to say
            "mxfp4" => Ok(()),
            _ => Err(quantization.wrong("quant_method", "fp8, awq, gptq, compressed-tensors or mxfp4")),
        }
    }

    /// Modules that have a tensor of this name.
    fn modules(&self, suffix: &str) -> Vec<String> {
        self.stored_names().filter_map(|name| name.strip_suffix(suffix)).map(str::to_owned).collect()
    }

    /// A stored tensor with its shape, of one of these types.
    fn part(&self, name: &str, types: &[&str]) -> Result<(&Entry, [usize; 2]), LoadError> {
        let entry = self.entry(name)?;
        if !types.contains(&entry.type_name.as_str()) {
            let what = format!("expected dtype {}, found {}", types.join(" or "), entry.type_name);
            return Err(self.wrong(name, what));
        }
        match entry.shape[..] {
            [rows, cols] => Ok((entry, [rows, cols])),
            [rows] => Ok((entry, [rows, 1])),
            [] => Ok((entry, [1, 1])),
            _ => Err(self.wrong(name, format!("expected a matrix, found shape {:?}", entry.shape))),
        }
    }

    /// Scales, which are plain floats of one of these shapes.
    fn scales(&self, name: &str, shapes: &[[usize; 2]]) -> Result<(Span, DType, [usize; 2]), LoadError> {
        let (entry, shape) = self.part(name, &["F32", "F16", "BF16"])?;
        if !shapes.contains(&shape) {
            return Err(self.wrong(name, format!("expected a shape of {shapes:?}, found {:?}", entry.shape)));
        }
        Ok((entry.span.clone(), entry.dtype.unwrap_or(DType::F32), shape))
    }

    fn words(&self, name: &str, shape: [usize; 2]) -> Result<Span, LoadError> {
        let (entry, found) = self.part(name, &["I32"])?;
        if found != shape {
            return Err(self.wrong(name, format!("expected shape {shape:?}, found {found:?}")));
        }
        Ok(entry.span.clone())
    }

    /// A weight of bytes with `weight_scale_inv` (for blocks) or `weight_scale` (for rows, or everything).
    fn define_bytes(&mut self, config: &Config) -> Result<(), LoadError> {
        let block = block_size(config)?;
        for module in self.modules(".weight") {
            let name = format!("{module}.weight");
            let codes_are = match self.entry(&name)?.type_name.as_str() {
                "F8_E4M3" => Codes::Float,
                "I8" => Codes::Integer,
                _ => continue,
            };
            let (entry, [rows, cols]) = self.part(&name, &["F8_E4M3", "I8"])?;
            let codes = entry.span.clone();
            let inverse = format!("{module}.weight_scale_inv");
            let tile = match (self.stored_shape(&inverse).is_some(), block) {
                (true, Some(tile)) => tile,
                (true, None) => return Err(config.wrong("weight_block_size", "two whole numbers")),
                (false, _) => (1, GROUP_MAX),
            };
            let (scales, scale_type, tile) = if self.stored_shape(&inverse).is_some() {
                let shape = [rows.div_ceil(tile.0), cols.div_ceil(tile.1)];
                let (scales, scale_type, _) = self.scales(&inverse, &[shape])?;
                (scales, scale_type, tile)
            } else {
                let name = format!("{module}.weight_scale");
                let (scales, scale_type, shape) = self.scales(&name, &[[1, 1], [rows, 1]])?;
                let tile_rows = if shape == [1, 1] { rows.max(1) } else { 1 };
                (scales, scale_type, (tile_rows, cols.max(1)))
            };
            let tiles = Tiles { codes, scales, scale_type, codes_are, tile, cols };
            let shape = vec![rows, cols];
            let storage = Storage::Tiles(tiles);
            let tensor = Tensor { dtype: DType::F8, shape, storage, rows: RowMap::PLAIN };
            self.insert(name.clone(), tensor, &[&name])?;
        }
        Ok(())
    }

    fn define_awq(&mut self, config: &Config) -> Result<(), LoadError> {
        expect_text(config, "version", "gemm")?;
        if config.required("bits", 1..=32)? != 4 {
            return Err(config.wrong("bits", "4"));
        }
        let wanted = config.required("group_size", 1..=GROUP_MAX)?;
        for module in self.modules(".qweight") {
            let name = format!("{module}.qweight");
            let (entry, [cols, words]) = self.part(&name, &["I32"])?;
            let (codes, rows) = (entry.span.clone(), words.saturating_mul(8));
            let groups = self.counted(&name, cols, wanted)?;
            let zeros = self.words(&format!("{module}.qzeros"), [groups, words])?;
            let (scales, scale_type, _) = self.scales(&format!("{module}.scales"), &[[groups, rows]])?;
            let (layout, order) = (Layout::Awq, None);
            let zeros = Some(zeros);
            let found = Groups {
                codes,
                scales,
                scale_type,
                zeros,
                order,
                layout,
                bits: 4,
                rows,
                cols,
                group: wanted,
            };
            self.insert_groups(&module, found)?;
        }
        Ok(())
    }

    fn define_gptq(&mut self, config: &Config) -> Result<(), LoadError> {
        let bits = config.required("bits", 1..=32)?;
        if bits != 4 && bits != 8 {
            return Err(config.wrong("bits", "4 or 8"));
        }
        let zero_plus = match config.text("checkpoint_format")?.unwrap_or("gptq") {
            "gptq" => 1,
            "gptq_v2" => 0,
            _ => return Err(config.wrong("checkpoint_format", "gptq or gptq_v2")),
        };
        // -1 is the whole row
        let whole = config.get("group_size").and_then(serde_json::Value::as_i64) == Some(-1);
        let per_word = 32 / bits;
        for module in self.modules(".qweight") {
            let name = format!("{module}.qweight");
            let (entry, [words, rows]) = self.part(&name, &["I32"])?;
            let (codes, cols) = (entry.span.clone(), words.saturating_mul(per_word));
            let group = if whole { cols.max(1) } else { config.required("group_size", 1..=GROUP_MAX)? };
            let groups = self.counted(&name, cols, group)?;
            if !rows.is_multiple_of(per_word) {
                return Err(
                    self.wrong(&name, format!("expected a multiple of {per_word} rows, found {rows}"))
                );
            }
            let zeros = Some(self.words(&format!("{module}.qzeros"), [groups, rows / per_word])?);
            let (scales, scale_type, _) = self.scales(&format!("{module}.scales"), &[[groups, rows]])?;
            let order_name = format!("{module}.g_idx");
            let order = match self.stored_shape(&order_name) {
                Some(_) => Some(self.words(&order_name, [cols, 1])?),
                None => None,
            };
            let layout = Layout::Gptq { zero_plus };
            let found = Groups { codes, scales, scale_type, zeros, order, layout, bits, rows, cols, group };
            self.insert_groups(&module, found)?;
        }
        Ok(())
    }

    /// How many groups of columns there are; the last may be shorter.
    fn counted(&self, name: &str, cols: usize, group: usize) -> Result<usize, LoadError> {
        match cols {
            0 => Err(self.wrong(name, "expected columns, found none".to_owned())),
            _ => Ok(cols.div_ceil(group)),
        }
    }

    fn define_compressed(&mut self, config: &Config) -> Result<(), LoadError> {
        match config.text("format")?.unwrap_or_default() {
            "float-quantized" | "int-quantized" | "naive-quantized" => {
                let zeros = self.modules(".weight_zero_point");
                if let Some(module) = zeros.first() {
                    let what = "expected integers around zero, found zero points".to_owned();
                    return Err(self.wrong(&format!("{module}.weight_zero_point"), what));
                }
                self.define_bytes(config)
            }
            "pack-quantized" => self.define_packed(),
            _ => {
                Err(config
                    .wrong("format", "float-quantized, int-quantized, naive-quantized or pack-quantized"))
            }
        }
    }

    /// Integers of 4 or 8 bits in words; what their number does not say follows from the shape that is kept beside.
    fn define_packed(&mut self) -> Result<(), LoadError> {
        for module in self.modules(".weight_packed") {
            let name = format!("{module}.weight_packed");
            let (entry, [rows, words]) = self.part(&name, &["I32"])?;
            let codes = entry.span.clone();
            let cols = self.packed_cols(&module, rows)?;
            let bits = match (words == cols.div_ceil(8), words == cols.div_ceil(4)) {
                (true, _) => 4,
                (_, true) => 8,
                _ => {
                    let what = format!("expected {cols} columns of 4 or 8 bits, found {words} words");
                    return Err(self.wrong(&name, what));
                }
            };
            let scale_name = format!("{module}.weight_scale");
            let (_, [_, groups]) = self.part(&scale_name, &["F32", "F16", "BF16"])?;
            let (scales, scale_type, _) = self.scales(&scale_name, &[[rows, groups]])?;
            if groups == 0 || !cols.is_multiple_of(groups) {
                let what = format!("expected a divisor of {cols} scales a row, found {groups}");
                return Err(self.wrong(&scale_name, what));
            }
            let zero_name = format!("{module}.weight_zero_point");
            let zeros = match self.stored_shape(&zero_name) {
                Some(_) => Some(self.words(&zero_name, [rows.div_ceil(32 / bits), groups])?),
                None => None,
            };
            let order_name = format!("{module}.weight_g_idx");
            let order = match self.stored_shape(&order_name) {
                Some(_) => Some(self.words(&order_name, [cols, 1])?),
                None => None,
            };
            let (layout, group) = (Layout::Rows, cols / groups);
            let found = Groups { codes, scales, scale_type, zeros, order, layout, bits, rows, cols, group };
            self.insert_groups(&module, found)?;
        }
        Ok(())
    }

    fn packed_cols(&self, module: &str, rows: usize) -> Result<usize, LoadError> {
        let name = format!("{module}.weight_shape");
        let (entry, _) = self.part(&name, &["I64", "I32"])?;
        let size = if entry.type_name == "I64" { 8 } else { 4 };
        let numbers: Vec<u64> = self
            .bytes(&entry.span)
            .chunks_exact(size)
            .map(|b| b.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
            .collect();
        match numbers[..] {
            // beyond any tensor's columns, so that sums with it do not overflow
            [r, cols] if r == rows as u64 && (1..=u64::from(u32::MAX)).contains(&cols) => Ok(cols as usize),
            _ => Err(self.wrong(&name, format!("expected [{rows}, columns], found {numbers:?}"))),
        }
    }

    fn insert_groups(&mut self, module: &str, mut found: Groups<Span>) -> Result<(), LoadError> {
        let name = format!("{module}.weight");
        let view = found.map(|span| self.bytes(span));
        let groups = found.cols.div_ceil(found.group);
        if let Some(col) = (0..found.cols).find(|&col| view.group_of(col) >= groups) {
            let what = format!("expected groups below {groups}, found {} at {col}", view.group_of(col));
            return Err(self.wrong(&name, what));
        }
        let (symmetric, ordered) = (view.is_symmetric(), view.is_ordered());
        if symmetric {
            found.zeros = None;
        }
        if ordered {
            found.order = None;
        }
        let blocks = ordered && found.group.is_multiple_of(32) && found.cols.is_multiple_of(32);
        let dtype = match found.bits {
            4 if blocks => DType::Int4,
            8 if blocks && symmetric => DType::Int8,
            // columns in another order, or differences of more than 8 bits: read as numbers
            _ => DType::F32,
        };
        let shape = vec![found.rows, found.cols];
        let tensor = Tensor { dtype, shape, storage: Storage::Groups(found), rows: RowMap::PLAIN };
        self.insert(name, tensor, &[])
    }
}

fn block_size(config: &Config) -> Result<Option<(usize, usize)>, LoadError> {
    let Some(value) = config.get("weight_block_size") else { return Ok(None) };
    let number = |v: &serde_json::Value| {
        v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=GROUP_MAX).contains(n))
    };
    match value.as_array().map(Vec::as_slice) {
        Some([rows, cols]) => match (number(rows), number(cols)) {
            (Some(rows), Some(cols)) => Ok(Some((rows, cols))),
            _ => Err(config.wrong("weight_block_size", "two whole numbers")),
        },
        _ => Err(config.wrong("weight_block_size", "two whole numbers")),
    }
}

fn expect_text(config: &Config, key: &str, expected: &str) -> Result<(), LoadError> {
    match config.text(key)? {
        Some(found) if !found.eq_ignore_ascii_case(expected) => Err(config.wrong(key, expected)),
        _ => Ok(()),
    }
}
