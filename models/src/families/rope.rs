//! Rotary position embeddings as numbers: the inverse frequencies that a configuration asks for, rounded at the
//! same places as transformers rounds them (float32 throughout).

use std::sync::Arc;

use crate::LoadError;
use crate::config::Config;
use crate::graph::{Rope, RopeLayout, RopeSwitch};

/// Factors and lengths beyond this are not a model's.
const SCALE_MAX: f64 = 1e6;

/// The longest length that a model may have been trained for first.
const ORIGINAL_MAX: usize = 1 << 24;

/// The rotation of all heads of a model: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`.
pub(super) fn rope(config: &Config, head_dim: usize) -> Result<Rope, LoadError> {
    let parameters = parameters(config)?;
    let of_parameters = |key, range| parameters.as_ref().map_or(Ok(None), |p| p.number(key, range));
    let theta_range = 1.0..=1e12;
    let theta = match of_parameters("rope_theta", theta_range.clone())? {
        Some(theta) => theta,
        None => config.number("rope_theta", theta_range)?.unwrap_or(10_000.0),
    };
    let part = match of_parameters("partial_rotary_factor", 0.0..=1.0)? {
        Some(part) => part,
        None => config.number("partial_rotary_factor", 0.0..=1.0)?.unwrap_or(1.0),
    };
    // Cut off, as Python's int() does.
    let dim = (head_dim as f64 * part) as usize;
    if dim == 0 || !dim.is_multiple_of(2) {
        let expected = format!("an even number of the head's {head_dim} elements, not {dim}");
        return Err(config.wrong("partial_rotary_factor", &expected));
    }
    let mut rope = Rope { tables: Vec::new(), head_dim, first: 0, dim, layout: RopeLayout::Half, scale: 1.0 };
    let mut inv_freq = default(theta, dim);
    if let Some(parameters) = &parameters {
        let key = kind_key(parameters);
        match parameters.text(key)?.unwrap_or("default") {
            "default" => {}
            "linear" => {
                let factor = factor(parameters, "factor")?;
                inv_freq.iter_mut().for_each(|f| *f /= factor);
            }
            "llama3" => llama3(parameters, &mut inv_freq)?,
            "factors" => divide(parameters, &mut inv_freq)?,
            "yarn" => rope.scale = yarn(parameters, (theta, dim), &mut inv_freq)?,
            "longrope" | "su" => {
                rope.scale = long_scale(config, parameters)?;
                let divided = |key| Ok(Arc::from(long_table(parameters, key, (theta, dim))?));
                rope.tables = vec![divided("short_factor")?, divided("long_factor")?];
                return Ok(rope);
            }
            _ => {
                let known =
                    "default, linear, llama3, yarn, longrope or factors (no other rope type is supported)";
                return Err(parameters.wrong(key, known));
            }
        }
    }
    rope.tables.push(Arc::from(inv_freq));
    Ok(rope)
}

/// Where the second table of LongRoPE begins.
pub(super) fn switch(config: &Config) -> Result<RopeSwitch, LoadError> {
    let Some(parameters) = parameters(config)? else { return Ok(RopeSwitch(None)) };
    match parameters.text(kind_key(&parameters))? {
        Some("longrope" | "su") => Ok(RopeSwitch(Some(long_original(config, &parameters)?))),
        _ => Ok(RopeSwitch(None)),
    }
}

fn parameters(config: &Config) -> Result<Option<Config>, LoadError> {
    match config.object("rope_parameters")? {
        Some(parameters) => Ok(Some(parameters)),
        None => config.object("rope_scaling"),
    }
}

/// The key that names the kind of scaling: older configurations call it otherwise.
fn kind_key(parameters: &Config) -> &'static str {
    if parameters.get("rope_type").is_some() { "rope_type" } else { "type" }
}

/// theta^(-2i / dim) for i in 0..dim/2 (RoFormer, arXiv 2104.09864).
fn default(theta: f64, dim: usize) -> Vec<f32> {
    powers(theta, dim).map(|power| 1.0 / power).collect()
}

/// theta^(2i / dim) for i in 0..dim/2.
fn powers(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    // Through f64, so that each step is the correctly rounded f32 and no platform's powf shows.
    let base = f64::from(theta as f32);
    (0..dim / 2).map(move |i| base.powf(f64::from((2 * i) as f32 / dim as f32)) as f32)
}

/// Llama 3's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(parameters: &Config, inv_freq: &mut [f32]) -> Result<(), LoadError> {
    let stretch = factor(parameters, "factor")?;
    let low = factor(parameters, "low_freq_factor")?;
    let high = factor(parameters, "high_freq_factor")?;
    if high <= low {
        return Err(parameters.wrong("high_freq_factor", "more than low_freq_factor"));
    }
    let original = parameters.required("original_max_position_embeddings", 1..=ORIGINAL_MAX)? as f32;
    for f in inv_freq {
        let wavelength = std::f32::consts::TAU / *f;
        if wavelength > original / low {
            *f /= stretch;
        } else if wavelength >= original / high {
            let smooth = (original / wavelength - low) / (high - low);
            *f = (1.0 - smooth) * *f / stretch + smooth * *f;
        }
    }
    Ok(())
}

/// A divisor for each frequency, as GGUF files write any scaling down.
fn divide(parameters: &Config, inv_freq: &mut [f32]) -> Result<(), LoadError> {
    let expected = format!("{} numbers above 0", inv_freq.len());
    let wrong = || parameters.wrong("factors", &expected);
    let factors = parameters.get("factors").and_then(|v| v.as_array()).filter(|l| l.len() == inv_freq.len());
    for (f, factor) in inv_freq.iter_mut().zip(factors.ok_or_else(wrong)?) {
        let factor = factor.as_f64().filter(|f| (1.0 / SCALE_MAX..=SCALE_MAX).contains(f));
        *f /= factor.ok_or_else(wrong)? as f32;
    }
    Ok(())
}

