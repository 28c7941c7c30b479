//! Parity with Hugging Face transformers: stored logits and greedy tokens of small seeded checkpoints.

mod embeddings;
mod formats;
#[path = "../harness/mod.rs"]
#[expect(dead_code, reason = "parity copies and moves no pages")]
mod harness;
mod phi3;
mod reference;

use std::path::{Path, PathBuf};

use harness::{Named, Rig, Rows, Rule, assert_same, backends};
use mainstay_backend_api::{Backend, KvDType};
use mainstay_models::tokenizer::ShowSpecial;
use mainstay_models::weights::DType;
use mainstay_models::{LoadError, Model, Weights};
use reference::{Prompt, fixture, prompts, shared};

/// Largest difference of a logit computed in f32 from transformers' f32. The logits' standard deviation is about 5;
/// every feature of a family, left out, moves one by 2e-3 or more.
const F32: f32 = 5e-4;
/// Largest difference between two batchings of the same tokens in f32 on a backend that does not promise bits.
const REBATCHED: f32 = 1e-4;
/// With keys and values in bf16, greedy tokens must agree where the best logit leads by this much.
const BF16_MARGIN: f32 = 1.0;
/// With activations in 8 bits they must where it leads by this much, 0.3 of the logits' standard deviation.
const BLOCKS_MARGIN: f32 = 1.5;

const FAMILIES: [&str; 13] = include!("../fixtures/families.rs");

fn each(test: impl Fn(&dyn Backend, &str, &Model, &[Prompt])) {
    for family in FAMILIES {
        let dir = fixture(family);
        let (model, prompts) = (open(&dir), prompts(&dir));
        for Named { name, backend } in backends() {
            let what = format!("{family} on {}", name);
            test(&*backend, &what, &model, &prompts);
        }
    }
}

fn open(dir: &Path) -> Model {
    Model::open(dir).unwrap_or_else(|e| panic!("{e}"))
}

/// The token that the last row predicts.
fn next(rows: &Rows) -> u32 {
    *rows.tokens.last().expect("a chunk has a row")
}

fn rig(backend: &dyn Backend, model: &Model, kv: KvDType) -> Rig {
    Rig::new(backend, &model.graph, &model.weights, kv)
}

/// Every stored logit and every greedy token of one prompt; the largest difference of a logit.
fn assert_parity(rig: &mut Rig, prompt: &Prompt, what: &str) -> f32 {
    let mut sequence = rig.open_for(prompt.ids.len());
    let rows = rig.step(&mut [(&mut sequence, &prompt.ids)]).remove(0);
    let difference = assert_prompt(&rows, prompt, what);
    let mut row = rows;
    let mut greedy = vec![next(&row)];
    while greedy.len() < prompt.greedy.len() {
        row = rig.step(&mut [(&mut sequence, &[next(&row)])]).remove(0);
        greedy.push(next(&row));
    }
    assert_eq!(greedy, prompt.greedy, "{what}: greedy tokens");
    let last = std::slice::from_ref(&prompt.final_logits);
    assert_same(&row.logits, last, Rule::Within(F32), &format!("{what}, final logits"));
    rig.close(sequence);
    difference.max(harness::difference(&row.logits, last).0)
}

/// The stored logits of the prompt itself; the largest difference.
fn assert_prompt(rows: &Rows, prompt: &Prompt, what: &str) -> f32 {
    let (last, expected) = (&rows.logits[rows.logits.len() - 1..], std::slice::from_ref(&prompt.last_logits));
    assert_same(last, expected, Rule::Within(F32), &format!("{what}, last logits"));
    let difference = harness::difference(last, expected).0;
    let Some(all) = &prompt.all_logits else { return difference };
    assert_same(&rows.logits, all, Rule::Within(F32), &format!("{what}, all logits"));
    difference.max(harness::difference(&rows.logits, all).0)
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    each(|backend, what, model, prompts| {
        let mut rig = rig(backend, model, KvDType::F32);
        for (i, prompt) in prompts.iter().enumerate() {
            assert_parity(&mut rig, prompt, &format!("{what}, prompt {i}"));
        }
    });
}

