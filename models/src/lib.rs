//! What a model is: its graph, weights, tokenizer and chat template. No arithmetic, no devices, no HTTP.

pub mod adapter;
pub mod config;
pub mod error;
pub mod families;
mod file;
pub mod gguf;
pub mod graph;
pub mod model;
pub mod quant;
mod sentence;
pub mod template;
pub mod tokenizer;
pub mod weights;

pub use adapter::{AdapterWeights, LowRank};
pub use error::LoadError;
pub use model::{Generation, Hashes, Model};
pub use weights::Weights;
