//! Sets MAINSTAY_SOURCES.

#[path = "../sources.rs"]
mod sources;

fn main() {
    sources::emit(&["src", "../../kernels/cpu/src"]);
}
