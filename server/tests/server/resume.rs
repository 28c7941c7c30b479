//! Answers that were interrupted, or are read again.
