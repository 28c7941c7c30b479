//! Whole chat answers.

use mainstay_backend_api::Sampling;
use mainstay_backend_api::echo::expected_run;
use mainstay_models::tokenizer::ShowSpecial;
use serde_json::{Value, json};

use crate::testbed::{CHAT, EOS, MODEL, Server, Setup, chat, start};

async fn ask(server: &Server, patch: Value) -> Value {
    server.post(CHAT, &chat(patch)).await.ok()
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn an_answer_has_the_shape_of_the_api() {
    let server = start(Setup::default()).await;
    let body = chat(json!({"max_tokens": 7, "temperature": 0, "ignore_eos": true}));
    let reply = server.post(CHAT, &body).await;
    let answer = reply.ok();
    assert!(reply.headers.contains_key("x-request-id"));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert!(answer["created"].is_u64() && answer["system_fingerprint"].is_string());
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(prompt_tokens > 0);
    let usage = json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 7,
        "total_tokens": prompt_tokens + 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    });
    assert_eq!(answer["usage"], usage);
    let choice = &answer["choices"][0];
    assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &Value::Null));
    let message = json!({"role": "assistant", "content": text(&answer), "refusal": null, "annotations": []});
    assert_eq!(choice["message"], message);
    assert_ne!(ask(&server, json!({"max_tokens": 1})).await["id"], answer["id"]);
}

#[tokio::test]
async fn the_engine_gets_the_rendered_prompt_and_its_tokens_come_back() {
    let server = start(Setup::default()).await;
    let patch = json!({"max_tokens": 20, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let answer = ask(&server, patch).await;
    let prompt: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap();
    let rendered = server.tokenizer.decode(&prompt, ShowSpecial::Yes);
    assert_eq!(rendered, "<|im_start|>user\nSay something.<|im_end|>\n<|im_start|>assistant\n");
    let vocab = server.tokenizer.vocab_len();
    let expected = expected_run(vocab, &prompt, 20, &Sampling::greedy());
    assert_eq!(answer["choices"][0]["token_ids"], json!(expected));
    assert_eq!(text(&answer), server.tokenizer.decode(&expected, ShowSpecial::No));
    // The same again: all pages but the last are found, and the usage says so.
    let long = json!([{"role": "user", "content": "one two three ".repeat(40)}]);
    let again = json!({"messages": long, "max_tokens": 1});
    assert_eq!(ask(&server, again.clone()).await["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let cached = &ask(&server, again).await["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().is_some_and(|n| n >= 32 && n % 32 == 0), "{cached}");
}

#[tokio::test]
async fn messages_of_every_kind_are_rendered() {
    let server = start(Setup::default()).await;
    let messages = json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": true}"}},
        ]},
        {"role": "tool", "tool_call_id": "c", "content": "21"},
    ]);
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let patch = json!({"messages": messages, "tools": [tool], "tool_choice": "none", "max_tokens": 1,
                       "return_token_ids": true});
    let answer = ask(&server, patch).await;
    let prompt: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap();
    let rendered = server.tokenizer.decode(&prompt, ShowSpecial::Yes);
    let expected =
        [("system", "Be brief."), ("user", "Hi\nthere"), ("assistant", "f {\"x\": true}"), ("tool", "21")];
    let expected = expected.map(|(role, text)| format!("<|im_start|>{role}\n{text}<|im_end|>\n")).concat();
    assert_eq!(rendered, expected + "<|im_start|>assistant\n");
}

