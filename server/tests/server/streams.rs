//! Answers as streams of events.

use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, Setup, chat, completion, joined, start};

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

#[tokio::test]
async fn chat_events_are_framed_as_the_api_frames_them() {
    let server = start(Setup::default()).await;
    let body = chat(json!({"stream": true, "max_tokens": 9, "temperature": 0, "n": 2, "ignore_eos": true}));
    let events = server.stream(CHAT, &body).await.events().await;
    let first = &events[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    for event in &events {
        for key in ["id", "created", "model", "object", "system_fingerprint"] {
            assert_eq!(event[key], first[key]);
        }
        assert!(event.get("usage").is_none() && event["choices"].as_array().unwrap().len() == 1);
        assert!(event["choices"][0].as_object().unwrap().contains_key("finish_reason"));
    }
    for index in 0..2 {
        let own: Vec<&Value> =
            events.iter().map(|event| &event["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(own[0]["delta"], json!({"role": "assistant", "content": ""}));
        let (last, rest) = own.split_last().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
        assert!(rest.iter().all(|choice| choice["finish_reason"].is_null()));
    }
}

#[tokio::test]
async fn usage_comes_last_and_only_if_asked_for() {
    let server = start(Setup::default()).await;
    for (path, body) in
        [(CHAT, chat(json!({"max_tokens": 5}))), (COMPLETIONS, completion(json!({"max_tokens": 5})))]
    {
        let body = with(body, "ignore_eos", json!(true));
        let whole = server.post(path, &with(body.clone(), "seed", json!(1))).await.ok();
        let body = with(with(body, "stream", json!(true)), "stream_options", json!({"include_usage": true}));
        let events = server.stream(path, &body).await.events().await;
        let (last, rest) = events.split_last().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &whole["usage"]));
        assert!(rest.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
    }
}

#[tokio::test]
async fn streamed_text_is_the_text_of_the_whole_answer() {
    let server = start(Setup::default()).await;
    for seed in 0..12 {
        let patch = json!({"seed": seed, "temperature": 1, "max_tokens": 40, "n": 2, "stop": ["e", "日"]});
        for (path, body) in [(CHAT, chat(patch.clone())), (COMPLETIONS, completion(patch))] {
            let whole = server.post(path, &body).await.ok();
            let events = server.stream(path, &with(body, "stream", json!(true))).await.events().await;
            for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
                let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap();
                assert_eq!(joined(&events, index), text, "seed {seed}");
                let mut own = events.iter().map(|event| &event["choices"][0]).filter(|c| c["index"] == index);
                assert_eq!(own.next_back().unwrap()["finish_reason"], choice["finish_reason"]);
            }
        }
    }
}

#[tokio::test]
async fn a_stop_string_is_found_wherever_tokens_cut_it() {
    let server = start(Setup::default()).await;
    let body = chat(json!({"temperature": 0, "max_tokens": 24, "ignore_eos": true}));
    let whole = server.post(CHAT, &body).await.ok();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    for len in [1, 2, 5, 9] {
        for window in borders.windows(len + 1).step_by(3) {
            let stop = &text[window[0]..window[len]];
            // Bytes that are no character are only known to be none when the next token comes.
            if stop.contains('\u{FFFD}') {
                continue;
            }
            let answer = server.post(CHAT, &with(body.clone(), "stop", json!(stop))).await.ok();
            let choice = &answer["choices"][0];
            assert_eq!(
                choice["message"]["content"],
                text[..text.find(stop).unwrap()],
                "{stop:?} in {text:?}"
            );
            assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
            let shown =
                with(with(body.clone(), "stop", json!([stop])), "include_stop_str_in_output", json!(true));
            let shown = server.stream(CHAT, &with(shown, "stream", json!(true))).await.events().await;
            assert_eq!(joined(&shown, 0), text[..text.find(stop).unwrap() + stop.len()]);
        }
    }
    server.idle().await;
}

#[tokio::test]
async fn a_stop_string_ends_the_generation_in_the_engine() {
    let server = start(Setup::default()).await;
    // One token for ever; the context would take it 2,000 times.
    let body = chat(json!({"logit_bias": {"36": 100}, "stop": "FFFFF"}));
    let token = server.tokenizer.decode(&[36], mainstay_models::tokenizer::ShowSpecial::No);
    let body = with(body, "stop", json!(token.repeat(5)));
    let answer = server.post(CHAT, &body).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "");
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    server.idle().await;
    assert!(server.engine.stats().generated_tokens < 2000);
}

#[tokio::test]
async fn a_stop_string_ends_its_choice_while_others_go_on() {
    let server = start(Setup::default()).await;
    let body = chat(json!({"seed": 1, "temperature": 1, "n": 2, "max_tokens": 1500, "ignore_eos": true}));
    let whole = server.post(CHAT, &body).await.ok();
    let texts = [0, 1].map(|index| whole["choices"][index]["message"]["content"].as_str().unwrap());
    let borders: Vec<usize> = texts[0].char_indices().map(|(at, _)| at).take(60).collect();
    let stops = borders.windows(9).map(|border| &texts[0][border[0]..border[8]]);
    let stop = stops.filter(|stop| !stop.contains('\u{FFFD}')).find(|stop| !texts[1].contains(stop)).unwrap();
    let before = server.engine.stats().generated_tokens;
    let answer = server.post(CHAT, &with(body, "stop", json!(stop))).await.ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][1]["message"]["content"], texts[1]);
    server.idle().await;
    let made = server.engine.stats().generated_tokens - before;
    assert!(made < 2900, "the stopped choice went on: {made} tokens");
}

#[tokio::test]
async fn tokens_and_logprobs_are_streamed_whole() {
    let server = start(Setup::default()).await;
    let patch =
        json!({"seed": 5, "max_tokens": 30, "return_token_ids": true, "temperature": 1, "ignore_eos": true});
    let cases = [
        (CHAT, with(with(chat(patch.clone()), "logprobs", json!(true)), "top_logprobs", json!(2))),
        (COMPLETIONS, with(with(completion(patch), "logprobs", json!(2)), "echo", json!(true))),
    ];
    for (path, body) in cases {
        let whole = server.post(path, &body).await.ok();
        let events = server.stream(path, &with(body, "stream", json!(true))).await.events().await;
        let choices: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).collect();
        let lists = |key: &str, field: &str| {
            let parts = choices.iter().map(|c| if key.is_empty() { &c[field] } else { &c[key][field] });
            Value::from(parts.filter_map(Value::as_array).flatten().cloned().collect::<Vec<_>>())
        };
        let choice = &whole["choices"][0];
        assert_eq!(lists("", "token_ids"), choice["token_ids"], "{path}");
        assert_eq!(choice["token_ids"].as_array().unwrap().len(), 30);
        for (field, list) in
            choice["logprobs"].as_object().unwrap().iter().filter(|(_, list)| list.is_array())
        {
            assert_eq!(lists("logprobs", field), *list, "{path} {field}");
        }
        let prompt_ids = if path == CHAT { &whole["prompt_token_ids"] } else { &choice["prompt_token_ids"] };
        let first = if path == CHAT { &events[0] } else { choices[0] };
        assert!(prompt_ids.is_array());
        assert_eq!(&first["prompt_token_ids"], prompt_ids);
    }
}