/// YaRN (arXiv 2309.00071): pairs that turn often are kept, those that turn seldom are stretched by `factor`, and
/// those between blended. Returns what sine and cosine are multiplied by.
fn yarn(parameters: &Config, (theta, dim): (f64, usize), inv_freq: &mut [f32]) -> Result<f32, LoadError> {
    let stretch = factor(parameters, "factor")?;
    let original = parameters.required("original_max_position_embeddings", 1..=ORIGINAL_MAX)? as f64;
    let turns = |key, default| {
        let turns = parameters.number(key, 0.0..=SCALE_MAX)?;
        Ok(turns.filter(|&turns| turns > 0.0).unwrap_or(default))
    };
    // The pair that turns so often within the original context.
    let pair_of =
        |turns: f64| dim as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair_of(turns("beta_fast", 32.0)?), pair_of(turns("beta_slow", 1.0)?));
    if parameters.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min((dim - 1) as f64));
    if low == high {
        high += 0.001;
    }
    let (low, width) = (low as f32, (high - low) as f32);
    for (pair, (f, power)) in inv_freq.iter_mut().zip(powers(theta, dim)).enumerate() {
        let kept = 1.0 - ((pair as f32 - low) / width).clamp(0.0, 1.0);
        *f = 1.0 / (stretch * power) * (1.0 - kept) + *f * kept;
    }
    yarn_scale(parameters)
}

/// What YaRN multiplies sine and cosine by: `attention_factor`, else by how much the context has grown.
fn yarn_scale(parameters: &Config) -> Result<f32, LoadError> {
    let number = |key| Ok(parameters.number(key, 0.0..=SCALE_MAX)?.filter(|&n| n > 0.0));
    if let Some(factor) = parameters.number("attention_factor", 0.0..=SCALE_MAX)? {
        return Ok(factor as f32);
    }
    let stretch = f64::from(factor(parameters, "factor")?);
    Ok(match (number("mscale")?, number("mscale_all_dim")?) {
        (Some(mscale), Some(all)) => (grown(stretch, mscale) / grown(stretch, all)) as f32,
        _ => grown(stretch, 1.0) as f32,
    })
}

/// What DeepSeek multiplies scores by, twice, where its context was stretched.
pub(super) fn yarn_mscale_all(config: &Config) -> Result<f64, LoadError> {
    let Some(parameters) = parameters(config)? else { return Ok(1.0) };
    if parameters.text(kind_key(&parameters))?.unwrap_or("default") == "default" {
        return Ok(1.0);
    }
    match parameters.number("mscale_all_dim", 0.0..=SCALE_MAX)? {
        Some(all) if all > 0.0 => Ok(grown(f64::from(factor(&parameters, "factor")?), all)),
        _ => Ok(1.0),
    }
}

fn grown(stretch: f64, mscale: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { 0.1 * mscale * stretch.ln() + 1.0 }
}

/// A table of LongRoPE (arXiv 2402.13753): a factor of its own for each pair.
fn long_table(parameters: &Config, key: &str, (theta, dim): (f64, usize)) -> Result<Vec<f32>, LoadError> {
    let expected = || format!("{} numbers above 0 and at most {SCALE_MAX}", dim / 2);
    let factors = parameters.get(key).and_then(|list| list.as_array()).filter(|list| list.len() == dim / 2);
    let positive = |factor: &serde_json::Value| {
        factor.as_f64().filter(|f| (1.0 / SCALE_MAX..=SCALE_MAX).contains(f)).map(|f| f as f32)
    };
    let factors: Option<Vec<f32>> = factors.and_then(|list| list.iter().map(positive).collect());
    let factors = factors.ok_or_else(|| parameters.wrong(key, &expected()))?;
    Ok(factors.iter().zip(powers(theta, dim)).map(|(factor, power)| 1.0 / (factor * power)).collect())
}

/// The length that a model with LongRoPE was trained for first: what Phi 3 says at the top comes first.
fn long_original(config: &Config, parameters: &Config) -> Result<usize, LoadError> {
    const KEY: &str = "original_max_position_embeddings";
    match config.count(KEY, 1..=ORIGINAL_MAX)? {
        Some(original) => Ok(original),
        None => parameters.required(KEY, 1..=ORIGINAL_MAX),
    }
}

/// What LongRoPE multiplies sine and cosine by, whichever the table: `attention_factor`, else by how much the context
/// has grown.
fn long_scale(config: &Config, parameters: &Config) -> Result<f32, LoadError> {
    if let Some(factor) = parameters.number("attention_factor", 0.0..=SCALE_MAX)? {
        return Ok(factor as f32);
    }
    let original = long_original(config, parameters)? as f64;
    let context = config.required("max_position_embeddings", 1..=usize::MAX)? as f64;
    let grown = parameters.number("factor", 0.0..=SCALE_MAX)?.unwrap_or(context / original);
    Ok(if grown <= 1.0 { 1.0 } else { (1.0 + grown.ln() / original.ln()).sqrt() as f32 })
}

fn factor(parameters: &Config, key: &str) -> Result<f32, LoadError> {
    let expected = format!("a number above 0 and at most {SCALE_MAX}");
    let value = parameters.number(key, 0.0..=SCALE_MAX)?.filter(|&f| f >= 1.0 / SCALE_MAX);
    Ok(value.ok_or_else(|| parameters.wrong(key, &expected))? as f32)
}
