//! Embeddings and rerank, on a fake whose rows are hashes of their tokens.

use mainstay_backend_api::echo::{POOLED_WIDTH, expected_row};
use mainstay_models::graph::PooledKind;
use mainstay_models::tokenizer::AddSpecial;
use mainstay_server::PooledShape;
use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, CONTEXT, MODEL, Server, Setup, chat, completion, request, start};

const EMBEDDINGS: &str = "/v1/embeddings";
const RERANK: &str = "/v1/rerank";

fn embeddings(patch: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": "The quick brown fox"});
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

fn rerank(patch: Value) -> Value {
    let documents = ["a bird", "a plane", "a fox that is quick and brown", "nothing"];
    let mut body = json!({"model": MODEL, "query": "What is quick?", "documents": documents});
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

/// An encoder for embeddings.
fn encoder() -> Setup {
    Setup { pages: 0, template: None, ..Setup::default() }
}

/// An encoder for scores.
fn cross_encoder() -> Setup {
    Setup { pooled: Some(PooledShape { kind: PooledKind::Score, width: 1 }), ..encoder() }
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn ids(server: &Server, text: &str) -> Vec<u32> {
    server.tokenizer.encode(text, AddSpecial::Yes).unwrap()
}

#[tokio::test]
async fn inputs_of_every_kind_become_their_vectors_in_order() {
    for setup in [Setup::default(), encoder()] {
        let server = start(setup).await;
        let texts = ["one", "two two", "three three three"];
        let tokens: Vec<Vec<u32>> = texts.iter().map(|text| ids(&server, text)).collect();
        let count: usize = tokens.iter().map(Vec::len).sum();
        for input in [json!(texts), json!(tokens)] {
            let answer = server.post(EMBEDDINGS, &embeddings(json!({"input": input}))).await.ok();
            assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(MODEL)));
            assert_eq!(answer["usage"], json!({"prompt_tokens": count, "total_tokens": count}));
            let data = answer["data"].as_array().unwrap();
            assert_eq!(data.len(), 3);
            for (i, entry) in data.iter().enumerate() {
                assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(i)));
                assert_eq!(floats(&entry["embedding"]), expected_row(&tokens[i], None));
            }
        }
        for input in [json!(texts[1]), json!(tokens[1])] {
            let answer = server.post(EMBEDDINGS, &embeddings(json!({"input": input}))).await.ok();
            assert_eq!(floats(&answer["data"][0]["embedding"]), expected_row(&tokens[1], None));
        }
    }
}

#[tokio::test]
async fn base64_holds_the_same_numbers() {
    let server = start(encoder()).await;
    let answer = server.post(EMBEDDINGS, &embeddings(json!({"encoding_format": "base64"}))).await.ok();
    let text = answer["data"][0]["embedding"].as_str().unwrap();
    let row = expected_row(&ids(&server, "The quick brown fox"), None);
    let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(decoded(text), bytes);
}

/// The bytes of a text in base64.
fn decoded(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{other}"),
    };
    let bits: Vec<u8> = text.trim_end_matches('=').bytes().map(digit).collect();
    let bits: Vec<u8> = bits.iter().flat_map(|d| (0..6).rev().map(move |i| d >> i & 1)).collect();
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |all, bit| all << 1 | bit)).collect()
}

#[tokio::test]
async fn fewer_dimensions_are_the_first_ones_with_length_1() {
    let server = start(Setup::default()).await;
    let whole = expected_row(&ids(&server, "The quick brown fox"), None);
    for dimensions in [1, 3, POOLED_WIDTH] {
        let answer = server.post(EMBEDDINGS, &embeddings(json!({"dimensions": dimensions}))).await.ok();
        let found = floats(&answer["data"][0]["embedding"]);
        assert_eq!(found.len(), dimensions);
        let length = whole[..dimensions].iter().map(|x| x * x).sum::<f32>().sqrt();
        for (found, whole) in found.iter().zip(&whole) {
            assert!((found - whole / length).abs() < 1e-6, "{found}, {whole} / {length}");
        }
    }
}

