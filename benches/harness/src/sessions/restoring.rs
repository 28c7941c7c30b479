//! A restore of pages that nobody computed: minutes of arithmetic less, and the same way from the disk to the device.

use std::path::Path;
use std::thread;
use std::time::Duration;

use mainstay_backend_api::kv::digest;
use mainstay_backend_api::{KvDType, PAGE_TOKENS};
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_engine::RestorePolicy;
use mainstay_engine::store::{Durability, Handed};
use mainstay_models::Weights;
use mainstay_models::config::Config;
use mainstay_models::families;
use serde_json::json;

use super::direct::direct_rate;
use super::resume::{headers, read_alone};
use super::stats::median;
use super::world::{Ask, Subject, World};
use crate::shape::{Random, checkpoint};

const TOKENS: usize = 8192;
const RUNS: usize = 9;
/// How long each engine has been up.
const UP: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// Pages of these tokens, of numbers that are none too large, the last page of zeros.
fn fill(subject: &Subject<'_>, dir: &Path, history: &[u32]) {
    let world = World::open(subject, dir, TOKENS + PAGE_TOKENS, RestorePolicy::Always).unwrap();
    let mut random = Random(7);
    for header in headers(subject, &world, history).unwrap() {
        let is_tail = header.tokens.len() < PAGE_TOKENS;
        let mut byte = || if is_tail { 0 } else { (random.next() >> 40) as u8 & 0x3f };
        let bytes: Box<[u8]> = (0..subject.page_bytes()).map(|_| byte()).collect();
        let digest = digest(&bytes);
        assert_eq!(world.store.write_patiently(header, bytes, digest, PATIENCE), Handed::Queued);
    }
    world.settle().unwrap();
    world.store.flush().unwrap();
    world.close().unwrap();
}

#[test]
#[ignore = "a measurement of a gigabyte, by hand: --ignored --nocapture restoring"]
#[expect(clippy::print_stdout, reason = "what is measured is for whoever asked")]
fn a_restore_beside_the_disk() {
    // Keys and values of Qwen3 0.6B: 112 KiB a token. The rest of the model is small.
    let config = json!({
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 28,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1000,
        "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "hidden_act": "silu", "tie_word_embeddings": true, "attention_bias": false
    });
    let origin = Path::new("restoring");
    let graph = families::graph(&Config::from_bytes(origin, config.to_string().as_bytes()).unwrap()).unwrap();
    let weights = Weights::from_tensors(origin, checkpoint(&graph, "bf16".parse().unwrap())).unwrap();
    let backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let subject = Subject::new(&backend, (&graph, &weights), (KvDType::BF16, 512), 2);
    let dir = std::env::temp_dir().join(format!("mainstay-restoring-{}", std::process::id()));
    let history = subject.tokens(TOKENS, 1);
    fill(&subject, &dir, &history);
    let prompt = [&history[..], &[1]].concat();
    let mut shares = Vec::new();
    for _ in 0..RUNS {
        let world = World::open(&subject, &dir, TOKENS + PAGE_TOKENS, RestorePolicy::Always).unwrap();
        thread::sleep(UP);
        let ask = Ask { prompt: &prompt, count: 1, durability: Durability::Ephemeral, salt: 0 };
        let answer = world.ask(&ask).unwrap();
        assert_eq!(answer.kv.restored_tokens, TOKENS - 1, "{:?}", answer.kv);
        let (copy_ms, _) = world.copies.take_ms();
        let read_ms = read_alone(&subject, &world, &history).unwrap();
        world.close().unwrap();
        let direct = direct_rate(&dir, subject.record_bytes()).unwrap();
        let bytes = subject.bytes_after(answer.kv.restored_tokens) as f64;
        let rate = bytes / answer.kv.restore_ms * 1e3;
        shares.push(rate / direct.best());
        println!(
            "restore {:.1} ms, {:.2} GB/s; copy {copy_ms:.1} ms; read alone {read_ms:.1} ms; O_DIRECT x1 {:.2}, x4 {:.2}, \
             by page {:.2} GB/s; share {:.0} %; foreign {:.0} %",
            answer.kv.restore_ms,
            rate / 1e9,
            direct.one / 1e9,
            direct.four / 1e9,
            direct.pages / 1e9,
            100.0 * rate / direct.best(),
            100.0 * answer.foreign.unwrap_or(f64::NAN),
        );
    }
    println!("median share {:.0} %", 100.0 * median(&shares));
    std::fs::remove_dir_all(&dir).unwrap();
}
