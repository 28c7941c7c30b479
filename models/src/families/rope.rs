//! Rotary position embeddings as numbers: the inverse frequencies that a configuration asks for, rounded at the
//! same places as transformers rounds them (float32 throughout).

use std::sync::Arc;

use crate::LoadError;
use crate::config::Config;
use crate::graph::{Rope, RopeLayout};

/// Factors and lengths beyond this are not a model's.
const SCALE_MAX: f64 = 1e6;

/// The rotation of all heads of a model: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling`.
pub(super) fn rope(config: &Config, head_dim: usize) -> Result<Rope, LoadError> {
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let theta_range = 1.0..=1e12;
    let theta =
        match parameters.as_ref().map(|p| p.number("rope_theta", theta_range.clone())).transpose()?.flatten()
        {
            Some(theta) => theta,
            None => config.number("rope_theta", theta_range)?.unwrap_or(10_000.0),
        };
    for part in std::iter::once(config).chain(&parameters) {
        if part.number("partial_rotary_factor", 0.0..=1.0)?.is_some_and(|f| f != 1.0) {
            return Err(part.wrong("partial_rotary_factor", "1 (heads rotated in part are not supported)"));
        }
    }
    let mut inv_freq = default(theta, head_dim);
    if let Some(parameters) = &parameters {
        let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
        match parameters.text(key)?.unwrap_or("default") {
            "default" => {}
            "linear" => {
                let factor = factor(parameters, "factor")?;
                inv_freq.iter_mut().for_each(|f| *f /= factor);
            }
            "llama3" => llama3(parameters, &mut inv_freq)?,
            _ => {
                return Err(
                    parameters.wrong(key, "default, linear or llama3 (no other rope type is supported)")
                );
            }
        }
    }
    let tables = vec![Arc::from(inv_freq)];
    Ok(Rope { tables, head_dim, first: 0, dim: head_dim, layout: RopeLayout::Half, scale: 1.0 })
}

/// theta^(-2i / dim) for i in 0..dim/2 (RoFormer, arXiv 2104.09864).
fn default(theta: f64, dim: usize) -> Vec<f32> {
    // Through f64, so that each step is the correctly rounded f32 and no platform's powf shows.
    let base = f64::from(theta as f32);
    let exponent = |i: usize| f64::from((2 * i) as f32 / dim as f32);
    (0..dim / 2).map(|i| 1.0 / (base.powf(exponent(i)) as f32)).collect()
}

/// Llama 3's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended.
fn llama3(parameters: &Config, inv_freq: &mut [f32]) -> Result<(), LoadError> {
    let stretch = factor(parameters, "factor")?;
    let low = factor(parameters, "low_freq_factor")?;
    let high = factor(parameters, "high_freq_factor")?;
    if high <= low {
        return Err(parameters.wrong("high_freq_factor", "more than low_freq_factor"));
    }
    let original = parameters.required("original_max_position_embeddings", 1..=1 << 24)? as f32;
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

fn factor(parameters: &Config, key: &str) -> Result<f32, LoadError> {
    let expected = format!("a number above 0 and at most {SCALE_MAX}");
    let value = parameters.number(key, 0.0..=SCALE_MAX)?.filter(|&f| f >= 1.0 / SCALE_MAX);
    Ok(value.ok_or_else(|| parameters.wrong(key, &expected))? as f32)
}
