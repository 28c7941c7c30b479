//! The `mainstay` command: the composition root, the only code that names concrete backends.

fn main() {}
