//! backends/candle
