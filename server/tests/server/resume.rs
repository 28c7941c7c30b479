//! Answers that were interrupted and go on, that are read along, and that are repeated.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use mainstay_engine::store::{Durability, Settings};
use serde_json::{Value, json};

use crate::sessions::{ids, text, turn, user, with_store};
use crate::testbed::{CHAT, Directory, Open, Reply, Server, Setup, joined, start};

/// An event's number and its choices.
type Event = (usize, Value);

/// Random draws with everything that depends on the tokens before.
fn random(session: &str, seed: u64, patch: Value) -> Value {
    let options = json!({"stream": true, "temperature": 1, "seed": seed, "max_tokens": 28, "frequency_penalty": 1.5,
        "presence_penalty": 0.5, "repetition_penalty": 1.3, "return_token_ids": false, "messages": [user("go")]});
    let mut body = turn(session, options);
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

async fn next(stream: &mut Open) -> Option<Event> {
    let (number, event) = stream.numbered().await?;
    assert!(event.get("error").is_none(), "{event}");
    Some((number.unwrap(), event["choices"].clone()))
}

async fn rest(mut stream: Open) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = next(&mut stream).await {
        events.push(event);
    }
    events
}

fn path(session: &str, after: usize) -> String {
    format!("/v1/sessions/{session}/stream?after={after}")
}

pub(crate) async fn read(server: &Server, session: &str, after: usize) -> Open {
    let request = Request::get(path(session, after)).header("host", "test").body(Body::empty()).unwrap();
    let open = server.open(request).await;
    assert_eq!(open.response.status(), 200);
    assert_eq!(open.response.headers()["x-session-id"], session);
    open
}

async fn refused(server: &Server, session: &str, after: usize) -> Reply {
    server.get(&path(session, after)).await
}

/// A server that makes as many steps as it is told, and the means to let it run.
async fn gated(directory: &Directory, interval: Option<Duration>, steps: usize) -> (Server, Sender<()>) {
    let (gate, blocked) = channel();
    (0..steps).for_each(|_| gate.send(()).unwrap());
    let mut setup = Setup { gate: Some(blocked), ..with_store(directory) };
    setup.options.journal_interval = interval;
    (start(setup).await, gate)
}

/// Steps that an answer may take beside those that draw its tokens: where its first mask comes late, its prompt is computed
/// in two.
fn more_steps(patch: &Value) -> usize {
    usize::from(patch.get("guided_regex").is_some())
}

