//! /v1/files over TCP: whole or not at all, and nobody else's.

use axum::body::Body;
use axum::http::Request;
use mainstay_server::{ApiKey, ServerOptions};
use serde_json::{Value, json};

use crate::testbed::{Directory, Reply, Server, Setup, start};

const BOUNDARY: &str = "----edge";

/// A part of a form: its name, a file's name, its contents.
type Part<'a> = (&'a str, Option<&'a str>, &'a str);

pub(crate) fn form(parts: &[Part<'_>]) -> String {
    let part = |(name, file, text): &Part<'_>| {
        let file = file.map_or(String::new(), |file| format!("; filename=\"{file}\""));
        format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{text}\r\n")
    };
    parts.iter().map(part).collect::<String>() + &format!("--{BOUNDARY}--\r\n")
}

pub(crate) async fn send(
    server: &Server,
    key: Option<&str>,
    (method, path): (&str, &str),
    body: Body,
) -> Reply {
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    let mut request =
        Request::builder().method(method).uri(path).header("host", "test").header("content-type", kind);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    server.send(request.body(body).unwrap()).await
}

/// Uploads a file of requests.
pub(crate) async fn upload(server: &Server, key: Option<&str>, text: &str) -> Value {
    let form = form(&[("purpose", None, "batch"), ("file", Some("in.jsonl"), text)]);
    send(server, key, ("POST", "/v1/files"), form.into()).await.ok()
}

