//! Which tokens of a session stand for a conversation.

use mainstay_engine::store::{At, Settings};
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial};
use serde_json::{Value, json};

use crate::sessions::{ids, text, turn, user, with_store};
use crate::testbed::{CHAT, Directory, Server, Setup, start};

const IM_END: &str = "<|im_end|>";

async fn ask(server: &Server, session: &str, patch: Value) -> Value {
    server.post(CHAT, &turn(session, patch)).await.ok()
}

fn assistant(answer: &Value) -> Value {
    json!({"role": "assistant", "content": text(answer)})
}

fn all_tokens(answer: &Value) -> Vec<u32> {
    [ids(&answer["prompt_token_ids"]), ids(&answer["choices"][0]["token_ids"])].concat()
}

#[tokio::test]
async fn sampled_tokens_stay_that_the_tokenizer_would_not_choose() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let mut unusual = 0;
    for seed in 0..8 {
        let id = server.session(Settings::default());
        let asked = json!({"temperature": 1, "seed": seed, "max_tokens": 30, "ignore_eos": true});
        let first = ask(&server, &id, asked.clone()).await;
        let sampled = ids(&first["choices"][0]["token_ids"]);
        unusual += usize::from(server.tokenizer.encode(&text(&first), AddSpecial::No).unwrap() != sampled);
        let messages = json!([user("Say something."), assistant(&first), user("go on")]);
        let second = ask(&server, &id, json!({"messages": messages})).await;
        assert_eq!(second["session"], json!({"id": id, "name": null, "turn": 2}), "seed {seed}");
        assert_eq!(second["kv"]["reason"], Value::Null);
        let prompt = ids(&second["prompt_token_ids"]);
        assert!(prompt.starts_with(&all_tokens(&first)), "seed {seed}");
        let rest = server.tokenizer.decode(&prompt[all_tokens(&first).len()..], ShowSpecial::Yes);
        assert_eq!(rest, format!("{IM_END}\n<|im_start|>user\ngo on{IM_END}\n<|im_start|>assistant\n"));
    }
    assert!(unusual > 4, "{unusual} answers of 8 would be tokenized otherwise");
    server.stop().await;
}

#[tokio::test]
async fn the_token_that_ended_an_answer_is_not_said_twice() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let eos = crate::testbed::EOS.to_string();
    let first = ask(&server, &id, json!({"logit_bias": {eos: 100}, "min_tokens": 5})).await;
    assert_eq!(first["choices"][0]["finish_reason"], "stop");
    let second = ask(&server, &id, json!({"session_mode": "append", "messages": [user("go on")]})).await;
    let prompt = ids(&second["prompt_token_ids"]);
    assert!(prompt.starts_with(&all_tokens(&first)));
    let rest = server.tokenizer.decode(&prompt[all_tokens(&first).len()..], ShowSpecial::Yes);
    assert_eq!(rest, format!("\n<|im_start|>user\ngo on{IM_END}\n<|im_start|>assistant\n"));
    server.stop().await;
}

#[tokio::test]
async fn an_answer_that_a_stop_string_ended_goes_on_where_its_text_ends() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let asked = json!({"max_tokens": 40, "ignore_eos": true});
    let probe = server.session(Settings::default());
    let whole = text(&ask(&server, &probe, asked).await);
    let letters: Vec<char> = whole.chars().collect();
    let mut kept = 0;
    for len in [1, 2, 3] {
        for at in (3..20).step_by(4) {
            let stop: String = letters[at..at + len].iter().collect();
            if stop.contains('\u{FFFD}') {
                continue;
            }
            let id = server.session(Settings::default());
            let first = ask(&server, &id, json!({"stop": stop, "max_tokens": 40, "ignore_eos": true})).await;
            let messages = json!([user("Say something."), assistant(&first), user("go on")]);
            let second = ask(&server, &id, json!({"messages": messages})).await;
            assert_eq!((&second["session"]["id"], &second["session"]["turn"]), (&json!(id), &json!(2)));
            let prompt = server.tokenizer.decode(&ids(&second["prompt_token_ids"]), ShowSpecial::Yes);
            let said = text(&first);
            assert!(
                prompt.ends_with(&format!(
                    "{said}{IM_END}\n<|im_start|>user\ngo on{IM_END}\n<|im_start|>assistant\n"
                )),
                "{stop:?}: {prompt:?}"
            );
            assert_eq!(second["kv"]["reason"], Value::Null, "{stop:?}");
            kept += server.turns(&id)[0].len();
        }
    }
    assert!(kept > 0);
    server.stop().await;
}

