//! `mainstay bench shape`: a model of random weights in the shape of a real one, for other programs to read.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mainstay_bench::{Mix, Shape, WriteError};

use crate::exit::Usage;
use crate::progress::Progress;

/// Options of `mainstay bench shape`.
#[derive(Args, Clone, Debug)]
pub(super) struct ShapeArgs {
    /// The shape: qwen3-0.6b, llama-3.2-1b, llama-3.1-8b.
    #[arg(env = "MAINSTAY_SHAPE")]
    shape: Shape,
    /// The directory to write: config.json, tokenizer.json, model.safetensors. `mainstay quantize` makes a GGUF file of it.
    #[arg(env = "MAINSTAY_SHAPE_DIR")]
    dir: PathBuf,
    /// Element type of the weights, f32, f16 or bf16, which are the same numbers at every call.
    #[arg(long = "type", env = "MAINSTAY_WEIGHT_TYPE", default_value = "bf16")]
    dtype: Mix,
}

/// Writes the directory.
pub(super) fn run(args: &ShapeArgs) -> Result<()> {
    if args.dir.join("config.json").exists() {
        let what = "expected a directory without a model, found a config.json";
        return Err(Usage(format!("{}: {what}", args.dir.display())).into());
    }
    let mut progress = None;
    let written = args.shape.write(&args.dir, args.dtype, |total, bytes| {
        progress.get_or_insert_with(|| Progress::start("writing weights", total)).advance(bytes);
    });
    drop(progress);
    written.map_err(|error| match error {
        WriteError::Shape(what) => Usage(what).into(),
        other => anyhow::Error::from(other),
    })?;
    println!("{}: {} of random weights", args.dir.display(), args.shape);
    Ok(())
}