#[tokio::test]
async fn more_texts_than_the_queue_holds_are_all_answered() {
    let server = start(Setup { waiting: 4, chunks: 4, ..encoder() }).await;
    let texts: Vec<String> = (0..100).map(|n| format!("text number {n}")).collect();
    let answer = server.post(EMBEDDINGS, &embeddings(json!({"input": texts}))).await.ok();
    for (i, text) in texts.iter().enumerate() {
        let row = expected_row(&ids(&server, text), None);
        assert_eq!(floats(&answer["data"][i]["embedding"]), row, "{text}");
    }
}

#[tokio::test]
async fn long_texts_are_refused_or_cut_where_that_is_asked_for() {
    let server = start(Setup::default()).await;
    let long = vec![7u32; CONTEXT + 1];
    let error = server.post(EMBEDDINGS, &embeddings(json!({"input": ["short", "short"]}))).await;
    error.ok();
    let body = embeddings(json!({"input": [[1, 2], long]}));
    let error = server.post(EMBEDDINGS, &body).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("context is 2048 tokens, but the text at 1 has 2049"), "{message}");
    for (most, kept) in [(-1, CONTEXT), (5, 5)] {
        let patch = json!({"input": [[1, 2], long], "truncate_prompt_tokens": most});
        let answer = server.post(EMBEDDINGS, &embeddings(patch)).await.ok();
        assert_eq!(floats(&answer["data"][1]["embedding"]), expected_row(&long[..kept], None));
        assert_eq!(answer["usage"]["prompt_tokens"], kept + 2);
    }
    let text = ids(&server, "The quick brown fox");
    let answer = server.post(EMBEDDINGS, &embeddings(json!({"truncate_prompt_tokens": 2}))).await.ok();
    assert_eq!(floats(&answer["data"][0]["embedding"]), expected_row(&text[..2], None));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = start(Setup::default()).await;
    let wrong = [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": ["a", 7]}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": [1, 1_000_000]}), "input"),
        (json!({"input": vec!["a"; 2049]}), "input"),
        (json!({"encoding_format": "hex"}), "encoding_format"),
        (json!({"encoding_format": 1}), "encoding_format"),
        (json!({"dimensions": 0}), "dimensions"),
        (json!({"dimensions": POOLED_WIDTH + 1}), "dimensions"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"truncate_prompt_tokens": CONTEXT + 1}), "truncate_prompt_tokens"),
        (json!({"user": 5}), "user"),
        (json!({"model": null}), "model"),
    ];
    for (patch, param) in wrong {
        let error = server.post(EMBEDDINGS, &embeddings(patch.clone())).await.error(400);
        assert_eq!(error["param"], param, "{patch}: {error}");
    }
    server.post(EMBEDDINGS, &embeddings(json!({"model": "other"}))).await.error(404);
    let server = start(cross_encoder()).await;
    let wrong = [
        (json!({"query": null}), "query"),
        (json!({"query": ["a"]}), "query"),
        (json!({"documents": null}), "documents"),
        (json!({"documents": []}), "documents"),
        (json!({"documents": "a"}), "documents"),
        (json!({"documents": ["a", 7]}), "documents[1]"),
        (json!({"documents": [{"title": "a"}]}), "documents[0].text"),
        (json!({"documents": vec!["a"; 2049]}), "documents"),
        (json!({"top_n": 0}), "top_n"),
        (json!({"return_documents": "yes"}), "return_documents"),
    ];
    for (patch, param) in wrong {
        let error = server.post(RERANK, &rerank(patch.clone())).await.error(400);
        assert_eq!(error["param"], param, "{patch}: {error}");
    }
}