/// Trims answers.
const TRIMS: &str = "{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content | trim) ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";

#[tokio::test]
async fn a_template_that_trims_answers_keeps_their_tokens() {
    let directory = Directory::new();
    let server = start(Setup { template: Some(TRIMS.to_owned()), ..with_store(&directory) }).await;
    let space = server.tokenizer.encode(" a", AddSpecial::No).unwrap()[0];
    let id = server.session(Settings::default());
    // All that can be drawn begins with a space, which is trimmed away.
    let first = ask(&server, &id, json!({"logit_bias": {space.to_string(): 100}, "max_tokens": 4})).await;
    assert!(text(&first).starts_with(' '), "{first}");
    let mut messages = vec![user("Say something."), assistant(&first), user("go on")];
    let second =
        ask(&server, &id, json!({"messages": messages, "logit_bias": {space.to_string(): 100}})).await;
    assert_eq!((&second["session"]["turn"], &second["kv"]["reason"]), (&json!(2), &Value::Null));
    let prompt = ids(&second["prompt_token_ids"]);
    assert!(prompt.starts_with(&all_tokens(&first)));
    let rest = server.tokenizer.decode(&prompt[all_tokens(&first).len()..], ShowSpecial::Yes);
    assert_eq!(rest, format!("{IM_END}\n<|im_start|>user\ngo on{IM_END}\n<|im_start|>assistant\n"));
    // And once more: what stands for the trimmed text stands for it in later turns, too.
    messages.extend([assistant(&second), user("and on")]);
    let third = ask(&server, &id, json!({"messages": messages})).await;
    assert_eq!((&third["session"]["turn"], &third["kv"]["reason"]), (&json!(3), &Value::Null));
    assert!(ids(&third["prompt_token_ids"]).starts_with(&all_tokens(&second)));
    // The token that ended an answer is the beginning of what the template writes after it.
    let id = server.session(Settings::default());
    let eos = crate::testbed::EOS.to_string();
    let ended = json!({"logit_bias": {space.to_string(): 50, eos: 100}, "min_tokens": 3});
    let first = ask(&server, &id, ended).await;
    assert!(first["choices"][0]["finish_reason"] == "stop" && text(&first).starts_with(' '), "{first}");
    let messages = json!([user("Say something."), assistant(&first), user("go on")]);
    let second = ask(&server, &id, json!({"messages": messages})).await;
    assert_eq!((&second["session"]["turn"], &second["kv"]["reason"]), (&json!(2), &Value::Null));
    let prompt = ids(&second["prompt_token_ids"]);
    assert!(prompt.starts_with(&all_tokens(&first)));
    let rest = server.tokenizer.decode(&prompt[all_tokens(&first).len()..], ShowSpecial::Yes);
    assert_eq!(rest, format!("\n<|im_start|>user\ngo on{IM_END}\n<|im_start|>assistant\n"));
    server.stop().await;
}