#[tokio::test]
async fn the_last_message_can_be_continued() {
    let server = start(Setup::default()).await;
    let messages =
        json!([{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two,"}]);
    let patch = json!({"messages": messages, "continue_final_message": true, "max_tokens": 1,
                       "return_token_ids": true});
    let answer = ask(&server, patch).await;
    let prompt: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap();
    let rendered = server.tokenizer.decode(&prompt, ShowSpecial::Yes);
    assert_eq!(rendered, "<|im_start|>user\ncount<|im_end|>\n<|im_start|>assistant\none, two,");
}

#[tokio::test]
async fn a_bias_forces_its_token_and_null_is_absent() {
    let server = start(Setup::default()).await;
    let forced = json!({"logit_bias": {"36": 100}, "max_tokens": 6, "logprobs": true, "seed": null, "stop": null,
        "top_p": null, "n": null, "tools": null, "response_format": null, "stream": null, "stream_options": null,
        "top_logprobs": null, "user": null, "store": null, "metadata": null, "max_completion_tokens": null});
    let answer = ask(&server, forced).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let token = server.tokenizer.decode(&[36], ShowSpecial::Yes);
    assert_eq!(content.len(), 6);
    assert!(content.iter().all(|entry| entry["token"] == token && entry["top_logprobs"] == json!([])));
    assert_eq!(text(&answer), token.repeat(6));
}

#[tokio::test]
async fn ends_of_text_are_heeded_ignored_and_put_off() {
    let server = start(Setup::default()).await;
    let bias = json!({EOS.to_string(): 100});
    let answer = ask(&server, json!({"logit_bias": bias, "max_tokens": 5})).await;
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), ("", &json!("stop")));
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    let answer = ask(&server, json!({"logit_bias": bias, "max_tokens": 5, "ignore_eos": true})).await;
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), ("", &json!("length")));
    let patch =
        json!({"logit_bias": bias, "max_tokens": 2, "ignore_eos": true, "skip_special_tokens": false});
    assert_eq!(text(&ask(&server, patch).await), "<|im_end|><|im_end|>");
    let answer = ask(&server, json!({"logit_bias": bias, "max_tokens": 9, "min_tokens": 4})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let own = json!({"logit_bias": {"36": 100}, "max_tokens": 9, "stop_token_ids": [36]});
    let answer = ask(&server, own.clone()).await;
    assert_eq!((text(&answer), &answer["choices"][0]["stop_reason"]), ("", &json!(36)));
    let mut shown = own;
    shown["include_stop_str_in_output"] = json!(true);
    assert_eq!(text(&ask(&server, shown).await), server.tokenizer.decode(&[36], ShowSpecial::Yes));
}

#[tokio::test]
async fn seeds_decide_and_choices_differ() {
    let server = start(Setup::default()).await;
    let patch = |seed: i64| json!({"temperature": 1, "seed": seed, "max_tokens": 24, "n": 3});
    let answer = ask(&server, patch(-5)).await;
    assert_eq!(ask(&server, patch(-5)).await["choices"], answer["choices"]);
    assert_ne!(ask(&server, patch(6)).await["choices"], answer["choices"]);
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<&Value> = choices.iter().map(|choice| &choice["index"]).collect();
    assert_eq!(indices, [0, 1, 2]);
    let texts: Vec<&Value> = choices.iter().map(|choice| &choice["message"]["content"]).collect();
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2], "{texts:?}");
    let unseeded = json!({"temperature": 1, "max_tokens": 24});
    assert_ne!(ask(&server, unseeded.clone()).await["choices"], ask(&server, unseeded).await["choices"]);
}

#[tokio::test]
async fn logprobs_are_sorted_and_the_chosen_one_is_the_same_number() {
    let server = start(Setup::default()).await;
    let patch =
        json!({"temperature": 0, "max_tokens": 12, "logprobs": true, "top_logprobs": 4, "ignore_eos": true});
    let answer = ask(&server, patch).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 12);
    for entry in &content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        assert!(top.is_sorted_by(|a, b| a["logprob"].as_f64() >= b["logprob"].as_f64()), "{top:?}");
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&entry["token"], &entry["logprob"]));
        assert!(entry["logprob"].as_f64().is_some_and(|x| x <= 0.0) && entry["bytes"].is_array());
    }
    assert_eq!(answer["choices"][0]["logprobs"]["refusal"], Value::Null);
}

#[tokio::test]
async fn defaults_come_from_the_model() {
    let setup = Setup::default();
    let generation = mainstay_models::Generation { temperature: Some(0.0), ..setup.generation.clone() };
    let server = start(Setup { generation, ..setup }).await;
    let texts = [ask(&server, json!({"max_tokens": 9})).await, ask(&server, json!({"max_tokens": 9})).await];
    assert_eq!(text(&texts[0]), text(&texts[1]));
    let hot = [0, 1].map(|seed| json!({"max_tokens": 9, "temperature": 1, "seed": seed}));
    assert_ne!(text(&ask(&server, hot[0].clone()).await), text(&ask(&server, hot[1].clone()).await));
}

#[tokio::test]
async fn without_a_limit_the_context_is_filled_or_the_operators_default_holds() {
    let server = start(Setup::default()).await;
    let answer = ask(&server, json!({"temperature": 0, "logit_bias": {"36": 100}})).await;
    assert_eq!(answer["usage"]["total_tokens"], crate::testbed::CONTEXT);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let mut setup = Setup::default();
    setup.options.max_tokens_default = Some(11);
    let server = start(setup).await;
    let answer = ask(&server, json!({"logit_bias": {"36": 100}})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 11);
}