/// Waits until nobody has the session.
async fn free(server: &Server, session: &str) {
    loop {
        let error = server.post(CHAT, &turn(session, json!({"expected_turn": 99}))).await.error(409);
        if error["code"] == "turn_conflict" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The answer's tokens that are in flight in the store.
fn in_flight(server: &Server, session: &str) -> Option<usize> {
    let (tenant, id) = server.id(session);
    let found = server.store.as_deref().unwrap().answer(tenant, id).unwrap()?;
    let sent = serde_json::from_slice::<Value>(&found.meta).unwrap()["record"]["sent_len"].as_u64().unwrap();
    Some(found.tokens.len() - sent as usize)
}

async fn unbroken(body: impl Fn(&str) -> Value) -> (Vec<Event>, Vec<u32>) {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let session = server.session(Settings::default());
    let events = rest(server.stream(CHAT, &body(&session)).await).await;
    let tokens = server.turns(&session).concat();
    server.stop().await;
    (events, tokens)
}

/// What a reader has who read `first`, and then what came of another stream.
fn both(mut first: Vec<Event>, second: Vec<Event>, after: usize) -> Vec<Event> {
    let end = second.len() - 1;
    assert!(
        second[..end].iter().all(|(number, _)| after == 0 || *number > after),
        "after {after}: {second:?}"
    );
    if after == 0 {
        return second;
    }
    first.retain(|(number, _)| *number <= after);
    first.extend(second);
    first
}

#[tokio::test]
async fn an_answer_that_lost_its_client_goes_on_as_if_it_had_not() {
    let mut stopped = 0;
    let held = json!({"guided_regex": "[a-z]{2,5}( [a-z]{1,4}){3,6}"});
    let cases = [(1, json!({})), (2, json!({"stop": ["e", "qq"]})), (3, json!({"min_tokens": 9})), (4, held)];
    for (seed, patch) in cases {
        let (expected, tokens) = unbroken(|session| random(session, seed, patch.clone())).await;
        stopped += usize::from(expected.last().unwrap().1[0]["finish_reason"] == "stop");
        let drawn = expected.last().unwrap().0;
        for steps in (1..drawn).step_by(3) {
            let directory = Directory::new();
            let most = steps + more_steps(&patch);
            let (server, gate) = gated(&directory, Some(Duration::from_secs(3600)), most).await;
            let session = server.session(Settings::default());
            let mut stream = server.stream(CHAT, &random(&session, seed, patch.clone())).await;
            let mut first = vec![next(&mut stream).await.unwrap()];
            let visible = expected.iter().filter(|(number, _)| *number <= steps).count();
            while first.len() < visible {
                first.push(next(&mut stream).await.unwrap());
            }
            let last = first.last().unwrap().0;
            drop(stream);
            free(&server, &session).await;
            let in_store = in_flight(&server, &session).unwrap();
            assert!(in_store >= last && in_store <= most, "{in_store} of {most}");
            assert_eq!(server.turns(&session).len(), 0, "an answer in flight is no turn");
            drop(gate);
            for after in [last, last / 2, 0].into_iter().take(1 + steps % 3) {
                // All but the last reader leave again.
                let stream = read(&server, &session, after).await;
                if after != 0 && steps % 3 != 0 {
                    drop(stream);
                    free(&server, &session).await;
                } else {
                    let second = rest(stream).await;
                    assert_eq!(
                        both(first.clone(), second, after),
                        expected,
                        "seed {seed}, {steps} steps, {after}"
                    );
                }
            }
            let second = rest(read(&server, &session, last).await).await;
            assert_eq!(both(first, second, last), expected, "seed {seed}, {steps} steps");
            assert_eq!(server.turns(&session).concat(), tokens);
            assert_eq!(in_flight(&server, &session), None);
            server.stop().await;
        }
    }
    assert!(stopped > 0, "no answer ended by a stop string");
}

#[tokio::test]
async fn an_answer_goes_on_after_a_crash() {
    for patch in [json!({}), json!({"guided_regex": "[a-z]{200,400}"})] {
        goes_on_after_a_crash(&patch).await;
    }
}

async fn goes_on_after_a_crash(patch: &Value) {
    let (expected, tokens) = unbroken(|session| random(session, 5, patch.clone())).await;
    for (steps, is_written) in [(3, true), (8, false), (14, true), (20, false)] {
        let directory = Directory::new();
        let interval = if is_written { Duration::ZERO } else { Duration::from_secs(3600) };
        let (server, gate) = gated(&directory, Some(interval), steps + more_steps(patch)).await;
        let session = server.session(Settings::default());
        let mut stream = server.stream(CHAT, &random(&session, 5, patch.clone())).await;
        let visible = expected.iter().filter(|(number, _)| *number <= steps).count();
        let mut first = Vec::new();
        while first.len() < visible {
            first.push(next(&mut stream).await.unwrap());
        }
        let last = first.last().unwrap().0;
        // One entry may have been under way when the last token came.
        let is_behind = |written: usize| written == 0 || written + 2 < last;
        while is_written && is_behind(in_flight(&server, &session).unwrap()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let crashed = directory.copied();
        drop((stream, gate));
        let after = start(with_store(&crashed)).await;
        let written = in_flight(&after, &session).unwrap();
        assert!(if is_written { written > 0 } else { written == 0 }, "{written} of {steps} written");
        // The reader may have more than the journal: the same tokens are drawn again.
        let second = rest(read(&after, &session, last).await).await;
        assert_eq!(both(first, second, last), expected, "{steps} steps");
        assert_eq!(after.turns(&session).concat(), tokens);
        after.stop().await;
        server.stop().await;
    }
}

#[tokio::test]
async fn an_answer_that_was_whole_but_for_its_end_needs_no_engine() {
    let eos = json!({crate::testbed::EOS.to_string(): 6});
    let patches = [json!({}), json!({"stop": "e"}), json!({"logit_bias": eos, "max_tokens": 200})];
    for (seed, patch) in patches.into_iter().enumerate() {
        let body = |session: &str| random(session, seed as u64, patch.clone());
        let (expected, tokens) = unbroken(body).await;
        let all = all_drawn(body("another")).await;
        assert_eq!(all.len(), expected.last().unwrap().0);
        let directory = Directory::new();
        // All steps but the last.
        let (server, gate) = gated(&directory, Some(Duration::from_secs(3600)), all.len() - 1).await;
        let session = server.session(Settings::default());
        let mut stream = server.stream(CHAT, &body(&session)).await;
        next(&mut stream).await.unwrap();
        drop(stream);
        free(&server, &session).await;
        drop(gate);
        server.idle().await;
        let (tenant, id) = server.id(&session);
        let written = in_flight(&server, &session).unwrap();
        server.store.as_deref().unwrap().extend_answer(tenant, id, &all[written..]).unwrap();
        let steps = server.engine.stats().steps;
        let events = rest(read(&server, &session, 0).await).await;
        assert_eq!(events, expected, "{patch}");
        assert_eq!(server.engine.stats().steps, steps);
        assert_eq!(server.turns(&session).concat(), tokens);
        server.stop().await;
    }
}

#[tokio::test]
async fn pages_of_an_answer_that_was_whole_are_computed_where_the_turn_has_to_have_them() {
    let strict = || Settings { durability: Durability::Full, ..Settings::default() };
    // Pages of 32 tokens: some lie in the answer alone.
    let body = |session: &str| random(session, 4, json!({"max_tokens": 80, "ignore_eos": true}));
    let (expected, tokens) = unbroken(body).await;
    let all = all_drawn(body("another")).await;
    let directory = Directory::new();
    let (server, gate) = gated(&directory, Some(Duration::from_secs(3600)), 2).await;
    let session = server.session(strict());
    let mut stream = server.stream(CHAT, &body(&session)).await;
    next(&mut stream).await.unwrap();
    drop(stream);
    free(&server, &session).await;
    drop(gate);
    server.idle().await;
    let (tenant, id) = server.id(&session);
    let written = in_flight(&server, &session).unwrap();
    server.store.as_deref().unwrap().extend_answer(tenant, id, &all[written..]).unwrap();
    server.stop().await;

    let server = start(with_store(&directory)).await;
    assert_eq!(rest(read(&server, &session, 0).await).await, expected);
    assert_eq!(server.turns(&session).concat(), tokens);
    server.stop().await;
}

/// All tokens of an answer, those of its stop string too.
async fn all_drawn(mut body: Value) -> Vec<u32> {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    body["session_id"] = json!(server.session(Settings::default()));
    body["stream"] = json!(false);
    body["return_token_ids"] = json!(true);
    let answer = server.post(CHAT, &body).await.ok();
    server.stop().await;
    ids(&answer["choices"][0]["token_ids"])
}

#[tokio::test]
async fn the_last_answer_is_repeated() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let held = json!({"guided_regex": "[a-z]{20}", "ignore_eos": true});
    let patches = [json!({}), json!({"stop": "e"}), json!({"logprobs": false}), held];
    for (seed, patch) in patches.into_iter().enumerate() {
        let session = server.session(Settings::default());
        assert_eq!(refused(&server, &session, 0).await.error(404)["code"], "no_turns");
        let body = random(&session, seed as u64, patch);
        let events = rest(server.stream(CHAT, &body).await).await;
        let last = events.last().unwrap().0;
        for after in 0..=last + 1 {
            let again = rest(read(&server, &session, after).await).await;
            let mut wanted = events.clone();
            let end = wanted.pop().unwrap();
            wanted.retain(|(number, _)| after == 0 || *number > after);
            wanted.push(end);
            assert_eq!(again, wanted, "after {after}");
        }
        // A reader that lost its connection says so in a header.
        let request =
            Request::get(format!("/v1/sessions/{session}/stream")).header("last-event-id", last.to_string());
        let again = rest(server.open(request.body(Body::empty()).unwrap()).await).await;
        assert_eq!(again, events[events.len() - 1..]);
    }
    let session = server.session(Settings::default());
    let mut body = random(&session, 0, json!({"stream_options": {"include_usage": true}}));
    let whole = server.stream(CHAT, &body).await.events().await;
    let again = read(&server, &session, 0).await.events().await;
    assert_eq!(again, whole, "id, usage, kv and session too");
    body["stream"] = json!(false);
    body["session_mode"] = json!("append");
    let answer = server.post(CHAT, &body).await.ok();
    let again = read(&server, &session, 0).await.events().await;
    assert_eq!((&again[0]["id"], joined(&again, 0)), (&answer["id"], text(&answer)));
    server.stop().await;
}

#[tokio::test]
async fn a_turn_that_runs_is_read_along() {
    let (expected, _) = unbroken(|session| random(session, 7, json!({}))).await;
    let directory = Directory::new();
    let (server, gate) = gated(&directory, Some(Duration::ZERO), 6).await;
    let session = server.session(Settings::default());
    let mut stream = server.stream(CHAT, &random(&session, 7, json!({}))).await;
    let mut first = vec![next(&mut stream).await.unwrap(), next(&mut stream).await.unwrap()];
    let mut along = read(&server, &session, 0).await;
    let leaves = read(&server, &session, 2).await;
    // One that never reads.
    let slow = read(&server, &session, 0).await;
    let begun = vec![next(&mut along).await.unwrap(), next(&mut along).await.unwrap()];
    assert_eq!(begun, first);
    drop(leaves);
    drop(gate);
    first.extend(rest(stream).await);
    assert_eq!(first, expected);
    assert_eq!([begun, rest(along).await].concat(), expected);
    assert_eq!(rest(slow).await, expected);
    assert_eq!(server.turns(&session).len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn who_reads_along_hears_that_an_answer_stopped_and_can_go_on_with_it() {
    let (expected, tokens) = unbroken(|session| random(session, 7, json!({}))).await;
    let directory = Directory::new();
    let (server, gate) = gated(&directory, Some(Duration::ZERO), 6).await;
    let session = server.session(Settings::default());
    let mut stream = server.stream(CHAT, &random(&session, 7, json!({}))).await;
    next(&mut stream).await.unwrap();
    let mut along = read(&server, &session, 0).await;
    let mut first = vec![next(&mut along).await.unwrap()];
    drop(stream);
    loop {
        let (number, event) = along.numbered().await.unwrap();
        if let Some(error) = event.get("error") {
            assert_eq!(error["code"], "answer_interrupted");
            break;
        }
        first.push((number.unwrap(), event["choices"].clone()));
    }
    drop(gate);
    let last = first.last().unwrap().0;
    let second = rest(read(&server, &session, last).await).await;
    assert_eq!(both(first, second, last), expected);
    assert_eq!(server.turns(&session).concat(), tokens);
    server.stop().await;
}

#[tokio::test]
async fn a_client_of_a_whole_answer_that_leaves_finds_it_in_flight() {
    let directory = Directory::new();
    let (server, gate) = gated(&directory, Some(Duration::from_secs(3600)), 5).await;
    let session = server.session(Settings { durability: Durability::Ephemeral, ..Settings::default() });
    let body = random(&session, 1, json!({"stream": false}));
    let left = tokio::time::timeout(Duration::from_millis(50), server.post(CHAT, &body)).await;
    assert!(left.is_err(), "it was answered");
    free(&server, &session).await;
    assert_eq!(in_flight(&server, &session), Some(5));
    drop(gate);
    let events = rest(read(&server, &session, 0).await).await;
    let (expected, _) = unbroken(|session| random(session, 1, json!({}))).await;
    assert_eq!(events, expected);
    server.stop().await;
}

#[tokio::test]
async fn a_new_turn_discards_what_is_in_flight_and_another_model_cannot_go_on() {
    let directory = Directory::new();
    let (server, gate) = gated(&directory, Some(Duration::from_secs(3600)), 5).await;
    let session = server.session(Settings::default());
    let mut stream = server.stream(CHAT, &random(&session, 1, json!({}))).await;
    next(&mut stream).await.unwrap();
    drop(stream);
    free(&server, &session).await;
    drop(gate);
    server.stop().await;
    let server = start(Setup { weights: 1, ..with_store(&directory) }).await;
    let error = refused(&server, &session, 0).await.error(409);
    assert_eq!(error["code"], "model_changed");
    assert!(error["message"].as_str().unwrap().contains("weights"), "{error}");
    assert!(in_flight(&server, &session).is_some());
    let answer = server.post(CHAT, &turn(&session, json!({}))).await.ok();
    assert_eq!(in_flight(&server, &session), None);
    let again = read(&server, &session, 0).await.events().await;
    assert_eq!(joined(&again, 0), text(&answer));
    server.stop().await;
}

#[tokio::test]
async fn without_an_interval_nothing_is_in_flight() {
    let directory = Directory::new();
    let (server, gate) = gated(&directory, None, 5).await;
    let session = server.session(Settings::default());
    let mut stream = server.stream(CHAT, &random(&session, 1, json!({}))).await;
    next(&mut stream).await.unwrap();
    drop(stream);
    free(&server, &session).await;
    drop(gate);
    assert_eq!(in_flight(&server, &session), None);
    assert_eq!(refused(&server, &session, 0).await.error(404)["code"], "no_turns");
    server.stop().await;
}

#[tokio::test]
async fn a_device_that_fails_leaves_the_session_as_it_was() {
    for stream in [false, true] {
        let directory = Directory::new();
        let server = start(Setup { fail_every: Some(9), ..with_store(&directory) }).await;
        let session = server.session(Settings::default());
        let body = random(&session, 3, json!({"stream": stream}));
        if stream {
            let events = server.stream(CHAT, &body).await.events_until_error().await;
            assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
        } else {
            server.post(CHAT, &body).await.error(500);
        }
        free(&server, &session).await;
        assert_eq!((server.turns(&session).len(), in_flight(&server, &session)), (0, Some(8)));
        // It goes on from there, as often as it takes.
        let (expected, _) = unbroken(|session| random(session, 3, json!({}))).await;
        let events = loop {
            let events = read(&server, &session, 0).await.events_until_error().await;
            if events.last().unwrap().get("error").is_none() {
                break events;
            }
            free(&server, &session).await;
        };
        let text: String = expected.iter().filter_map(|(_, c)| c[0]["delta"]["content"].as_str()).collect();
        assert_eq!(joined(&events, 0), text);
        server.stop().await;
    }
}

#[tokio::test]
async fn text_held_back_to_the_end_comes_with_the_end() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let session = server.session(Settings::default());
    let letter = server.tokenizer.decode(&[36], mainstay_models::tokenizer::ShowSpecial::Yes);
    // Any text may be the beginning of the stop string, so none is shown before the end.
    let stop = letter.repeat(40) + "!";
    let body = random(&session, 0, json!({"logit_bias": {"36": 100}, "stop": stop, "max_tokens": 6}));
    let events = rest(server.stream(CHAT, &body).await).await;
    let numbers: Vec<usize> = events.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [0, 6]);
    let end = &events[1].1[0];
    assert_eq!(
        (&end["delta"]["content"], &end["finish_reason"]),
        (&json!(letter.repeat(6)), &json!("length"))
    );
    // Nobody can have had it before: it is there for a reader with any number.
    for after in [0, 3, 6] {
        let again = rest(read(&server, &session, after).await).await;
        assert_eq!(again.last(), events.last(), "after {after}");
    }
    server.stop().await;
}
