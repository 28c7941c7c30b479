//! The CPU backend: a graph is planned once, then a step is a loop over planned calls on one arena.
//!
//! A token's logits and its keys and values are the same bits whatever the batch, the chunking of the prompt, the
//! thread count and the placement of pages: every sum has one order, fixed by the kernels, and threads only divide
//! outputs among themselves.

mod adapter;
mod ahead;
mod arena;
mod attend;
mod executor;
mod experts;
mod latent;
mod load;
mod machine;
mod pages;
mod place;
mod plan;
mod pool;
mod products;
mod run;
mod whole;

use mainstay_backend_api::{Backend, DeviceInfo, Executor, Limits};
use mainstay_kernels_cpu::{Isa, Kernels};
use mainstay_models::graph::Graph;
use mainstay_models::{LoadError, Weights};

use crate::plan::Fusing;

/// What the operator may decide.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Threads that compute; the physical cores where `None`.
    pub threads: Option<usize>,
    /// Instruction set; where `None`, the one that `MAINSTAY_CPU` names, or the best.
    pub isa: Option<Isa>,
}

/// Threads that compute where nothing else is asked for: the physical cores that the process may use.
pub fn default_threads() -> usize {
    machine::physical_cores()
}

/// Compiles graphs for this machine's processor.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    kernels: Kernels,
    threads: usize,
    fusing: Fusing,
}

impl CpuBackend {
    /// A backend on this machine.
    ///
    /// # Errors
    /// [`LoadError::Resources`] if the machine does not have the instruction set, or no thread is asked for.
    pub fn new(options: CpuOptions) -> Result<Self, LoadError> {
        let refused = |e: mainstay_kernels_cpu::IsaError| LoadError::Resources { what: e.to_string() };
        let isa = options.isa.map_or_else(Isa::from_environment, Ok).map_err(refused)?;
        let kernels = Kernels::new(isa).map_err(refused)?;
        let threads = options.threads.unwrap_or_else(default_threads);
        if threads == 0 {
            return Err(LoadError::Resources { what: "expected at least 1 thread, found 0".into() });
        }
        Ok(Self { kernels, threads, fusing: Fusing::All })
    }

    /// Models that it loads take adapters. They are a little slower, and have the same bits.
    pub fn with_adapters(self) -> Self {
        Self { fusing: Fusing::LeavesProducts, ..self }
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The instruction set that was chosen.
    pub fn isa(&self) -> Isa {
        self.kernels.isa()
    }
}

impl Backend for CpuBackend {
    fn device(&self) -> DeviceInfo {
        let name = format!("{} on {} threads", self.kernels.isa().name(), self.threads);
        DeviceInfo { backend: "cpu", name, memory_bytes: machine::memory_bytes() }
    }

    fn load(
        &self,
        graph: &Graph,
        weights: &Weights,
        limits: &Limits,
    ) -> Result<Box<dyn Executor>, LoadError> {
        graph.check(weights)?;
        Ok(Box::new(executor::CpuExecutor::new(self, (graph, weights), limits)?))
    }
}
