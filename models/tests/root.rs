//! The root over all weights: every byte counts, and a sidecar is believed only while the files look the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use mainstay_models::weights::RootCheck;
use mainstay_models::{Model, Weights};

struct Dir(PathBuf);

impl Dir {
    /// A copy of a small checkpoint.
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mainstay-root-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(&dir.0).unwrap();
        for file in fs::read_dir(fixture()).unwrap() {
            let from = file.unwrap().path();
            fs::copy(&from, dir.0.join(from.file_name().unwrap())).unwrap();
        }
        dir
    }

    fn weights(&self) -> Weights {
        Weights::open_dir(&self.0).unwrap()
    }

    fn sidecar(&self) -> PathBuf {
        self.0.join("sidecar.json")
    }

    fn cached(&self, check: RootCheck) -> [u8; 32] {
        self.weights().cached_root(&[self.sidecar()], check, 2)
    }

    /// Flips a bit of the last tensor, in place.
    fn flip(&self) {
        let path = self.0.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama")
}

#[test]
fn the_root_depends_on_bytes_and_on_nothing_else() {
    let (a, b) = (Dir::new(), Dir::new());
    let root = a.weights().root(1);
    assert_eq!(b.weights().root(3), root, "neither the place nor the threads count");
    b.flip();
    assert_ne!(b.weights().root(3), root);
}

#[test]
fn a_sidecar_is_believed_while_the_files_look_the_same() {
    let dir = Dir::new();
    let root = dir.cached(RootCheck::Trust);
    assert_eq!(root, dir.weights().root(1));
    // A wrong root in a sidecar whose files look right shows who reads it.
    let text = fs::read_to_string(dir.sidecar()).unwrap();
    let hex: String = root.iter().map(|b| format!("{b:02x}")).collect();
    fs::write(dir.sidecar(), text.replace(&hex, &"00".repeat(32))).unwrap();
    assert_eq!(dir.cached(RootCheck::Trust), [0; 32]);
    assert_eq!(dir.cached(RootCheck::Verify), root);
    assert_eq!(dir.cached(RootCheck::Trust), root, "the check mended the sidecar");
    dir.flip();
    assert_ne!(dir.cached(RootCheck::Trust), root, "the file changed");
}

#[test]
fn a_sidecar_that_is_no_sidecar_is_written_anew() {
    let dir = Dir::new();
    let root = dir.weights().root(1);
    for wrong in ["", "{}", "[1]", "{\"version\": 2, \"root\": \"\", \"files\": []}", "\u{0}"] {
        fs::write(dir.sidecar(), wrong).unwrap();
        assert_eq!(dir.cached(RootCheck::Trust), root, "{wrong:?}");
        assert!(fs::read_to_string(dir.sidecar()).unwrap().contains("model.safetensors"));
    }
    // Nowhere to write: the root all the same.
    let nowhere = dir.0.join("model.safetensors/none");
    assert_eq!(dir.weights().cached_root(&[nowhere], RootCheck::Trust, 2), root);
}

#[test]
fn hashes_tell_which_file_changed() {
    let dir = Dir::new();
    let open = || Model::open(&dir.0).unwrap().hashes;
    let before = open();
    let edit = |name: &str, from: &str, to: &str| {
        let path = dir.0.join(name);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{name}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    };
    edit("tokenizer.json", "{", "{ ");
    let tokenizer = open();
    assert_ne!(tokenizer.tokenizer, before.tokenizer);
    assert_eq!((tokenizer.config, tokenizer.template), (before.config, before.template));
    edit("tokenizer_config.json", "{", "{ ");
    assert_ne!(open().template, before.template);
    // What no op sees does not count; what one does, counts.
    edit("config.json", "{", "{\"transformers_version\": \"9\", ");
    assert_eq!(open().config, before.config);
    let config = fs::read_to_string(dir.0.join("config.json")).unwrap();
    let theta = config.lines().find(|line| line.contains("\"rms_norm_eps\"")).unwrap().to_owned();
    edit("config.json", &theta, "\"rms_norm_eps\": 0.0625,");
    assert_ne!(open().config, before.config);
}
