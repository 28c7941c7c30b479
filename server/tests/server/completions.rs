//! Whole completions, tokenization and the model list.

use mainstay_backend_api::echo::expected_logprob;
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial};
use serde_json::{Value, json};

use crate::testbed::{COMPLETIONS, CONTEXT, MODEL, Server, Setup, completion, start};

async fn ask(server: &Server, patch: Value) -> Value {
    server.post(COMPLETIONS, &completion(patch)).await.ok()
}

#[tokio::test]
async fn prompts_of_every_kind_are_answered_in_order() {
    let server = start(Setup::default()).await;
    let ids = |text: &str| server.tokenizer.encode(text, AddSpecial::Yes).unwrap();
    let greedy =
        |prompt: Value| json!({"prompt": prompt, "temperature": 0, "max_tokens": 5, "ignore_eos": true});
    let texts = ask(&server, greedy(json!(["one", "two two", "three"]))).await;
    let tokens = ask(&server, greedy(json!([ids("one"), ids("two two"), ids("three")]))).await;
    assert_eq!(texts["choices"], tokens["choices"]);
    let second = ask(&server, greedy(json!("two two"))).await;
    assert_eq!(second["choices"][0]["text"], texts["choices"][1]["text"]);
    assert_eq!(ask(&server, greedy(json!(ids("two two")))).await["choices"], second["choices"]);
    let indices: Vec<u64> =
        texts["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(texts["usage"]["completion_tokens"], 15);
    assert_eq!(texts["object"], "text_completion");
    // Unlike chat, this endpoint has a default of its own.
    let patch = json!({"logit_bias": {"36": 100}});
    assert_eq!(ask(&server, patch).await["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn more_prompts_than_the_queue_holds_are_all_answered() {
    let server = start(Setup { waiting: 4, chunks: 4, ..Setup::default() }).await;
    let prompts: Vec<String> = (0..30).map(|n| format!("prompt number {n}")).collect();
    let patch = |prompt: Value| json!({"prompt": prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": true, "n": 2});
    let answer = ask(&server, patch(json!(prompts))).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 60);
    let lone = ask(&server, patch(json!(prompts[17]))).await;
    assert_eq!(answer["choices"][34]["text"], lone["choices"][0]["text"]);
    assert_eq!(answer["choices"][35]["index"], 35);
}

#[tokio::test]
async fn echo_and_logprobs_score_the_prompt_for_evaluators() {
    let server = start(Setup::default()).await;
    let prompt = "The quick brown fox";
    let ids = server.tokenizer.encode(prompt, AddSpecial::Yes).unwrap();
    let vocab = server.tokenizer.vocab_len();
    for max_tokens in [0, 1] {
        let patch = json!({"prompt": [ids, ids], "max_tokens": max_tokens, "echo": true, "logprobs": 1,
                           "temperature": 0, "seed": 1234});
        let answer = ask(&server, patch).await;
        for index in [0, 1] {
            let choice = &answer["choices"][index];
            assert_eq!(choice["index"], index);
            assert!(choice["text"].as_str().unwrap().starts_with(prompt), "{choice}");
            let list = |key: &str| choice["logprobs"][key].as_array().unwrap().clone();
            let len = ids.len() + max_tokens;
            for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                assert_eq!(list(key).len(), len, "{key}");
            }
            assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
            for at in 1..len {
                let logprob = &list("token_logprobs")[at];
                let top = list("top_logprobs")[at].as_object().unwrap().clone();
                assert_eq!(Some(logprob), top.get(list("tokens")[at].as_str().unwrap()));
                let best = top.values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
                assert!(best >= logprob.as_f64().unwrap());
                if at < ids.len() {
                    let expected = expected_logprob((vocab, None), &ids[..at], ids[at]);
                    assert_eq!(logprob.as_f64().map(|x| x as f32), Some(expected), "token {at}");
                } else {
                    assert_eq!(logprob.as_f64(), Some(best), "the greedy token is the most probable");
                }
            }
            let tokens = list("tokens");
            let lens = tokens.iter().map(|token| token.as_str().unwrap().chars().count());
            let offsets = lens.scan(0, |end, len| Some(std::mem::replace(end, *end + len)));
            let offsets: Vec<usize> = offsets.take(ids.len()).collect();
            assert_eq!(json!(list("text_offset")[..ids.len()]), json!(offsets), "{tokens:?}");
        }
    }
}

#[tokio::test]
async fn echo_alone_gives_the_prompt_and_what_follows() {
    let server = start(Setup::default()).await;
    let plain = ask(&server, json!({"temperature": 0, "max_tokens": 6})).await;
    let echoed = ask(&server, json!({"temperature": 0, "max_tokens": 6, "echo": true})).await;
    let expected = format!("The quick brown fox{}", plain["choices"][0]["text"].as_str().unwrap());
    assert_eq!(echoed["choices"][0]["text"], expected);
    let none = ask(&server, json!({"max_tokens": 0, "echo": true, "n": 2})).await;
    assert_eq!(none["choices"][1]["text"], "The quick brown fox");
    assert_eq!(
        (&none["usage"]["completion_tokens"], &none["choices"][0]["logprobs"]),
        (&json!(0), &Value::Null)
    );
}

#[tokio::test]
async fn logprobs_of_completions_are_parallel_lists() {
    let server = start(Setup::default()).await;
    let answer = ask(&server, json!({"logprobs": 2, "max_tokens": 40, "seed": 3, "ignore_eos": true})).await;
    let logprobs = answer["choices"][0]["logprobs"].as_object().unwrap();
    assert!(logprobs.values().all(|list| list.as_array().unwrap().len() == 40));
    for (token, top) in
        logprobs["tokens"].as_array().unwrap().iter().zip(logprobs["top_logprobs"].as_array().unwrap())
    {
        let top = top.as_object().unwrap();
        assert!(top.contains_key(token.as_str().unwrap()) && (2..=3).contains(&top.len()), "{token} {top:?}");
    }
}

#[tokio::test]
async fn tokenize_and_detokenize_undo_each_other() {
    let server = start(Setup::default()).await;
    let text = "naïve 日本語 🦀";
    let answer = server.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).await.ok();
    let tokens = server.tokenizer.encode(text, AddSpecial::Yes).unwrap();
    assert_eq!((&answer["count"], &answer["tokens"]), (&json!(tokens.len()), &json!(tokens)));
    assert_eq!(answer["max_model_len"], CONTEXT);
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), tokens.len());
    let back = server.post("/detokenize", &json!({"model": MODEL, "tokens": tokens})).await.ok();
    assert_eq!(back, json!({"prompt": text}));
    let messages = json!({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": false});
    let answer = server.post("/tokenize", &messages).await.ok();
    let tokens: Vec<u32> = serde_json::from_value(answer["tokens"].clone()).unwrap();
    assert_eq!(server.tokenizer.decode(&tokens, ShowSpecial::Yes), "<|im_start|>user\nhi<|im_end|>\n");
    assert_eq!(answer["token_strs"], Value::Null);
    for wrong in [json!({}), json!({"prompt": 3}), json!({"tokens": [1]})] {
        server.post("/tokenize", &wrong).await.error(400);
    }
    for wrong in [json!({}), json!({"tokens": [-1]}), json!({"tokens": [999_999]}), json!({"tokens": "x"})] {
        server.post("/detokenize", &wrong).await.error(400);
    }
}

#[tokio::test]
async fn models_are_listed_and_found_by_names_with_slashes() {
    let server = start(Setup::default()).await;
    let model = json!({"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "mainstay",
                       "max_model_len": CONTEXT, "tasks": ["generate", "embed"], "state": "loaded"});
    assert_eq!(server.get("/v1/models").await.ok(), json!({"object": "list", "data": [model]}));
    assert_eq!(server.get("/v1/models/org/echo").await.ok(), model);
    assert_eq!(server.get("/v1/models/org%2Fecho").await.ok(), model);
    assert_eq!(server.get("/v1/models/no-such-model").await.error(404)["code"], "model_not_found");
}
