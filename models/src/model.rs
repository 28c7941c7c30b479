//! One checkpoint, opened: everything that is known of a model before a device sees it.

use std::path::Path;

use crate::graph::Graph;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use crate::LoadError;

/// Sampling defaults of `generation_config.json`; `None` where the file is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Tokens that end a text (of generation_config.json, else of config.json).
    pub eos: Vec<u32>,
    /// 0 where the file says `do_sample: false`.
    pub temperature: Option<f32>,
    /// Most probable tokens kept.
    pub top_k: Option<usize>,
    /// Probability mass kept.
    pub top_p: Option<f32>,
    /// Least relative probability kept.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// A checkpoint in the Hugging Face layout.
pub struct Model {
    /// Last part of the directory's path, or `mainstay-default`.
    pub name: String,
    /// The program.
    pub graph: Graph,
    /// Its weights, checked against the graph.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Its defaults.
    pub generation: Generation,
}

impl Model {
    /// Opens a directory with config.json, safetensors, tokenizer.json and, where present, tokenizer_config.json,
    /// chat_template.jinja and generation_config.json.
    pub fn open(_dir: &Path) -> Result<Self, LoadError> {
        unimplemented!()
    }

    /// The small model that is part of the binary (`models/default/`).
    pub fn embedded() -> Result<Self, LoadError> {
        unimplemented!()
    }
}
