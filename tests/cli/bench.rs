//! `mainstay bench`: what each command writes, and that it ends by itself.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::program::{Scratch, Server, mainstay, run};

/// Name and kind of each field of a result of `bench serve`.
const SERVE_FIELDS: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/harness/src/serve/fields.txt"));

/// Runs a command that has to succeed, whose table fits 100 columns.
fn bench(words: &[&str]) -> String {
    let ended = run(&[&["bench"], words].concat());
    assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.stderr);
    let long: Vec<&str> = ended.stdout.lines().filter(|line| line.chars().count() > 100).collect();
    assert!(long.is_empty(), "{words:?}: {long:?}");
    ended.stdout
}

fn results(path: &str) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the result was written");
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn keys(value: &Value) -> HashSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn serve_measures_its_own_server_at_several_rates() {
    let scratch = Scratch::new();
    let file = |name: &str| scratch.0.join(name).display().to_string();
    let (json, svg, html) = (file("serve.json"), file("serve.svg"), file("page.html"));
    let words = [
        "serve",
        "--requests=6",
        "--input=64",
        "--output=8",
        "--rate=20,50",
        "--goodput=ttft:60000,e2el:60000",
    ];
    let shown = bench(&[&words[..], &["--price-per-hour=2", "--json", &json, "--plot", &svg]].concat());
    assert!(shown.contains("20/s Poisson") && shown.contains("50/s Poisson"), "{shown}");
    let found = results(&json);
    assert_eq!(found.len(), 2, "a line for each rate");
    let optional = ["joules_per_output_token", "max_concurrency", "foreign_cpu_share"];
    let names = SERVE_FIELDS.lines().filter(|line| !line.starts_with('#'));
    let names: Vec<&str> = names.filter_map(|line| line.split(' ').next()).collect();
    for result in &found {
        let keys = keys(result);
        let missing: Vec<_> = names.iter().filter(|n| !keys.contains(*n) && !optional.contains(n)).collect();
        assert!(missing.is_empty(), "{missing:?}");
        let unknown: Vec<_> = keys.iter().filter(|key| !names.contains(key)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(
            (&result["completed"], &result["failed"], &result["unsent"]),
            (&6.into(), &0.into(), &0.into())
        );
        assert_eq!(result["total_output_tokens"], 48, "answers are as long as was asked for");
        let lens = result["input_lens"].as_array().expect("a list");
        assert!(lens.iter().all(|len| (48..=80).contains(&len.as_u64().unwrap())), "{lens:?}");
        assert!(result["mean_ttft_ms"].as_f64() > Some(0.0) && result["p99_tpot_ms"].as_f64() > Some(0.0));
        assert_eq!(result["request_goodput"], result["request_throughput"]);
    }
    assert!(fs::read_to_string(&svg).expect("the plot").starts_with("<svg"));
    let told = bench(&["report", &json, "--html", &html]);
    assert!(told.contains("3 plots"), "{told}");
    assert_eq!(fs::read_to_string(&html).expect("the page").matches("<svg").count(), 3);
}

#[test]
fn serve_measures_another_server_with_every_workload() {
    let server = Server::start(&[]);
    let url = format!("http://{}", server.address);
    let scratch = Scratch::new();
    let json = scratch.0.join("serve.json").display().to_string();
    let sizes = [
        "--requests=4",
        "--clients=2",
        "--input=40",
        "--output=4",
        "--prefix=200",
        "--turns=2",
        "--groups=2",
    ];
    for workload in ["fixed", "random", "prefix", "chat", "documents", "agent"] {
        let words = ["serve", "--url", &url, "--workload", workload, "--pause-s=0.01", "--json", &json];
        bench(&[&words[..], &sizes].concat());
        let found = &results(&json)[0];
        assert_eq!(found["completed"], 4, "{workload}: {found}");
        assert_eq!((&found["workload"], &found["request_rate"]), (&workload.into(), &"inf".into()));
        let cached: u64 = found["cached_tokens"].as_array().unwrap().iter().filter_map(Value::as_u64).sum();
        // what is shared is longer than a page; turns of a chat are not
        let shares = ["prefix", "documents", "agent"].contains(&workload);
        assert!(cached > 100 || !shares, "{workload}: {cached} tokens were found");
        assert!(cached == 0 || shares || workload == "chat", "{workload}: {cached} tokens were found");
    }
    let trace = scratch.0.join("trace.jsonl");
    let lines = (0..4).map(|i| {
        format!(
            "{{\"timestamp\": {}, \"input_length\": 1024, \"output_length\": 8, \"hash_ids\": [0, {i}]}}\n",
            20 * i
        )
    });
    fs::write(&trace, lines.collect::<String>()).unwrap();
    let trace = trace.display().to_string();
    bench(&["serve", "--url", &url, "--trace", &trace, "--trace-scale=0.25", "--json", &json]);
    let found = &results(&json)[0];
    assert_eq!((&found["workload"], &found["completed"]), (&"trace".into(), &4.into()));
    assert_eq!(found["output_lens"][0], 2);
}

#[test]
fn sessions_are_kept_by_the_server_and_removed() {
    let scratch = Scratch::new();
    let data = scratch.0.join("data").display().to_string();
    let json = scratch.0.join("serve.json").display().to_string();
    let server = Server::start(&["--data-dir", &data]);
    let url = format!("http://{}", server.address);
    let load = ["--workload=chat", "--requests=6", "--turns=3", "--input=64", "--output=4", "--json", &json];
    bench(&[&["serve", "--url", &url, "--sessions"], &load[..]].concat());
    let found = &results(&json)[0];
    assert_eq!(found["completed"], 6, "{found}");
    // the server's count has the whole session, though only the new message was sent
    let (turns, lens) = (found["turns"].as_array().unwrap(), found["input_lens"].as_array().unwrap());
    let of = |turn: u64| {
        turns
            .iter()
            .zip(lens)
            .filter(move |(t, _)| t.as_u64() == Some(turn))
            .map(|(_, len)| len.as_u64().unwrap())
    };
    assert!(of(2).min() > of(0).max().map(|len| 2 * len), "{turns:?} {lens:?}");
    let left = run(&["sessions", "ls", "--url", &url]);
    assert!(!left.stdout.contains("sess_"), "{}", left.stdout);
    bench(&[&["serve", "--sessions"], &load[..]].concat());
    assert_eq!(results(&json)[0]["completed"], 6);
}

#[test]
fn a_load_ends_at_its_limit() {
    let scratch = Scratch::new();
    let json = scratch.0.join("serve.json").display().to_string();
    let begun = std::time::Instant::now();
    bench(&[
        "serve",
        "--requests=100",
        "--rate=2",
        "--input=16",
        "--output=2",
        "--limit-s=1.5",
        "--json",
        &json,
    ]);
    assert!(begun.elapsed().as_secs() < 30);
    let found = &results(&json)[0];
    assert!(found["unsent"].as_u64() > Some(50) && found["completed"].as_u64() > Some(0), "{found}");
}

#[test]
fn cells_take_turns_with_another_program() {
    let words =
        ["bench", "latency", "--cases=decode@0x1,prefill@32,decode@8x2", "--prompt=16", "--gen=4", "--turns"];
    let mut child = mainstay(&words).stdin(Stdio::piped()).spawn().expect("the command starts");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(b"decode@8x2\nprefill@32\ndecode@8x2\n").expect("the child reads");
    drop(stdin);
    let ended = child.wait_with_output().expect("the child ends");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let lines: Vec<Value> =
        String::from_utf8(ended.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines[0]["kv_type"], "bf16");
    let cells: Vec<String> =
        lines[1..].iter().map(|row| format!("{} {} {}", row["phase"], row["depth"], row["batch"])).collect();
    assert_eq!(cells, ["\"decode\" 8 2", "\"prefill\" 32 1", "\"decode\" 8 2"]);
    assert!(lines[1..].iter().all(|row| row["tokens_per_s"][0].as_f64() > Some(0.0)));
}

#[test]
fn latency_writes_every_run() {
    let scratch = Scratch::new();
    let json = scratch.0.join("latency.json").display().to_string();
    let words = [
        "latency",
        "--prompt=32",
        "--depth=0,64",
        "--batch=1,2",
        "--gen=4",
        "--repeat=2",
        "--price-per-hour=1",
    ];
    bench(&[&words[..], &["--json", &json]].concat());
    let found: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let expected = [
        "kind",
        "read_bytes_per_s",
        "fma_flops_per_s",
        "measurements",
        "model",
        "device",
        "kv_type",
        "version",
    ];
    assert_eq!(keys(&found), HashSet::from(expected));
    let rows = found["measurements"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for row in rows {
        assert_eq!(row["tokens_per_s"].as_array().map(Vec::len), Some(2));
        for key in ["tokens_per_s_median", "bytes_per_token", "flops_per_token", "cost_per_million_tokens"] {
            assert!(row[key].as_f64() > Some(0.0), "{key}: {row}");
        }
        assert!(
            row["bandwidth_share"].is_f64()
                && row["fma_share"].is_f64()
                && row["foreign_cpu_share"].is_array()
        );
    }
    let html = scratch.0.join("page.html").display().to_string();
    assert!(bench(&["report", &json, "--html", &html]).contains("2 plots"));
}

#[test]
fn sessions_are_measured_on_the_built_in_model() {
    let scratch = Scratch::new();
    let file = |name: &str| scratch.0.join(name).display().to_string();
    let (json, html, dir) = (file("sessions.json"), file("page.html"), file("stores"));
    fs::create_dir(&dir).expect("a directory");
    let sizes = [
        "--contexts=128",
        "--answer=4",
        "--new=8",
        "--repeat=1",
        "--decode=16",
        "--pairs=1",
        "--sessions=20",
    ];
    let shown = bench(&[&["sessions", "--dir", &dir, "--json", &json], &sizes[..]].concat());
    assert!(shown.contains("after kill -9"), "{shown}");
    let found: Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    let expected = [
        "kind",
        "read_bytes_per_s",
        "fma_flops_per_s",
        "plan",
        "first_turns",
        "resumes",
        "restores",
        "moves",
        "forks",
        "write_behind",
        "recovery",
        "verdicts",
        "model",
        "device",
        "kv_type",
        "version",
    ];
    assert_eq!(keys(&found), HashSet::from(expected));
    let resumes = found["resumes"].as_array().unwrap();
    let cases: HashSet<&str> = resumes.iter().filter_map(|run| run["case"].as_str()).collect();
    assert_eq!(cases, HashSet::from(["cold", "memory", "disk", "after kill -9", "after move"]));
    for run in resumes {
        assert_eq!((&run["context"], &run["same_tokens"]), (&128.into(), &true.into()), "{run}");
        assert!(run["ttft_ms"].as_f64() > Some(0.0) && run["penalty"].as_f64() > Some(0.0), "{run}");
    }
    assert!(bench(&["report", &json, "--html", &html]).contains("1 plot\n"));
    assert_eq!(fs::read_dir(&dir).expect("the directory stays").count(), 0, "what was made in it is removed");
}

#[test]
fn what_cannot_be_meant_is_told() {
    for (words, expected) in [
        (vec!["serve", "--clients=0"], "expected at least 1 each"),
        (vec!["serve", "--rate=0"], "a number above 0"),
        (vec!["serve", "--goodput=fast:1"], "expected ttft:MS"),
        (vec!["serve", "--trace=/no/such/file"], "--trace /no/such/file"),
        (vec!["latency", "--cases=load@0"], "expected prefill@DEPTH"),
        (vec!["report", "/no/such/file"], "/no/such/file"),
        (vec!["shape", "gpt-oss-20b", "/tmp/mainstay-no-such-shape"], "llama and qwen3"),
        (vec!["shape", "gpt-5", "/tmp/mainstay-no-such-shape"], "expected one of qwen3-0.6b"),
    ] {
        let ended = run(&[&["bench"], &words[..]].concat());
        assert_eq!(ended.code, Some(2), "{words:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{words:?}: {}", ended.stderr);
    }
}
