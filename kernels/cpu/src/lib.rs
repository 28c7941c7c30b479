//! kernels/cpu
