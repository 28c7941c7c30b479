//! Adapters as PEFT writes them: what is read, and what is refused.

use std::path::{Path, PathBuf};

use mainstay_models::config::Config;
use mainstay_models::graph::Graph;
use mainstay_models::{AdapterWeights, families};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

fn graph() -> Graph {
    families::graph(&Config::open(&fixtures().join("llama")).unwrap()).unwrap()
}

fn open(name: &str) -> AdapterWeights {
    AdapterWeights::open(&fixtures().join("lora").join(name), &graph()).unwrap()
}

/// A copy of a fixture with other keys in its configuration.
struct Changed(PathBuf);

impl Changed {
    fn new(name: &str, changes: &Value) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let at = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("mainstay-adapter-{}-{at}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let from = fixtures().join("lora").join(name);
        std::fs::copy(from.join("adapter_model.safetensors"), dir.join("adapter_model.safetensors")).unwrap();
        let config = std::fs::read(from.join("adapter_config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        Self(dir)
    }

    fn open(&self) -> Result<AdapterWeights, String> {
        AdapterWeights::open(&self.0, &graph()).map_err(|e| e.to_string())
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn ranks_and_scales_are_what_the_configuration_says() {
    let attention = open("attention");
    let names: Vec<&str> = attention.parts.keys().map(String::as_str).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    let q = &attention.parts["model.layers.0.self_attn.q_proj.weight"];
    assert_eq!((q.rank, q.scale, q.a.len(), q.b.len()), (4, 2.0, 4 * 64, 64 * 4));
    let all = open("all");
    assert_eq!(all.parts.len(), 14);
    let part = |name: &str| {
        let part = &all.parts[&format!("model.layers.1.{name}.weight")];
        (part.rank, part.scale)
    };
    assert_eq!(part("self_attn.q_proj"), (8, (4.0 / 8f64.sqrt()) as f32));
    assert_eq!(part("mlp.down_proj"), (3, (4.0 / 3f64.sqrt()) as f32));
    assert_eq!(part("self_attn.k_proj"), (17, (4.0 / 17f64.sqrt()) as f32));
    assert_eq!(part("self_attn.o_proj"), (8, (20.0 / 8f64.sqrt()) as f32));
    assert_eq!(all.parts["model.layers.0.self_attn.k_proj.weight"].rank, 8, "the pattern names layer 1");
}

#[test]
fn the_hash_is_of_what_counts() {
    let hash = open("attention").hash;
    assert_eq!(open("attention").hash, hash);
    assert_ne!(open("mlp").hash, hash);
    assert_eq!(Changed::new("attention", &json!({"lora_dropout": 0.5})).open().unwrap().hash, hash);
    assert_ne!(Changed::new("attention", &json!({"lora_alpha": 9})).open().unwrap().hash, hash);
}

#[test]
fn what_is_not_supported_or_does_not_fit_is_refused() {
    for (changes, parts) in [
        (json!({"use_dora": true}), ["use_dora", "true"]),
        (json!({"bias": "all"}), ["bias", "none"]),
        (json!({"modules_to_save": ["lm_head"]}), ["modules_to_save", "lm_head"]),
        (json!({"peft_type": "IA3"}), ["peft_type", "IA3"]),
        (json!({"r": 5}), ["q_proj.lora_A", "[5, 64]"]),
        (json!({"r": 0}), ["r: expected", "1 to 512"]),
        (json!({"lora_alpha": "x"}), ["lora_alpha", "number"]),
        (json!({"rank_pattern": {"q_.*": 4}}), ["q_.*", "not expressions"]),
    ] {
        let error = Changed::new("attention", &changes).open().unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{changes}: {error}");
    }
    let other = families::graph(&Config::open(&fixtures().join("qwen3")).unwrap()).unwrap();
    let error = AdapterWeights::open(&fixtures().join("lora/attention"), &other).unwrap_err().to_string();
    assert!(error.contains("expected shape"), "{error}");
    let bert = families::graph(&Config::open(&fixtures().join("bert")).unwrap()).unwrap();
    let error = AdapterWeights::open(&fixtures().join("lora/attention"), &bert).unwrap_err().to_string();
    assert!(error.contains("self_attn.q_proj") && error.contains("bert"), "{error}");
    let missing = AdapterWeights::open(&fixtures().join("llama"), &graph()).unwrap_err().to_string();
    assert!(missing.contains("adapter_config.json"), "{missing}");
}
