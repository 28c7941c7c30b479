//! Experts of gpt-oss, which are stored as stacks of transposed matrices with gate and up row about row: here each
//! expert's matrices get names of their own, as other families store them.

use super::{Cut, Rows, Weights};
use crate::LoadError;

/// What follows the name of a stack's layer in the name of its biases; only gpt-oss has them.
const MARK: &str = "mlp.experts.gate_up_proj_bias";

/// What an expert has: its name, the name of its stack, and which of the stack's rows are its own.
const PARTS: [(&str, &str, Rows); 3] = [
    ("gate", "gate_up", Rows::Every { first: 0, step: 2 }),
    ("up", "gate_up", Rows::Every { first: 1, step: 2 }),
    ("down", "down", Rows::All),
];

impl Weights {
    /// Names the experts of all stacks.
    ///
    /// # Errors
    /// [`LoadError::Format`] and [`LoadError::MissingTensor`] where a stack is not what its biases say.
    pub(super) fn name_experts(&mut self) -> Result<(), LoadError> {
        let stacks = self.stored_names().filter(|name| name.ends_with(MARK));
        let stacks: Vec<String> =
            stacks.map(|name| name.trim_end_matches("gate_up_proj_bias").to_owned()).collect();
        for prefix in stacks {
            let biases = self.stored_shape(&format!("{prefix}gate_up_proj_bias"));
            // Each takes bytes of the file, so that there are no more of them than it has.
            let biases = biases.filter(|shape| !shape.contains(&0));
            let count = biases.and_then(|shape| shape.first()).copied().unwrap_or_default();
            for id in 0..count {
                for (part, stack, rows) in PARTS {
                    self.name_expert((&prefix, id), part, stack, rows)?;
                }
            }
        }
        Ok(())
    }

    fn name_expert(
        &mut self,
        (prefix, id): (&str, usize),
        part: &str,
        stack: &str,
        rows: Rows,
    ) -> Result<(), LoadError> {
        let stored = format!("{prefix}{stack}_proj");
        let name = |suffix: &str| format!("{prefix}{id}.{part}_proj.{suffix}");
        let cut = |transposed| Cut { index: Some(id), transposed, rows: rows.clone() };
        self.define(name("bias"), &format!("{stored}_bias"), &cut(false))?;
        if self.stored_shape(&stored).is_some() {
            return self.define(name("weight"), &stored, &cut(true));
        }
        let (codes, scales) = (format!("{stored}_blocks"), format!("{stored}_scales"));
        self.define_mxfp4(name("weight"), (&codes, &scales), &cut(false))
    }
}