#[test]
fn a_prompt_in_chunks_gives_the_same_logits() {
    each(|backend, what, model, prompts| {
        let mut rig = rig(backend, model, KvDType::F32);
        for (i, prompt) in prompts.iter().enumerate() {
            let mut whole = rig.open_for(prompt.ids.len());
            let expected = rig.prefill(&mut whole, &prompt.ids, prompt.ids.len());
            for chunk in [1, 7, 32] {
                let what = format!("{what}, prompt {i} in chunks of {chunk}");
                let mut sequence = rig.open_for(prompt.ids.len());
                let rows = rig.prefill(&mut sequence, &prompt.ids, chunk);
                assert_prompt(&rows, prompt, &what);
                assert_same(&rows.logits, &expected.logits, Rule::of(&rig, REBATCHED), &what);
                rig.close(sequence);
            }
            rig.close(whole);
        }
    });
}

#[test]
fn all_prompts_in_one_step_give_the_same_logits() {
    each(|backend, what, model, prompts| {
        let mut rig = rig(backend, model, KvDType::F32);
        let mut sequences: Vec<_> = prompts.iter().map(|p| rig.open_for(p.ids.len())).collect();
        let ids = prompts.iter().map(|p| &p.ids[..]);
        let mut rows = rig.step(&mut sequences.iter_mut().zip(ids).collect::<Vec<_>>());
        for (i, (rows, prompt)) in rows.iter().zip(prompts).enumerate() {
            let what = format!("{what}, prompt {i} among all");
            assert_prompt(rows, prompt, &what);
            let mut alone = rig.open_for(prompt.ids.len());
            let expected = rig.prefill(&mut alone, &prompt.ids, prompt.ids.len());
            assert_same(&rows.logits, &expected.logits, Rule::of(&rig, REBATCHED), &what);
            rig.close(alone);
        }
        let mut greedy: Vec<Vec<u32>> = rows.iter().map(|r| vec![next(r)]).collect();
        for _ in 1..prompts[0].greedy.len() {
            let last: Vec<[u32; 1]> = rows.iter().map(|r| [next(r)]).collect();
            rows = rig.step(&mut sequences.iter_mut().zip(last.iter().map(|t| &t[..])).collect::<Vec<_>>());
            greedy.iter_mut().zip(&rows).for_each(|(g, r)| g.push(next(r)));
        }
        for (i, (greedy, prompt)) in greedy.iter().zip(prompts).enumerate() {
            assert_eq!(*greedy, prompt.greedy, "{what}, prompt {i} among all: greedy tokens");
        }
    });
}

/// Feeds the stored greedy tokens and compares each prediction whose margin is wide enough.
fn assert_greedy_where_clear(rig: &mut Rig, prompt: &Prompt, clear: f32, what: &str) -> usize {
    let fed: Vec<u32> = prompt.ids.iter().chain(&prompt.greedy).copied().collect();
    let mut sequence = rig.open_for(prompt.ids.len());
    let rows = rig.prefill(&mut sequence, &fed[..fed.len() - 1], 40);
    rig.close(sequence);
    let found = &rows.tokens[prompt.ids.len() - 1..];
    let mut compared = 0;
    for (i, ((&found, &expected), &margin)) in
        found.iter().zip(&prompt.greedy).zip(&prompt.margins).enumerate()
    {
        if margin > clear {
            assert_eq!(found, expected, "{what}: greedy token {i}, whose margin is {margin}");
            compared += 1;
        }
    }
    compared
}

#[test]
fn with_bf16_keys_and_values_greedy_tokens_agree_where_the_margin_is_wide() {
    each(|backend, what, model, prompts| {
        let mut rig = rig(backend, model, KvDType::BF16);
        let compared = prompts.iter().enumerate().map(|(i, prompt)| {
            let what = format!("{what}, prompt {i}, bf16 keys and values");
            assert_greedy_where_clear(&mut rig, prompt, BF16_MARGIN, &what)
        });
        let (compared, all) = (compared.sum::<usize>(), prompts.len() * prompts[0].greedy.len());
        // Gemma 2's cap of logits presses all margins together.
        assert!(compared * 10 > all, "{what}: only {compared} of {all} tokens have a wide margin");
    });
}

/// Whether a backend computes with the integers of blocks, so that logits are not those of the numbers they stand for.
fn uses_blocks(backend: &str, weights: &Weights) -> bool {
    let is_block = |name: &str| weights.tensor(name).is_ok_and(|t| DType::BLOCKS.contains(&t.dtype));
    backend.starts_with("cpu") && weights.names().any(is_block)
}

/// Greedy tokens of all prompts, where they are clear.
fn assert_blocks(rig: &mut Rig, prompts: &[Prompt], what: &str) {
    let compared =
        prompts.iter().map(|p| assert_greedy_where_clear(rig, p, BLOCKS_MARGIN, what)).sum::<usize>();
    let all = prompts.len() * prompts[0].greedy.len();
    assert!(compared * 10 > all, "{what}: only {compared} of {all} tokens have a wide margin");
}

