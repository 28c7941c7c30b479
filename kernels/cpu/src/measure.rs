//! What the machine can do: memory bandwidth and f32 arithmetic, measured in about a second.