/// Shows what was thought only in the last message, as reasoning models' templates do.
const STRIPS: &str = "{%- for m in messages -%}
{%- set shown = m.content if loop.last or m.role != 'assistant' else m.content.split('B')[-1] -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ shown ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";

#[tokio::test]
async fn a_template_that_strips_thoughts_rewrites_one_turn_of_the_same_session() {
    let directory = Directory::new();
    let server = start(Setup { template: Some(STRIPS.to_owned()), ..with_store(&directory) }).await;
    let id = server.session(Settings::default());
    let plain = json!({"logit_bias": {"36": 100}, "max_tokens": 3});
    let first = ask(&server, &id, plain.clone()).await;
    let thought = server.tokenizer.encode("B", AddSpecial::No).unwrap()[0];
    let mut messages = vec![user("Say something."), assistant(&first), user("think")];
    let thinks = json!({"messages": messages, "logit_bias": {thought.to_string(): 100}, "max_tokens": 3});
    let second = ask(&server, &id, thinks).await;
    assert_eq!((text(&second).as_str(), &second["kv"]["reason"]), ("BBB", &Value::Null));
    let first_turn = server.turns(&id)[0].clone();
    messages.extend([assistant(&second), user("go on")]);
    let third = ask(&server, &id, json!({"messages": messages})).await;
    assert_eq!(third["session"], json!({"id": id, "name": null, "turn": 2}));
    assert_eq!(third["kv"]["reason"], "template_rewrote_history");
    let prompt = ids(&third["prompt_token_ids"]);
    assert!(prompt.starts_with(&first_turn), "the turn before it stays");
    let rendered = server.tokenizer.decode(&prompt, ShowSpecial::Yes);
    assert!(
        !rendered.contains('B') && rendered.contains("think") && rendered.contains("go on"),
        "{rendered}"
    );
    assert_eq!(server.turns(&id).concat(), all_tokens(&third));
    // The turn holds all messages after the one that stayed.
    messages.extend([assistant(&third), user("and on")]);
    let fourth = ask(&server, &id, json!({"messages": messages})).await;
    assert_eq!(fourth["session"]["id"], json!(id), "no fork");
    server.stop().await;
}

/// Begins with a date that the request gives.
const DATED: &str = "{{ '<|im_start|>system\nToday is ' ~ date ~ '<|im_end|>\n' }}
{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";

#[tokio::test]
async fn a_template_with_a_date_begins_anew_when_the_day_is_over() {
    let directory = Directory::new();
    let server = start(Setup { template: Some(DATED.to_owned()), ..with_store(&directory) }).await;
    let id = server.session(Settings::default());
    let on = |day: &str, said: &str| json!({"chat_template_kwargs": {"date": day}, "messages": [user(said)], "session_mode": "append"});
    let first = ask(&server, &id, on("Monday", "a")).await;
    let second = ask(&server, &id, on("Monday", "b")).await;
    assert_eq!((&second["session"]["turn"], &second["kv"]["reason"]), (&json!(2), &Value::Null));
    let third = ask(&server, &id, on("Tuesday", "c")).await;
    assert_eq!(third["session"], json!({"id": id, "name": null, "turn": 1}));
    assert_eq!(third["kv"]["reason"], "template_rewrote_history");
    let rendered = server.tokenizer.decode(&ids(&third["prompt_token_ids"]), ShowSpecial::Yes);
    assert!(rendered.contains("Tuesday") && !rendered.contains("Monday"), "{rendered}");
    for said in [text(&first), text(&second)] {
        assert!(rendered.contains(&said), "{said:?} in {rendered:?}");
    }
    let fourth = ask(&server, &id, on("Tuesday", "d")).await;
    assert_eq!((&fourth["session"]["turn"], &fourth["kv"]["reason"]), (&json!(2), &Value::Null));
    server.stop().await;
}

#[tokio::test]
async fn a_conversation_that_goes_another_way_is_a_fork() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings { name: Some("mine".to_owned()), ..Settings::default() });
    let mut messages = vec![user("a")];
    let mut answers = Vec::new();
    for said in ["b", "c", "d"] {
        let answer = ask(&server, &id, json!({"messages": messages})).await;
        messages.extend([assistant(&answer), user(said)]);
        answers.push(answer);
    }
    let before = server.turns(&id);
    let store = server.store.clone().unwrap();
    let cases = [
        // Another second question; the second answer edited; the first question again; another beginning.
        (1, vec![messages[0].clone(), messages[1].clone(), user("B")]),
        (1, [&messages[..3], &[json!({"role": "assistant", "content": "edited"}), user("c")]].concat()),
        (0, vec![messages[0].clone()]),
        (0, vec![user("A")]),
        (2, messages[..5].to_vec()),
    ];
    for (common, messages) in cases {
        let answer = ask(&server, &id, json!({"messages": messages})).await;
        let fork = answer["session"]["id"].as_str().unwrap().to_owned();
        assert!(fork != id && answer["session"]["name"].is_null());
        assert_eq!(answer["session"]["turn"], common + 1);
        let (tenant, at) = server.id(&fork);
        assert_eq!(store.get(tenant, at).unwrap().parent, Some((server.id(&id).1, common)));
        assert_eq!(server.turns(&fork)[..common as usize], before[..common as usize]);
        assert!(ids(&answer["prompt_token_ids"]).starts_with(&before[..common as usize].concat()));
        assert_eq!(server.turns(&id), before, "the session is untouched");
        assert_eq!(answer["kv"]["reason"], Value::Null);
    }
    drop(store);
    // Content in parts and fields that no template reads make no other message.
    let mut same = messages.clone();
    same[0] = json!({"role": "user", "content": [{"type": "text", "text": "a"}], "name": "me"});
    same[1]["refusal"] = Value::Null;
    assert_eq!(ask(&server, &id, json!({"messages": same})).await["session"]["id"], json!(id));
    server.stop().await;
}

