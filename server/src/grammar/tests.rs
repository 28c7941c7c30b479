//! Constraints against the built-in vocabulary: random answers fit, hostile constraints end soon; and what masks cost.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mainstay_engine::Masker;
use mainstay_models::tokenizer::{AddSpecial, ShowSpecial, Tokenizer};
use serde_json::{Value, json};

use super::compile::compile;
use super::*;

/// A number that stands for the end of a text.
const END: u32 = 1 << 20;

fn default_tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/default/tokenizer.json")
}

fn load(path: &Path) -> (Tokenizer, Arc<Vocabulary>) {
    let tokenizer = Tokenizer::from_bytes(path, &std::fs::read(path).unwrap()).unwrap();
    let vocabulary = Vocabulary::of(&tokenizer, tokenizer.vocab_len()).unwrap();
    (tokenizer, Arc::new(vocabulary))
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A random answer of at most so many tokens, and how long each mask took.
struct Walk {
    ids: Vec<u32>,
    has_ended: bool,
    masks: Vec<Duration>,
}

fn walk(masker: &mut dyn Masker, mut seed: u64, most: usize) -> Result<Walk, String> {
    let mut walk = Walk { ids: Vec::new(), has_ended: false, masks: Vec::new() };
    let mut mask = Vec::new();
    while walk.ids.len() < most {
        let drawn = walk.ids.last().map_or(&[][..], std::slice::from_ref);
        let begun = Instant::now();
        masker.advance(drawn, &mut mask)?;
        walk.masks.push(begun.elapsed());
        let bits = mask.iter().enumerate();
        let ids: Vec<u32> = bits
            .flat_map(|(at, word)| {
                (0..32).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at as u32 * 32 + bit)
            })
            .collect();
        match ids.get((random(&mut seed) % ids.len().max(1) as u64) as usize) {
            Some(&END) | None => {
                walk.has_ended = true;
                return Ok(walk);
            }
            Some(id) => walk.ids.push(*id),
        }
    }
    Ok(walk)
}

fn start(constraint: impl Into<Wanted>, vocabulary: &Arc<Vocabulary>) -> Result<Box<dyn Masker>, String> {
    let compiled = compile(constraint.into(), Arc::clone(vocabulary))?;
    Ok(compiled.grammar(vec![END]).start())
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    String::from_utf8(ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).collect()).unwrap()
}

#[test]
fn a_constraint_begins_after_its_marker() {
    let (tokenizer, vocabulary) = load(&default_tokenizer());
    let choices = || Constraint::Choice(vec!["yes".to_owned(), "no".to_owned()]);
    let special = (0..tokenizer.vocab_len() as u32).find(|id| tokenizer.is_special(*id)).unwrap();
    let special_text = String::from_utf8(tokenizer.token_bytes(special).unwrap()).unwrap();
    for marker in ["</think>", &special_text] {
        let wanted = Wanted { constraint: choices(), after: Some(marker.to_owned()) };
        let mut masker = start(wanted, &vocabulary).unwrap();
        let thought = tokenizer.encode("It is {so}. </thin", AddSpecial::No).unwrap();
        let end = tokenizer.encode(marker, AddSpecial::No).unwrap();
        let mut mask = Vec::new();
        for id in thought.iter().chain(&end) {
            masker.advance(&[], &mut mask).unwrap();
            assert!(mask[*id as usize / 32] >> (id % 32) & 1 == 1, "{marker}: {id}");
            assert!(mask.len() <= END as usize / 32, "{marker}: it may end before the marker");
            masker.advance(&[*id], &mut mask).unwrap();
        }
        let rest = walk(&mut *masker, 3, 20).unwrap();
        assert!(["yes", "no"].contains(&text(&tokenizer, &rest.ids).as_str()) && rest.has_ended, "{marker}");
    }
}

