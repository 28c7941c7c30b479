//! `mainstay quantize`: a checkpoint in the Hugging Face layout as one GGUF file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use mainstay_models::gguf::{MIXES, Mix, Plan, Planned};
use mainstay_models::quant::encode_row;
use mainstay_models::weights::AtLoad;
use mainstay_models::{LoadError, Model, Weights};

use crate::exit::Usage;
use crate::options::switch;
use crate::progress::Progress;
use crate::{machine, size};

/// Bytes of a tensor that are encoded before they are written: memory for big ones stays small.
const RUN_BYTES: usize = 64 << 20;
/// Rows that a thread takes at a time.
const ROWS: usize = 16;

#[derive(clap::Args, Debug)]
pub(crate) struct QuantizeArgs {
    /// Directory with config.json, safetensors and tokenizer.json.
    #[arg(env = "MAINSTAY_QUANTIZE_INPUT")]
    input: PathBuf,
    /// The file to write, ending in .gguf.
    #[arg(env = "MAINSTAY_QUANTIZE_OUTPUT")]
    output: PathBuf,
    /// How matrices are stored: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k_s, q4_k_m, q5_k_s, q5_k_m or q6_k.
    #[arg(long = "type", env = "MAINSTAY_QUANTIZE_TYPE", value_name = "TYPE", default_value = "q4_k_m", value_parser = mix)]
    mix: Mix,
    /// Threads to encode with [default: one for each core].
    #[arg(long, env = "MAINSTAY_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Replace a file that exists.
    #[arg(long, env = "MAINSTAY_FORCE", value_parser = switch())]
    force: bool,
}

fn mix(name: &str) -> Result<Mix, String> {
    let known = || MIXES.map(|mix| mix.name).join(", ");
    Mix::named(name).ok_or_else(|| format!("expected one of {}, found {name}", known()))
}

pub(crate) fn run(args: &QuantizeArgs) -> Result<()> {
    if !args.input.is_dir() {
        let what = "expected a directory with config.json and safetensors";
        return Err(Usage(format!("{}: {what}", args.input.display())).into());
    }
    if !args.output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        return Err(Usage(format!("{}: expected a name ending in .gguf", args.output.display())).into());
    }
    if args.output.exists() && !args.force {
        let what = "this file exists (--force replaces it)";
        return Err(Usage(format!("{}: {what}", args.output.display())).into());
    }
    let plan = Plan::new(&args.input, args.mix)?;
    let threads = args.threads.unwrap_or_else(machine::cores).max(1);
    // Written aside and renamed, so that nobody reads a half.
    let aside = args.output.with_extension(format!("gguf.new-{}", std::process::id()));
    let written = write(&plan, &aside, threads)
        .and_then(|bytes| std::fs::rename(&aside, &args.output).context("renaming").map(|()| bytes));
    if written.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    let bytes = written.with_context(|| args.output.display().to_string())?;
    let numbers: usize = plan.tensors().iter().map(|t| t.rows * t.cols).sum();
    println!(
        "{}: {}, {} tensors, {:.2} bits a weight",
        args.output.display(),
        size::show(bytes),
        plan.tensors().len(),
        bytes as f64 * 8.0 / numbers.max(1) as f64
    );
    Ok(())
}

fn write(plan: &Plan, path: &Path, threads: usize) -> Result<u64> {
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(plan.header())?;
    let total: usize = plan.tensors().iter().map(Planned::padded_bytes).sum();
    let mut progress = Progress::start("quantizing", total as u64);
    for tensor in plan.tensors() {
        let run = (RUN_BYTES / tensor.row_bytes(1).max(1)).max(ROWS);
        let mut bytes = Vec::new();
        for first in (0..tensor.rows).step_by(run) {
            let rows = first..(first + run).min(tensor.rows);
            bytes.resize(tensor.row_bytes(rows.len()), 0);
            encode(plan, tensor, first, &mut bytes, threads)?;
            out.write_all(&bytes)?;
            progress.advance(bytes.len() as u64);
        }
        let padding = tensor.padded_bytes() - tensor.row_bytes(tensor.rows);
        out.write_all(&vec![0; padding])?;
    }
    let file = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

/// Rows from `first` on.
fn encode(
    plan: &Plan,
    tensor: &Planned,
    first: usize,
    bytes: &mut [u8],
    threads: usize,
) -> Result<(), LoadError> {
    spread(bytes, tensor.row_bytes(1), threads, |rows, out| {
        plan.encode(tensor, first + rows.start..first + rows.end, out)
    })
}

/// Makes rows on several threads; which of them makes which does not show.
fn spread(
    bytes: &mut [u8],
    row_bytes: usize,
    threads: usize,
    make: impl Fn(Range<usize>, &mut [u8]) -> Result<(), LoadError> + Sync,
) -> Result<(), LoadError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let parts: Vec<Mutex<&mut [u8]>> = bytes.chunks_mut(ROWS * row_bytes).map(Mutex::new).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), LoadError> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(at) else { return Ok(()) };
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            make(at * ROWS..at * ROWS + part.len() / row_bytes, &mut part)?;
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(parts.len())).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().map(|w| w.join().expect("encoding does not panic")).fold(own, Result::and)
    })
}

/// Quantizes the weights of a model in memory, as `--quant` asks.
pub(crate) fn at_load(model: &mut Model, quant: AtLoad, threads: usize) -> Result<()> {
    weights_at_load(&mut model.weights, quant, threads)?;
    model.quantized_at_load(quant);
    Ok(())
}

/// The same where there are weights only.
pub(crate) fn weights_at_load(weights: &mut Weights, quant: AtLoad, threads: usize) -> Result<()> {
    let names: Vec<String> = weights.names().map(str::to_owned).collect();
    let stored = |name: &String| weights.tensor(name).map_or(0, |view| view.stored_bytes() as u64);
    let mut progress = Progress::start("quantizing weights", names.iter().map(stored).sum());
    for name in names {
        let view = weights.tensor(&name)?;
        let stored = view.stored_bytes() as u64;
        if let Some(dtype) = weights.type_at_load(&name, quant) {
            let row_bytes = dtype.row_bytes(view.cols()).unwrap_or_default();
            let mut bytes = vec![0; row_bytes * view.rows()];
            spread(&mut bytes, row_bytes, threads, |rows, out| {
                let mut row = vec![0.0; view.cols()];
                for (at, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
                    view.read_row(at, &mut row);
                    if let Some(found) = row.iter().find(|x| !x.is_finite()) {
                        let path = weights.origin().to_owned();
                        let what = format!("tensor `{name}`: expected finite numbers, found {found}");
                        return Err(LoadError::Format { path, what });
                    }
                    encode_row(dtype, &row, out);
                }
                Ok(())
            })?;
            weights.release(&name);
            weights.replace(&name, dtype, bytes);
        }
        progress.advance(stored);
    }
    Ok(())
}
