//! The whole measurement on a tiny model, with a child that is this test program itself.

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use mainstay_backend_api::{KvDType, PAGE_TOKENS};
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_models::Weights;
use mainstay_models::config::Config;
use mainstay_models::families;
use mainstay_models::graph::Graph;
use serde_json::json;

use super::*;
use crate::latency::Peaks;
use crate::shape::checkpoint;

fn tiny() -> (Graph, Weights) {
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": false
    });
    let config = Config::from_bytes(Path::new("tiny"), config.to_string().as_bytes()).unwrap();
    let graph = families::graph(&config).unwrap();
    let weights =
        Weights::from_tensors(Path::new("tiny"), checkpoint(&graph, "bf16".parse().unwrap())).unwrap();
    (graph, weights)
}

fn plan() -> Plan {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("mainstay-bench-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    Plan {
        contexts: vec![70, 200],
        answer: 4,
        new: 5,
        repeats: 2,
        cold_repeats: 1,
        decode: 40,
        pairs: 2,
        sessions: 20,
        dir: std::env::temp_dir().join(name),
    }
}

fn with_subject<T>(run: impl FnOnce(&Subject<'_>) -> T) -> T {
    let (graph, weights) = tiny();
    let backend = CpuBackend::new(CpuOptions { threads: Some(1), isa: None }).unwrap();
    run(&Subject::new(&backend, (&graph, &weights), (KvDType::BF16, 64), 1))
}

/// Does nothing, but for the process that [`command`] starts.
#[test]
fn as_child() {
    if let Ok(task) = std::env::var(CHILD_ENV) {
        with_subject(|subject| child(subject, &plan(), &task.parse().unwrap(), &mut io::stdout())).unwrap();
    }
}

fn command() -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "sessions::tests::as_child", "--nocapture"]);
    Ok(command)
}

#[test]
fn every_way_back_has_the_cold_tokens_and_all_is_reported() {
    let plan = plan();
    let figures = with_subject(|subject| sessions(subject, &plan, &command, |_| {})).unwrap();
    assert!(!plan.dir.exists(), "the scratch directory is gone");
    for run in &figures.resumes {
        assert!(verdict::is_same(&figures, run), "{run:?}");
        let all = run.context - 1;
        let (cached, restored) = match run.case {
            Case::Cold => (0, 0),
            // The pool keeps whole pages only; the tail is in the store.
            Case::Memory => (all, all % PAGE_TOKENS),
            Case::Disk | Case::Killed | Case::Moved => (all, all),
        };
        assert_eq!((run.cached_tokens, run.restored_tokens), (cached, restored), "{run:?}");
    }
    assert_eq!(figures.resumes.len(), 2 * (2 * 4 + 1));
    assert!(
        figures.forks.iter().all(|forks| forks.fork_bytes == 0 && forks.stored_bytes > forks.prefix_bytes)
    );
    assert_eq!(figures.recovery.sessions, (20, 20));
    assert_eq!(figures.recovery.pages, (20, 20));
    let stored = &figures.write_behind.stored;
    assert!(stored.iter().all(|run| run.written_bytes > 0 && run.gaps_ms.len() == 39), "{stored:?}");
    assert!(figures.write_behind.dropped.iter().all(|run| run.written_bytes == 0));

    let report = json(&figures, &Peaks::default());
    for field in ["plan", "first_turns", "resumes", "restores", "moves", "forks", "write_behind", "recovery"]
    {
        assert!(!report[field].is_null(), "{field}");
    }
    assert_eq!(report["resumes"][0]["same_tokens"], json!(true));
    assert!(report["restores"][0]["direct_share"].as_f64().unwrap() > 0.0);
    assert_eq!(report["verdicts"][0]["verdict"], json!("met"));
    assert_eq!(report["verdicts"][1]["verdict"], json!("not measured"), "no session of 8192 tokens");
    let table = table(&figures);
    assert!(
        table.contains("after kill -9") && table.contains("not measured") && !table.contains(" NO "),
        "{table}"
    );
}

#[test]
fn impossible_plans_are_refused_with_numbers() {
    with_subject(|subject| {
        let refused = |plan: Plan| sessions(subject, &plan, &command, |_| {}).unwrap_err().to_string();
        let long = refused(Plan { contexts: vec![504], ..plan() });
        assert!(long.contains("504") && long.contains("512"), "{long}");
        assert!(refused(Plan { pairs: 0, ..plan() }).contains("at least one"));
    });
}