#[tokio::test]
async fn documents_are_ordered_by_their_score_with_the_query() {
    let server = start(cross_encoder()).await;
    let body = rerank(json!({}));
    let documents: Vec<&str> =
        body["documents"].as_array().unwrap().iter().map(|d| d.as_str().unwrap()).collect();
    let scored: Vec<(f32, usize)> = documents
        .iter()
        .map(|document| {
            let pair = server.tokenizer.encode_within("What is quick?", Some(document), None).unwrap();
            (expected_row(&pair.tokens, pair.second)[0], pair.tokens.len())
        })
        .collect();
    let mut order: Vec<usize> = (0..4).collect();
    order.sort_by(|a, b| scored[*b].0.total_cmp(&scored[*a].0));
    let count: usize = scored.iter().map(|s| s.1).sum();
    for path in [RERANK, "/rerank"] {
        let answer = server.post(path, &body).await.ok();
        assert!(answer["id"].as_str().unwrap().starts_with("rerank-"));
        assert_eq!(answer["model"], MODEL);
        assert_eq!(answer["usage"], json!({"prompt_tokens": count, "total_tokens": count}));
        let results = answer["results"].as_array().unwrap();
        assert_eq!(results.len(), 4);
        for (result, index) in results.iter().zip(&order) {
            assert_eq!(result["index"], *index);
            assert_eq!(result["relevance_score"].as_f64().unwrap() as f32, scored[*index].0);
            assert_eq!(result["document"], json!({"text": documents[*index]}));
        }
    }
    let objects: Vec<Value> = documents.iter().map(|text| json!({"text": text, "title": 7})).collect();
    let patch = json!({"documents": objects, "top_n": 2, "return_documents": false});
    let answer = server.post(RERANK, &rerank(patch)).await.ok();
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.iter().map(|r| r["index"].as_u64().unwrap() as usize).collect::<Vec<_>>(), order[..2]);
    assert!(results.iter().all(|result| result.get("document").is_none()));
}

#[tokio::test]
async fn a_model_says_what_it_is_for_and_refuses_the_rest() {
    let tasks = async |server: &Server| server.get("/v1/models").await.ok()["data"][0]["tasks"].clone();
    let refused = async |server: &Server, path: &str, body: &Value| {
        let error = server.post(path, body).await.error(400);
        assert_eq!(error["param"], "model", "{error}");
        error["message"].as_str().unwrap().to_owned()
    };
    let server = start(Setup::default()).await;
    assert_eq!(tasks(&server).await, json!(["generate", "embed"]));
    let message = refused(&server, RERANK, &rerank(json!({}))).await;
    assert!(message.contains("it serves /v1/chat/completions and /v1/embeddings"), "{message}");

    let server = start(Setup { pooled: None, ..Setup::default() }).await;
    assert_eq!(tasks(&server).await, json!(["generate"]));
    refused(&server, EMBEDDINGS, &embeddings(json!({}))).await;

    let server = start(encoder()).await;
    assert_eq!(tasks(&server).await, json!(["embed"]));
    for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, completion(json!({})))] {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = json!(stream);
            let message = refused(&server, path, &body).await;
            assert!(message.contains("generates no text; it serves /v1/embeddings"), "{message}");
        }
    }
    refused(&server, RERANK, &rerank(json!({}))).await;

    let server = start(cross_encoder()).await;
    assert_eq!(tasks(&server).await, json!(["rerank"]));
    refused(&server, EMBEDDINGS, &embeddings(json!({}))).await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_texts_along() {
    let (gate, steps) = std::sync::mpsc::channel();
    let server = start(Setup { gate: Some(steps), ..encoder() }).await;
    let texts: Vec<Vec<u32>> = (1..20).map(|n| vec![n; 200]).collect();
    let body = embeddings(json!({"input": texts}));
    let asking = server.send(request(EMBEDDINGS, &body));
    let left = tokio::time::timeout(std::time::Duration::from_millis(100), asking).await;
    assert!(left.is_err(), "no step has run");
    // A step has room for one text. The server hears of the client's leave while some are computed, not all.
    for _ in 0..10 {
        gate.send(()).unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    drop(gate);
    server.idle().await;
    assert!(server.engine.stats().steps < 10, "{:?}", server.engine.stats());
}

#[tokio::test]
async fn a_failed_device_is_told() {
    let server = start(Setup { fail_every: Some(1), ..encoder() }).await;
    let error = server.post(EMBEDDINGS, &embeddings(json!({}))).await.error(500);
    assert_eq!(error["type"], "server_error");
}