/// Also where a vocabulary spells unknown characters byte by byte, or a space as part of the next word.
#[test]
fn what_is_drawn_decodes_to_what_fits() {
    let fixtures =
        ["llama", "mistral", "qwen2", "qwen3"].map(|name| format!("../tests/fixtures/{name}/tokenizer.json"));
    for name in fixtures.iter().map(String::as_str).chain(["../models/default/tokenizer.json"]) {
        let (tokenizer, vocabulary) = load(&Path::new(env!("CARGO_MANIFEST_DIR")).join(name));
        let text = "na\u{ef}ve \u{65e5}\u{672c}\u{8a9e} \u{1f980} \"quoted\" a\\b";
        let schema = json!({"type": "object", "properties": {"fixed": {"const": text}, "free": {"type": "string",
            "maxLength": 9}}, "required": ["fixed", "free"], "additionalProperties": false});
        let compiled = compile(Constraint::JsonSchema(schema).into(), Arc::clone(&vocabulary)).unwrap();
        let grammar = compiled.grammar(vec![END]);
        for seed in 0..40 {
            let walk = walk(&mut *grammar.start(), seed, 500).unwrap();
            assert!(walk.has_ended, "{name}");
            let decoded = tokenizer.decode(&walk.ids, ShowSpecial::No);
            let value: Value =
                serde_json::from_str(&decoded).unwrap_or_else(|e| panic!("{name}: {e}: {decoded:?}"));
            assert_eq!(value["fixed"], text, "{name}");
            assert!(
                value["free"].as_str().is_some_and(|text| text.chars().count() <= 9),
                "{name}: {decoded}"
            );
        }
    }
}

#[test]
fn special_tokens_are_no_text() {
    let (tokenizer, vocabulary) = load(&default_tokenizer());
    let mut masker = start(Constraint::Regex("(.|\n)*".to_owned()), &vocabulary).unwrap();
    let mut mask = Vec::new();
    masker.advance(&[], &mut mask).unwrap();
    let allowed = |id: u32| mask[id as usize / 32] >> (id % 32) & 1 == 1;
    let ids = 0..tokenizer.vocab_len() as u32;
    assert!(ids.clone().filter(|id| allowed(*id)).count() > tokenizer.vocab_len() / 2);
    assert!(!ids.clone().any(|id| allowed(id) && tokenizer.is_special(id)));
    // A grammar may name them.
    let special = ids.clone().find(|id| tokenizer.is_special(*id)).unwrap();
    let mut masker = start(Constraint::Lark(format!("start: \"a\" <[{special}]>\n")), &vocabulary).unwrap();
    let walk = walk(&mut *masker, 1, 9).unwrap();
    assert_eq!(walk.ids.last(), Some(&special));
}

/// Constraints that are meant to cost much.
fn hostile() -> Vec<(&'static str, Constraint)> {
    let schema = Constraint::JsonSchema;
    let chain = |n: usize| {
        let mut defs = serde_json::Map::new();
        for i in 0..n {
            defs.insert(format!("a{i}"), json!({"$ref": format!("#/$defs/a{}", i + 1)}));
        }
        defs.insert(format!("a{n}"), json!({"type": "boolean"}));
        json!({"$defs": defs, "$ref": "#/$defs/a0"})
    };
    let product = |n: usize| {
        let either = |i: usize| json!({"anyOf": [{"minLength": i}, {"maxLength": 900 + i}, {"pattern": format!("x{i}")}]});
        json!({"type": "string", "allOf": (0..n).map(either).collect::<Vec<Value>>()})
    };
    let rules: String = (0..15_000).map(|i| format!("a{i}: a{}\n", i + 1)).collect();
    let many = (0..9000).map(|i| format!("text number {i}")).collect();
    vec![
        ("a chain of references", schema(chain(5000))),
        (
            "references in a circle",
            schema(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        ),
        ("a product of alternatives", schema(product(12))),
        ("a long string", schema(json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000}))),
        ("a long array", schema(json!({"type": "array", "items": {"type": "null"}, "minItems": 1_000_000}))),
        ("a fine grid", schema(json!({"type": "number", "multipleOf": 0.000_000_001, "minimum": 0}))),
        ("many texts", Constraint::Choice(many)),
        ("powers", Constraint::Regex("(((a{1,900}){1,900}){1,900}b)*".to_owned())),
        ("a wide automaton", Constraint::Regex("(a|b)*a(a|b){60}c".to_owned())),
        ("a chain of rules", Constraint::Lark(format!("start: a0\n{rules}a15000: \"x\"\n"))),
        ("ambiguity", Constraint::Lark("start: start start | start start start | \"a\"\n".to_owned())),
        (
            "overlapping words",
            Constraint::Lark(
                "start: (A | B | C)*\nA: /[a-z]{1,200}/\nB: /[a-m]{1,300}[n-z]/\nC: /([a-z]{3}){1,99}!/\n"
                    .to_owned(),
            ),
        ),
    ]
}

