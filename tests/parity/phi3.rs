//! What only Phi 3 has: heads of which a part is rotated; and LongRoPE through the engine, where sequences that grow beyond
//! the first of a model's two rope tables draw the tokens that transformers draws, and from the switch on the bits of a
//! sequence that began beyond it.

use mainstay_backend_api::{Backend, Invariance, KvDType, KvLayout, Limits, PAGE_TOKENS};
use mainstay_engine::{EngineOptions, Event, Handle, Keep, Request, SamplingRequest, StopRule};
use mainstay_models::config::Config;
use mainstay_models::{Model, families};
use serde_json::Value;

use crate::harness::{Named, Rig, Rule, assert_same, backends};
use crate::{F32, fixture, open};

/// Drawn tokens with their log-probabilities as bits.
type Drawn = Vec<(u32, u32)>;

fn start(backend: &dyn Backend, model: &Model) -> Handle {
    let groups = KvLayout::of(&model.graph, KvDType::F32).groups.len();
    let limits = Limits {
        context: model.graph.context,
        tokens_per_step: 24,
        chunks: 8,
        output_rows: 8,
        pages: vec![64; groups],
        kv_dtype: KvDType::F32,
    };
    let executor = backend.load(&model.graph, &model.weights, &limits).unwrap_or_else(|e| panic!("{e}"));
    Handle::start(executor, EngineOptions::new(limits, 16, model.graph.vocab)).expect("a thread")
}

/// Greedy continuations of several prompts at once.
fn draw(handle: &Handle, prompts: &[(&[u32], usize)]) -> Vec<Drawn> {
    let submit = |&(prompt, count): &(&[u32], usize)| {
        let request = Request {
            tenant: "t".into(),
            prompt: prompt.to_vec(),
            drawn: Vec::new(),
            choices: 1,
            sampling: SamplingRequest::greedy(),
            stop: StopRule { max_tokens: count, ..StopRule::default() },
            logprobs: Some(0),
            prompt_logprobs: None,
            priority: 0,
            adapter: None,
            grammar: None,
            keep: Keep::default(),
        };
        handle.submit(request).expect("there is room")
    };
    let mut generations: Vec<_> = prompts.iter().map(submit).collect();
    let mut drawn = vec![Drawn::new(); prompts.len()];
    for (generation, drawn) in generations.iter_mut().zip(&mut drawn) {
        while let Some(event) = generation.events.blocking_recv() {
            match event {
                Event::Token { token, score, .. } => {
                    drawn.push((token, score.expect("scores were asked for").logprob.to_bits()));
                }
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
    }
    drawn
}

/// What transformers computed, of a file beside the checkpoint.
fn stored(name: &str) -> Vec<Value> {
    let path = fixture("phi3_longrope").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn heads_of_which_a_part_is_rotated_give_the_same_logits() {
    let dir = fixture("phi3_longrope");
    let model = open(&dir);
    let whole: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    for case in stored("partial.json") {
        let mut config = whole.clone();
        config["rope_parameters"] = case["rope_parameters"].clone();
        let config = Config::from_bytes(&dir, config.to_string().as_bytes()).unwrap();
        let graph = families::graph(&config).unwrap_or_else(|e| panic!("{e}"));
        let expected: Vec<f32> = serde_json::from_value(case["last_logits"].clone()).unwrap();
        let prompt = ids(&case["prompt"]);
        for Named { name, backend } in backends() {
            let mut rig = Rig::new(&*backend, &graph, &model.weights, KvDType::F32);
            let mut sequence = rig.open_for(prompt.len());
            let rows = rig.prefill(&mut sequence, &prompt, 50);
            let what = format!("{} on {name}", case["rope_parameters"]["rope_type"]);
            let last = &rows.logits[rows.logits.len() - 1..];
            assert_same(last, std::slice::from_ref(&expected), Rule::Within(F32), &what);
        }
    }
}

#[test]
fn a_sequence_that_outgrows_its_rope_table_goes_on_as_one_that_began_beyond_it() {
    let dir = fixture("phi3_longrope");
    let model = open(&dir);
    let cases: Vec<_> =
        stored("crossing.json").iter().map(|c| (ids(&c["prompt"]), ids(&c["greedy"]))).collect();
    let switch = model.graph.rope_switch.0.expect("it has two tables");
    for Named { name, backend } in backends() {
        let handle = start(&*backend, &model);
        let prompts: Vec<(&[u32], usize)> = cases.iter().map(|(p, g)| (&p[..], g.len())).collect();
        let crossing = draw(&handle, &prompts);
        for (i, ((prompt, greedy), crossing)) in cases.iter().zip(&crossing).enumerate() {
            let found: Vec<u32> = crossing.iter().map(|d| d.0).collect();
            assert_eq!(found, *greedy, "{name}, prompt {i} of {} tokens", prompt.len());
            // The same tokens given at once, without a token computed by the first table.
            let beyond = switch + 1 - prompt.len();
            let begun = [prompt, &greedy[..beyond]].concat();
            let fresh = start(&*backend, &model);
            let whole = draw(&fresh, &[(&begun, greedy.len() - beyond)]).remove(0);
            let tokens = |drawn: &[(u32, u32)]| drawn.iter().map(|d| d.0).collect::<Vec<u32>>();
            assert_eq!(tokens(&whole), tokens(&crossing[beyond..]), "{name}, prompt {i}");
            if handle.numeric_class().invariance == Invariance::Full {
                assert_eq!(whole, crossing[beyond..], "{name}, prompt {i}: not the same bits");
            }
        }
        let stats = handle.stats();
        assert_eq!(stats.preemptions, 0);
        assert!(
            begun_pages_are_kept(&handle, &cases[0].0),
            "{name}: the first table's pages are of use to others"
        );
    }
}

/// Whether a short sequence finds the full page that one which has crossed began with.
fn begun_pages_are_kept(handle: &Handle, prompt: &[u32]) -> bool {
    let before = handle.stats().cached_tokens;
    draw(handle, &[(prompt, 1)]);
    handle.stats().cached_tokens - before == (prompt.len() / PAGE_TOKENS * PAGE_TOKENS) as u64
}