#[test]
fn experts_in_mxfp4_are_those_of_transformers() {
    let dir = fixture("gpt_oss_mxfp4");
    let (model, prompts) = (open(&dir), prompts(&dir));
    for Named { name, backend } in backends() {
        let (what, mut rig) = (format!("mxfp4 on {name}"), rig(&*backend, &model, KvDType::F32));
        if uses_blocks(&name, &model.weights) {
            assert_blocks(&mut rig, &prompts, &what);
        } else {
            prompts.iter().for_each(|prompt| _ = assert_parity(&mut rig, prompt, &what));
        }
    }
}

/// Folders of checkpoints under `dir` whose family is known.
fn known(dir: &Path) -> Vec<(PathBuf, Model)> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|e| e.unwrap().path())
        .collect();
    folders.sort();
    folders.retain(|f| f.join("expected.safetensors").exists());
    let opened = folders.into_iter().filter_map(|folder| match Model::open(&folder) {
        // Encoders are compared in another file.
        Ok(model) => model.graph.generates().then_some((folder, model)),
        Err(LoadError::UnknownFamily { .. }) => None,
        Err(e) => panic!("{e}"),
    });
    opened.collect()
}

/// Prints the rows of the table in docs/models.md.
#[test]
#[expect(clippy::print_stdout, reason = "what was measured is shown with --nocapture")]
fn every_known_family_of_the_shared_reference_agrees() {
    let Some(dir) = shared("reference") else { return };
    let known = known(&dir);
    assert!(known.len() >= FAMILIES.len(), "only {} families are known", known.len());
    for (folder, model) in known {
        let prompts = prompts(&folder);
        // The same numbers stored otherwise: as bf16, or in several files. Computed in f32 they give the same logits.
        for stored in [folder.clone(), folder.join("bf16"), folder.join("sharded")] {
            if !stored.is_dir() {
                continue;
            }
            let weights = Weights::open_dir(&stored).unwrap_or_else(|e| panic!("{e}"));
            for Named { name, backend } in backends() {
                let mut rig = Rig::new(&*backend, &model.graph, &weights, KvDType::F32);
                if uses_blocks(&name, &weights) {
                    assert_blocks(&mut rig, &prompts, &format!("{} on {name}", stored.display()));
                    continue;
                }
                let mut worst = 0.0_f32;
                for (i, prompt) in prompts.iter().enumerate() {
                    let what = format!("{} on {}, prompt {i}", stored.display(), name);
                    worst = worst.max(assert_parity(&mut rig, prompt, &what));
                }
                println!("{} on {name}: {worst:.1e}", stored.display());
            }
        }
    }
}

#[test]
fn a_trained_model_tells_its_published_stories() {
    /// Below this margin rounding may choose another token, and the rest of the story with it.
    const CLEAR: f32 = 0.01;
    let Some(dir) = shared("real/stories260K") else { return };
    let model = open(&dir.join("hf"));
    let json = std::fs::read(dir.join("expected.json")).unwrap();
    let published: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let prompts = prompts(&dir);
    assert_eq!(prompts.len(), 5);
    for Named { name, backend } in backends() {
        let mut rig = rig(&*backend, &model, KvDType::F32);
        for (i, prompt) in prompts.iter().enumerate() {
            let what = format!("story {i} on {}", name);
            let mut sequence = rig.open();
            let mut told = vec![next(&rig.prefill(&mut sequence, &prompt.ids, 512))];
            while told.len() < prompt.greedy.len() {
                let last = [told[told.len() - 1]];
                told.push(next(&rig.step(&mut [(&mut sequence, &last)])[0]));
            }
            rig.close(sequence);
            let clear = prompt.margins.iter().position(|&m| m < CLEAR).unwrap_or(prompt.margins.len());
            assert_eq!(told[..clear], prompt.greedy[..clear], "{what}");
            let ids: Vec<u32> = prompt.ids.iter().chain(&told[..clear]).copied().collect();
            let (text, whole) = (model.tokenizer.decode(&ids, ShowSpecial::No), &published[i]["text"]);
            let whole = whole.as_str().expect("a text");
            assert!(whole.starts_with(text.trim_start()), "{what}: told\n{text}\npublished\n{whole}");
            assert!(clear < prompt.margins.len() || whole == text.trim_start(), "{what}: the end is missing");
        }
    }
}
