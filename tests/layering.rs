//! The import table of the design: which crate may know which. A forbidden arrow fails here by name.

use std::process::Command;

use serde_json::{Value, json};

/// Every crate of the workspace with the crates of ours that it may import.
const OWN: [(&str, &[&str]); 10] = [
    ("mainstay-models", &[]),
    ("mainstay-kernels-cpu", &[]),
    ("mainstay-backend-api", &["mainstay-models"]),
    ("mainstay-backend-candle", &["mainstay-backend-api", "mainstay-models"]),
    ("mainstay-backend-cpu", &["mainstay-backend-api", "mainstay-models", "mainstay-kernels-cpu"]),
    ("mainstay-store", &["mainstay-backend-api"]),
    ("mainstay-engine", &["mainstay-backend-api", "mainstay-models", "mainstay-store"]),
    ("mainstay-server", &["mainstay-engine", "mainstay-models"]),
    ("mainstay-bench", &["mainstay-backend-api", "mainstay-engine", "mainstay-models"]),
    (
        "mainstay",
        &[
            "mainstay-models",
            "mainstay-kernels-cpu",
            "mainstay-backend-api",
            "mainstay-backend-candle",
            "mainstay-backend-cpu",
            "mainstay-store",
            "mainstay-engine",
            "mainstay-server",
            "mainstay-bench",
        ],
    ),
];

/// Crates of others (a trailing `*` stands for any ending) that only these of ours may import.
const FOREIGN: [(&str, &[&str]); 10] = [
    ("candle-*", &["mainstay-backend-candle"]),
    ("cudarc", &[]),
    ("axum", &["mainstay-server", "mainstay-bench", "mainstay"]),
    ("reqwest", &["mainstay-server", "mainstay-bench", "mainstay"]),
    ("tokio", &["mainstay-store", "mainstay-engine", "mainstay-server", "mainstay-bench", "mainstay"]),
    ("tokenizers", &["mainstay-models"]),
    ("hf-hub", &["mainstay"]),
    ("llguidance", &["mainstay-server"]),
    ("rmcp", &["mainstay-server"]),
    ("anyhow", &["mainstay"]),
];

/// The engine may wait on channels, and knows nothing else of an async runtime.
const ENGINE_TOKIO_FEATURES: [&str; 1] = ["sync"];

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--format-version", "1", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// What a crate imports when it is built; tests may import more.
fn imports(package: &Value) -> impl Iterator<Item = &Value> {
    list(&package["dependencies"]).iter().filter(|d| d["kind"] != "dev")
}

fn matches(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

fn violations(metadata: &Value) -> Vec<String> {
    let packages = list(&metadata["packages"]);
    let mut found = Vec::new();
    for (name, _) in OWN {
        if !packages.iter().any(|p| text(p, "name") == name) {
            found.push(format!("{name} stands in the table and is no crate of the workspace"));
        }
    }
    for package in packages {
        let name = text(package, "name");
        match OWN.iter().find(|row| row.0 == name) {
            Some((_, allowed)) => {
                for import in imports(package) {
                    found.extend(forbidden_arrow(name, allowed, import));
                }
            }
            None => {
                found.push(format!("{name} is a crate of the workspace and stands in no row of the table"))
            }
        }
    }
    found
}

fn forbidden_arrow(name: &str, allowed: &[&str], import: &Value) -> Option<String> {
    let target = text(import, "name");
    let own = OWN.iter().any(|row| row.0 == target);
    if own && !allowed.contains(&target) {
        return Some(format!("{name} -> {target}: not allowed (may import {allowed:?})"));
    }
    let rule = FOREIGN.iter().find(|(pattern, _)| matches(pattern, target));
    if let Some((_, users)) = rule.filter(|(_, users)| !users.contains(&name)) {
        return Some(format!("{name} -> {target}: only {users:?} may import it"));
    }
    if name == "mainstay-engine" && target == "tokio" {
        let more = list(&import["features"]).iter().filter_map(Value::as_str);
        let more: Vec<&str> = more.filter(|f| !ENGINE_TOKIO_FEATURES.contains(f)).collect();
        if !more.is_empty() {
            return Some(format!("{name} -> tokio with {more:?}: only {ENGINE_TOKIO_FEATURES:?} is allowed"));
        }
    }
    None
}

#[test]
fn no_forbidden_arrow() {
    let found = violations(&metadata());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The workspace with one more dependency.
fn with_arrow(from: &str, dependency: Value) -> Value {
    let mut metadata = metadata();
    let packages = metadata["packages"].as_array_mut().expect("metadata lists packages");
    let package = packages.iter_mut().find(|p| p["name"] == from).expect("the crate exists");
    package["dependencies"].as_array_mut().expect("a package lists dependencies").push(dependency);
    metadata
}

#[test]
fn fabricated_arrows_are_found() {
    let cases = [
        ("mainstay-models", "mainstay-engine"),
        ("mainstay-kernels-cpu", "mainstay-models"),
        ("mainstay-engine", "mainstay-backend-cpu"),
        ("mainstay-store", "mainstay-models"),
        ("mainstay-server", "mainstay-store"),
        ("mainstay-server", "mainstay-backend-api"),
        ("mainstay-backend-cpu", "candle-core"),
        ("mainstay-engine", "axum"),
        ("mainstay-server", "tokenizers"),
        ("mainstay-bench", "hf-hub"),
        ("mainstay-engine", "llguidance"),
        ("mainstay-backend-cpu", "tokio"),
        ("mainstay-server", "anyhow"),
    ];
    for (from, to) in cases {
        let found = violations(&with_arrow(from, json!({"name": to, "kind": null, "features": []})));
        assert_eq!(found.len(), 1, "{from} -> {to}: {found:?}");
        assert!(found[0].starts_with(&format!("{from} -> {to}: ")), "{}", found[0]);
    }
}

#[test]
fn kinds_and_features_count() {
    let dev = json!({"name": "mainstay-backend-cpu", "kind": "dev", "features": []});
    assert_eq!(violations(&with_arrow("mainstay-engine", dev)), Vec::<String>::new());
    let build = json!({"name": "mainstay-backend-cpu", "kind": "build", "features": []});
    assert_eq!(violations(&with_arrow("mainstay-engine", build)).len(), 1);
    let runtime = json!({"name": "tokio", "kind": null, "features": ["sync", "rt"]});
    let found = violations(&with_arrow("mainstay-engine", runtime));
    assert!(found.len() == 1 && found[0].contains("\"rt\""), "{found:?}");
}

#[test]
fn a_crate_without_a_row_is_found() {
    let mut metadata = metadata();
    metadata["packages"][0]["name"] = json!("mainstay-new");
    let found = violations(&metadata);
    assert!(found.iter().any(|f| f.contains("mainstay-new") && f.contains("no row")), "{found:?}");
}
