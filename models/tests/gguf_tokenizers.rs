//! Tokenizers of GGUF files against the ids that llama.cpp publishes beside its vocabularies, where these are at hand.

use std::path::Path;

use mainstay_models::tokenizer::{AddSpecial, Tokenizer};

/// Files that llama.cpp keeps in its own repository; each has its model's licence, so they are not kept here.
const VOCABULARIES: &str = "../../shared/real/tokenizers";

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn published_vectors_are_reached() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(VOCABULARIES);
    let Ok(entries) = std::fs::read_dir(&dir) else {
        eprintln!("skipped: {} is not there", dir.display());
        return;
    };
    let mut tested = 0;
    for path in entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "gguf")) {
        let tokenizer = Tokenizer::from_gguf(&path).unwrap_or_else(|e| panic!("{e}"));
        let read = |suffix: &str| std::fs::read_to_string(format!("{}{suffix}", path.display())).unwrap();
        let (texts, ids) = (read(".inp"), read(".out"));
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let ids: Vec<Vec<u32>> =
            ids.lines().map(|l| l.split_whitespace().map(|n| n.parse().unwrap()).collect()).collect();
        let mut wrong = Vec::new();
        for (text, expected) in texts.iter().zip(&ids) {
            let found = tokenizer.encode(text, AddSpecial::No).unwrap();
            if found != *expected {
                wrong.push(format!("{text:?}: expected {expected:?}, found {found:?}"));
            }
        }
        assert!(ids.len() >= 40, "{}: {} vectors", path.display(), ids.len());
        assert!(wrong.is_empty(), "{}: {} wrong\n{}", path.display(), wrong.len(), wrong.join("\n"));
        tested += 1;
    }
    assert!(tested >= 5, "{tested} vocabularies in {}", dir.display());
}
