//! The built-in model, through the engine: conversations with facts that it has never seen, told and asked back.

use std::sync::Arc;

use mainstay_backend_api::{Backend, KvDType, KvLayout, Limits};
use mainstay_backend_cpu::{CpuBackend, CpuOptions};
use mainstay_engine::{
    EngineOptions, Event, FinishReason, Generation, Handle, Keep, Request, SamplingRequest, StopRule,
};
use mainstay_models::Model;
use mainstay_models::template::Conversation;
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial};
use serde_json::{Value, json};

/// The model's card promises this share of right answers over all probes.
const RECALL_MIN: f64 = 0.95;
const ANSWER_TOKENS_MAX: usize = 64;
const CONTEXT: usize = 2048;

/// A conversation: what the user says turn by turn, and what the last answer must contain.
struct Probe {
    kind: String,
    turns_between: u64,
    messages: Vec<String>,
    expect: String,
}

fn probes() -> Vec<Probe> {
    let text = include_str!("../models/default/eval/probes.json");
    let list: Vec<Value> = serde_json::from_str(text).expect("probes.json is a list");
    let word = |probe: &Value, key: &str| probe[key].as_str().expect("a string").to_owned();
    list.iter()
        .map(|probe| Probe {
            kind: word(probe, "kind"),
            turns_between: probe["turns_between"].as_u64().expect("a count"),
            messages: probe["messages"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|m| m.as_str().expect("text").into())
                .collect(),
            expect: word(probe, "expect"),
        })
        .collect()
}

fn engine(model: &Model) -> Handle {
    let layout = KvLayout::of(&model.graph, KvDType::BF16);
    let limits = Limits {
        context: CONTEXT,
        tokens_per_step: 512,
        chunks: 128,
        output_rows: 128,
        pages: vec![4096; layout.groups.len()],
        kv_dtype: KvDType::BF16,
    };
    let backend = CpuBackend::new(CpuOptions { threads: None, isa: None }).expect("this processor");
    let executor = backend.load(&model.graph, &model.weights, &limits).expect("the built-in model loads");
    Handle::start(executor, EngineOptions::new(limits, 1024, model.graph.vocab)).expect("a thread")
}

/// Sends a conversation; the answer follows by [`answer`].
fn ask(model: &Model, handle: &Handle, messages: &[Value]) -> Generation {
    let template = model.template.as_ref().expect("the built-in model chats");
    let conversation = Conversation { messages, tools: None, add_generation_prompt: true, kwargs: None };
    let text = template.render(&conversation).expect("plain messages");
    let request = Request {
        tenant: Arc::from("default"),
        prompt: model.tokenizer.encode(&text, AddSpecial::No).expect("plain text"),
        choices: 1,
        sampling: SamplingRequest::greedy(),
        stop: StopRule { max_tokens: ANSWER_TOKENS_MAX, tokens: model.generation.eos.clone(), min_tokens: 0 },
        logprobs: None,
        prompt_logprobs: None,
        priority: 0,
        adapter: None,
        grammar: None,
        drawn: Vec::new(),
        keep: Keep::default(),
    };
    handle.submit(request).expect("room for all probes")
}

fn answer(model: &Model, mut generation: Generation) -> String {
    let mut tokens = Vec::new();
    loop {
        match generation.events.blocking_recv().expect("an end") {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished { reason: FinishReason::Stop(_) | FinishReason::Length, .. } => break,
            Event::Started { .. } => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    model.tokenizer.decode(&tokens, ShowSpecial::No)
}

/// All last answers; the model's own earlier answers are the history.
fn play(model: &Model, handle: &Handle, probes: &[Probe]) -> Vec<String> {
    let mut histories: Vec<Vec<Value>> = probes.iter().map(|_| Vec::new()).collect();
    let mut answers = vec![String::new(); probes.len()];
    for turn in 0..probes.iter().map(|p| p.messages.len()).max().unwrap_or(0) {
        let mut asked = Vec::new();
        for (i, probe) in probes.iter().enumerate() {
            if let Some(message) = probe.messages.get(turn) {
                histories[i].push(json!({"role": "user", "content": message}));
                asked.push((i, ask(model, handle, &histories[i])));
            }
        }
        for (i, generation) in asked {
            answers[i] = answer(model, generation);
            histories[i].push(json!({"role": "assistant", "content": answers[i]}));
        }
    }
    answers
}

#[test]
fn facts_told_earlier_are_recalled() {
    let model = Model::embedded().expect("the built-in model");
    let handle = engine(&model);
    let probes = probes();
    for kind in ["name", "colour", "city"] {
        assert!(probes.iter().any(|p| p.kind == kind && p.turns_between >= 3), "no far probe of a {kind}");
    }
    assert!(probes.len() >= 200, "{} probes", probes.len());
    let answers = play(&model, &handle, &probes);
    let wrong: Vec<String> = probes
        .iter()
        .zip(&answers)
        .filter(|(probe, answer)| !answer.contains(&probe.expect))
        .map(|(probe, answer)| {
            format!("{} after {}: {:?} in {answer:?}", probe.kind, probe.turns_between, probe.expect)
        })
        .collect();
    let share = 1.0 - wrong.len() as f64 / probes.len() as f64;
    assert!(share >= RECALL_MIN, "recalled {share:.3} of {} facts; not:\n{}", probes.len(), wrong.join("\n"));
    // A model that answers everything with everything would pass the above.
    let untold = ask(&model, &handle, &[json!({"role": "user", "content": "What is my name?"})]);
    let untold = answer(&model, untold);
    assert!(probes.iter().filter(|p| p.kind == "name").all(|p| !untold.contains(&p.expect)), "{untold:?}");
}