#[tokio::test]
async fn a_changed_model_is_named() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let long = json!({"messages": [user(&"one two three ".repeat(30))]});
    let first = ask(&server, &id, long).await;
    server.stop().await;
    let append = || json!({"messages": [user("go on")], "session_mode": "append"});
    let server = start(Setup { weights: 1, ..with_store(&directory) }).await;
    let second = ask(&server, &id, append()).await;
    assert_eq!((&second["kv"]["state"], &second["kv"]["reason"]), (&json!("cold"), &json!("weights")));
    assert!(ids(&second["prompt_token_ids"]).starts_with(&all_tokens(&first)), "the tokens stay");
    assert_eq!(ask(&server, &id, append()).await["kv"]["reason"], Value::Null, "told once");
    server.stop().await;
    let setup = Setup { weights: 1, template: Some(TRIMS.to_owned()), ..with_store(&directory) };
    let server = start(setup).await;
    let fourth = ask(&server, &id, append()).await;
    assert_eq!(fourth["kv"]["reason"], "template");
    assert_eq!(fourth["session"], json!({"id": id, "name": null, "turn": 1}));
    let rendered = server.tokenizer.decode(&ids(&fourth["prompt_token_ids"]), ShowSpecial::Yes);
    assert_eq!(rendered.matches("go on").count(), 3, "{rendered}");
    assert_eq!(ask(&server, &id, append()).await["session"]["turn"], 2);
    server.stop().await;
}

#[tokio::test]
async fn a_turn_that_was_cut_does_not_stand() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    let append = |said: &str| json!({"messages": [user(said)], "session_mode": "append"});
    let first = ask(&server, &id, append("a")).await;
    ask(&server, &id, append("b")).await;
    let (tenant, at) = server.id(&id);
    let store = server.store.clone().unwrap();
    let cut = all_tokens(&first).len() as u32 + 5;
    let fork = store.fork(tenant, at, At::Token(cut), None).unwrap().id;
    drop(store);
    let fork = format!("sess_{fork}");
    let answer = ask(&server, &fork, append("c")).await;
    assert_eq!(
        (&answer["session"]["turn"], &answer["kv"]["reason"]),
        (&json!(2), &json!("template_rewrote_history"))
    );
    assert!(ids(&answer["prompt_token_ids"]).starts_with(&all_tokens(&first)));
    let rendered = server.tokenizer.decode(&ids(&answer["prompt_token_ids"]), ShowSpecial::Yes);
    let expected = format!(
        "<|im_start|>user\na{IM_END}\n<|im_start|>assistant\n{}{IM_END}\n<|im_start|>user\nc",
        text(&first)
    );
    assert!(rendered.starts_with(&expected), "{rendered}");
    server.stop().await;
}

#[tokio::test]
async fn a_fork_that_never_began_is_not_left_behind() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let id = server.session(Settings::default());
    ask(&server, &id, json!({"messages": [user("a")]})).await;
    server.engine.shutdown();
    server.post(CHAT, &turn(&id, json!({"messages": [user("A")]}))).await.error(503);
    let (tenant, at) = server.id(&id);
    let store = server.store.clone().unwrap();
    while store.list(tenant, None, 9).len() > 1 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert_eq!(store.get(tenant, at).unwrap().turn_count, 1);
    drop(store);
    server.stop().await;
}
