//! stand-in
use mainstay_backend_api::{Backend, DeviceInfo, Executor, Limits};
use mainstay_kernels_cpu::Isa;
use mainstay_models::{LoadError, Weights, graph::Graph};
pub(crate) struct CpuOptions {
    pub(crate) threads: Option<usize>,
    pub(crate) isa: Option<Isa>,
}
pub(crate) struct CpuBackend;
impl CpuBackend {
    pub(crate) fn new(o: CpuOptions) -> Result<Self, LoadError> {
        let _ = (o.threads, o.isa);
        Ok(Self)
    }
}
pub(crate) fn default_threads() -> usize {
    2
}
impl Backend for CpuBackend {
    fn device(&self) -> DeviceInfo {
        mainstay_backend_candle::CandleBackend::cpu().device()
    }
    fn load(&self, g: &Graph, w: &Weights, l: &Limits) -> Result<Box<dyn Executor>, LoadError> {
        mainstay_backend_candle::CandleBackend::cpu().load(g, w, l)
    }
}
pub(crate) mod measure {
    pub(crate) fn read_bytes_per_second(_: usize) -> f64 {
        3e10
    }
    pub(crate) fn fma_flops_per_second(_: usize) -> f64 {
        1e11
    }
}
