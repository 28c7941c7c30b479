//! What a build script of a backend sets: MAINSTAY_SOURCES, which stands for the code that decides a result's bits.

use std::hash::{DefaultHasher, Hasher};
use std::path::Path;
use std::{env, fs, process::Command};

/// Hashes files and whole directories, given relative to the crate, with the compiler's version.
pub(crate) fn emit(paths: &[&str]) {
    let mut hasher = DefaultHasher::new();
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("-vV").output().expect("the compiler tells its version");
    hasher.write(&version.stdout);
    for path in paths {
        println!("cargo::rerun-if-changed={path}");
        absorb(Path::new(path), &mut hasher);
    }
    println!("cargo::rustc-env=MAINSTAY_SOURCES={:016x}", hasher.finish());
}

fn absorb(path: &Path, hasher: &mut DefaultHasher) {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("a directory of sources is read");
        let mut entries: Vec<_> = entries.map(|e| e.expect("an entry is read").path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| absorb(entry, hasher));
        return;
    }
    let name = path.file_name().expect("a source has a name").to_string_lossy();
    let bytes = fs::read(path).expect("a source is read");
    for part in [name.as_bytes(), &bytes] {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
}
