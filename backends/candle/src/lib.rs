//! The reference backend: interprets the graph op by op with candle, clear rather than fast. It is what every other
//! backend is compared with, and it runs on Apple GPUs when built with the feature `metal`.
//!
//! candle chooses kernels by shape, so results depend on the batch within rounding: [`Invariance::None`].

mod adapter;
mod experts;
mod pages;
mod plan;
mod run;

use candle_core::Device;
use mainstay_backend_api::{Backend, DeviceInfo, Executor, Limits, StepError};
use mainstay_models::{LoadError, Weights, graph::Graph};

#[cfg(doc)]
use mainstay_backend_api::Invariance;

/// Its name in messages and classes.
const NAME: &str = "candle";

/// candle on one device.
pub struct CandleBackend {
    device: Device,
}

impl CandleBackend {
    /// On the processor.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu }
    }

    /// On the first Apple GPU.
    ///
    /// # Errors
    /// [`LoadError::Resources`] if there is none, or the feature `metal` is not built in.
    pub fn metal() -> Result<Self, LoadError> {
        let device = Device::new_metal(0)
            .map_err(|e| LoadError::Resources { what: format!("expected an Apple GPU, found none: {e}") })?;
        Ok(Self { device })
    }

    /// On the Apple GPU where there is one and the feature is built in, else on the processor.
    pub fn best() -> Self {
        Self::metal().unwrap_or_else(|_| Self::cpu())
    }

    /// What stands behind the slash in names: `cpu` or `metal`.
    fn path(device: &Device) -> &'static str {
        if device.is_metal() { "metal" } else { "cpu" }
    }
}

impl Backend for CandleBackend {
    fn device(&self) -> DeviceInfo {
        let name = format!("candle on {}", Self::path(&self.device));
        DeviceInfo { backend: NAME, name, memory_bytes: None }
    }

    fn load(
        &self,
        graph: &Graph,
        weights: &Weights,
        limits: &Limits,
    ) -> Result<Box<dyn Executor>, LoadError> {
        graph.check(weights)?;
        let plan = plan::Plan::new(graph, weights, limits, &self.device)?;
        let pages = pages::Pages::new(&plan.layout, limits)?;
        Ok(Box::new(run::CandleExecutor::new(plan, pages, limits.clone())))
    }
}

/// A refusal of candle while weights are brought to the device.
fn load_error(e: candle_core::Error) -> LoadError {
    LoadError::Resources { what: format!("{NAME}: {e}") }
}

/// A refusal of candle inside a step.
fn step_error(e: candle_core::Error) -> StepError {
    StepError::Device { device: NAME, what: e.to_string() }
}
