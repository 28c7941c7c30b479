//! The text model inside one that also sees or hears: its tensors are asked for as if it stood alone.

use super::{Cut, Weights};
use crate::LoadError;

/// How such models call it, and what it is called alone: on the hub, and as transformers 5 saves it.
const NESTED: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

impl Weights {
    /// Names the tensors of a text model inside another.
    ///
    /// # Errors
    /// [`LoadError::Format`] where it stands there twice, or a tensor of it is not of numbers.
    pub(super) fn name_text_model(&mut self) -> Result<(), LoadError> {
        let alone = |name: &str| {
            let rest =
                |&(inside, alone): &(&str, &str)| Some(format!("{alone}{}", name.strip_prefix(inside)?));
            Some((NESTED.iter().find_map(rest)?, name.to_owned()))
        };
        let names: Vec<(String, String)> = self.stored_names().filter_map(alone).collect();
        names.into_iter().try_for_each(|(name, stored)| self.define(name, &stored, &Cut::default()))
    }
}