#[test]
fn hostile_constraints_end_soon() {
    let (_, vocabulary) = load(&default_tokenizer());
    let unserved = ["references in a circle", "a product of alternatives"];
    for (name, constraint) in hostile() {
        let begun = Instant::now();
        let outcome = start(constraint, &vocabulary).and_then(|mut masker| walk(&mut *masker, 1, 60));
        let took = begun.elapsed();
        // Most of these are only large, and are served.
        assert!(outcome.is_ok() || unserved.contains(&name), "{name}: {:?}", outcome.as_ref().err());
        assert!(took < Duration::from_secs(30), "{name}: {took:?}");
        if let Err(message) = outcome {
            assert!(message.len() <= 400, "{name}: {message}");
        }
    }
}

/// What docs/structured-output.md tells. `TOKENIZER=path/tokenizer.json` names another vocabulary.
#[test]
#[ignore = "measures"]
#[expect(clippy::print_stdout, reason = "it is run for what it prints")]
fn what_masks_cost() {
    let path = std::env::var_os("TOKENIZER").map_or_else(default_tokenizer, PathBuf::from);
    let begun = Instant::now();
    let (tokenizer, vocabulary) = load(&path);
    let loaded = begun.elapsed();
    drop(Vocabulary::of(&tokenizer, tokenizer.vocab_len()).unwrap());
    let sorted = begun.elapsed() - loaded;
    println!("{} tokens, sorted in {sorted:?}", tokenizer.vocab_len());
    let person = json!({"type": "object", "required": ["name", "age", "tags"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0,
        "maximum": 150}, "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5}}});
    for (name, constraint) in [
        ("json_object", Constraint::JsonObject),
        ("json_schema", Constraint::JsonSchema(person)),
        ("regex", Constraint::Regex(r"[A-Z][a-z]+ (\d{1,3}\.){3}\d{1,3}".to_owned())),
        ("choice of 1000", Constraint::Choice((0..1000).map(|i| format!("choice {i}")).collect())),
        ("lark", Constraint::Lark("start: sum\nsum: product (\"+\" product)*\nproduct: NUMBER (\"*\" NUMBER)*\nNUMBER: /[0-9]{1,9}/\n".to_owned())),
    ] {
        let begun = Instant::now();
        let compiled = compile(constraint.into(), Arc::clone(&vocabulary)).unwrap();
        let took = begun.elapsed();
        let grammar = compiled.grammar(vec![END]);
        let walks = (0..20).map(|seed| walk(&mut *grammar.start(), seed, 100).unwrap());
        let mut masks: Vec<Duration> = walks.flat_map(|walk| walk.masks).collect();
        masks.sort_unstable();
        let at = |share: usize| masks[(masks.len() - 1) * share / 100];
        println!("{name}: compiled in {took:?}; {} masks, median {:?}, 95 of 100 below {:?}, longest {:?}",
            masks.len(), at(50), at(95), at(100));
    }
}
