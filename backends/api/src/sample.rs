//! Drawing a token from logits: the one reference that every backend is held to.