async fn post(server: &Server, parts: &[Part<'_>]) -> Reply {
    send(server, None, ("POST", "/v1/files"), form(parts).into()).await
}

async fn delete(server: &Server, path: &str) -> Reply {
    send(server, None, ("DELETE", path), Body::empty()).await
}

fn setup(directory: &Directory) -> Setup {
    Setup { directory: Some(directory.path()), ..Setup::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_lives_until_it_is_deleted() {
    let directory = Directory::new();
    let server = start(setup(&directory)).await;
    // More than one piece of everything on the way.
    let text = "0123456789".repeat(300_000);
    let parts: [Part<'_>; 5] = [
        ("file", Some("a.jsonl"), &text),
        ("purpose", None, "user_data"),
        ("expires_after[anchor]", None, "created_at"),
        ("expires_after[seconds]", None, "3600"),
        ("other", None, "ignored"),
    ];
    let made = post(&server, &parts).await.ok();
    assert_eq!((made["object"].as_str(), made["bytes"].as_u64()), (Some("file"), Some(3_000_000)));
    assert_eq!((&made["filename"], &made["purpose"]), (&json!("a.jsonl"), &json!("user_data")));
    assert_eq!(made["expires_at"].as_u64(), made["created_at"].as_u64().map(|at| at + 3600));
    let second = upload(&server, None, "{}\n").await;
    server.stop().await;
    let server = start(setup(&directory)).await;
    let path = format!("/v1/files/{}", made["id"].as_str().unwrap());
    assert_eq!(server.get(&path).await.ok(), made);
    let content = server.get(&format!("{path}/content")).await;
    assert_eq!(content.status, 200);
    assert_eq!(content.headers["content-length"], "3000000");
    assert!(content.body == text.as_bytes());
    let list = server.get("/v1/files").await.ok();
    assert_eq!(list["data"], json!([second, made]));
    assert_eq!((&list["first_id"], &list["last_id"]), (&second["id"], &made["id"]));
    let list = server.get("/v1/files?purpose=batch&order=asc&limit=1").await.ok();
    assert_eq!((&list["data"], &list["has_more"]), (&json!([second]), &json!(false)));
    let list = server.get(&format!("/v1/files?after={}", second["id"].as_str().unwrap())).await.ok();
    assert_eq!(list["data"], json!([made]));
    let gone = delete(&server, &path).await.ok();
    assert_eq!(gone, json!({"id": made["id"], "object": "file", "deleted": true}));
    delete(&server, &path).await.error(404);
    for path in [path.clone(), format!("{path}/content"), "/v1/files/..%2F..".to_owned()] {
        assert_eq!(server.get(&path).await.error(404)["code"], "file_not_found");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_form_names_what_is_wrong_and_leaves_nothing() {
    let directory = Directory::new();
    let options = ServerOptions { file_limit_bytes: 1000, ..ServerOptions::default() };
    let server = start(Setup { options, ..setup(&directory) }).await;
    let (file, purpose): (Part<'_>, Part<'_>) = (("file", Some("x"), "{}"), ("purpose", None, "batch"));
    let (large, long) = ("x".repeat(1001), "x".repeat(5000));
    let cases: [(&[Part<'_>], u16, &str); 9] = [
        (&[purpose], 400, "file"),
        (&[file], 400, "purpose"),
        (&[file, ("purpose", None, "mischief")], 400, "purpose"),
        (&[("purpose", None, &long), file], 400, "purpose"),
        (&[file, file, purpose], 400, "file"),
        (&[("file", None, "{}"), purpose], 400, "file"),
        (&[file, purpose, ("expires_after[seconds]", None, "3600")], 400, "expires_after.anchor"),
        (
            &[
                file,
                purpose,
                ("expires_after[anchor]", None, "created_at"),
                ("expires_after[seconds]", None, "9"),
            ],
            400,
            "expires_after.seconds",
        ),
        (&[purpose, ("file", Some("x"), &large)], 413, "file"),
    ];
    for (parts, status, param) in cases {
        assert_eq!(post(&server, parts).await.error(status)["param"], param, "{parts:?}");
    }
    let cut = form(&[purpose, file]).replace("--\r\n", "");
    send(&server, None, ("POST", "/v1/files"), cut.into()).await.error(400);
    server.post("/v1/files", &json!({"purpose": "batch"})).await.error(400);
    for query in ["limit=0", "limit=x", "order=up", "after=file-1"] {
        server.get(&format!("/v1/files?{query}")).await.error(400);
    }
    assert_eq!(server.get("/v1/files").await.ok()["data"], json!([]));
    let left = walk(&directory.path().join("files"));
    assert_eq!(left, [""; 0]);
    post(&server, &[purpose, ("file", Some("x"), &large[1..])]).await.ok();
}

/// Files below a directory.
fn walk(path: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path.display().to_string()) }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_nobody_elses() {
    let directory = Directory::new();
    let api_keys = ["a:one", "b:two"].map(|key| key.parse::<ApiKey>().unwrap()).to_vec();
    let options = ServerOptions { api_keys, ..ServerOptions::default() };
    let server = start(Setup { options, ..setup(&directory) }).await;
    let made = upload(&server, Some("one"), "{}").await;
    let path = format!("/v1/files/{}", made["id"].as_str().unwrap());
    let unknown = format!("/v1/files/{}", "file-".to_owned() + &"0".repeat(28));
    let content = format!("{path}/content");
    for (method, path) in [("GET", &path), ("DELETE", &path), ("GET", &content)] {
        let foreign = send(&server, Some("two"), (method, path), Body::empty()).await.error(404);
        let missing = send(&server, Some("two"), (method, &unknown), Body::empty()).await.error(404);
        assert_eq!((&foreign["code"], &foreign["type"]), (&missing["code"], &missing["type"]));
    }
    let list = send(&server, Some("two"), ("GET", "/v1/files"), Body::empty()).await.ok();
    assert_eq!(list["data"], json!([]));
    assert_eq!(send(&server, Some("one"), ("GET", &content), Body::empty()).await.body, "{}");
    send(&server, None, ("GET", &path), Body::empty()).await.error(401);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_directory_there_are_none() {
    let server = start(Setup::default()).await;
    assert_eq!(server.get("/v1/files").await.error(404)["code"], "files_disabled");
    let reply = post(&server, &[("purpose", None, "batch"), ("file", Some("x"), "{}")]).await;
    assert_eq!(reply.error(404)["code"], "files_disabled");
}
