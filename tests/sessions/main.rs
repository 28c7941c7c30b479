//! Exactness of sessions: however a session was interrupted, its next turn has the tokens, the logits and the keys
//! and values, bit for bit, of one that never was.

mod control;
mod world;

use std::path::{Path, PathBuf};

use mainstay_backend_api::{KvDType, KvLayout};
use mainstay_engine::store::object::{Acquire, ObjectOptions, ObjectTier, Takeover};
use mainstay_engine::store::{At, ImportAs, SessionId};
use mainstay_models::Model;
use world::{Answer, Scratch, Shape, TENANT, World};

/// Fixtures; every layer of Mistral's has a window of 12.
const FAMILIES: [&str; 4] = ["llama", "qwen2", "qwen3", "mistral"];
/// Windows of the upper layer of a model whose lower one sees all: shorter than a page, as long, and longer.
const WINDOWS: [usize; 3] = [20, 32, 40];
/// Tokens of the first answer, and of the second.
const ANSWERS: (usize, usize) = (8, 12);
/// Computed tokens after the first turn: around a page border, and in the middle of a page.
const LENGTHS: [usize; 4] = [63, 64, 65, 80];

/// How the engine under test works.
const TESTED: Shape =
    Shape { threads: 2, tokens_per_step: 40, pages: 16, kv_dtype: KvDType::F32, wrap: |inner| inner };
/// How the unbroken one does: nothing of this may change a bit.
const UNBROKEN: Shape = Shape { threads: 1, tokens_per_step: 512, ..TESTED };

/// What a session came to.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    answer: Answer,
    pages: Vec<Vec<u8>>,
}

/// One conversation: what is sent in its two turns.
struct Case<'a> {
    model: &'a Model,
    first: Vec<u32>,
    second: Vec<u32>,
    shape: Shape,
}

impl Case<'_> {
    fn open(&self, dir: &Scratch) -> World {
        World::open(self.model, dir, self.shape)
    }

    fn begin(&self, dir: &Scratch) -> (World, SessionId) {
        let mut world = self.open(dir);
        let session = world.create();
        world.turn(session, &self.first, ANSWERS.0);
        (world, session)
    }

    fn go_on(&self, mut world: World, session: SessionId) -> Outcome {
        let answer = world.turn(session, &self.second, ANSWERS.1);
        let pages = world.pages(session);
        world.close();
        Outcome { answer, pages }
    }

    /// As [`Case::go_on`], and proves that pages were read back.
    fn restore(&self, mut world: World, session: SessionId, least: usize) -> Outcome {
        let answer = world.turn(session, &self.second, ANSWERS.1);
        let kv = world.last.expect("it began");
        assert!(kv.restored_tokens >= least, "expected {least} tokens to be read back: {kv:?}");
        let pages = world.pages(session);
        world.close();
        Outcome { answer, pages }
    }

    /// Computed tokens of the first turn: its last token has no keys and values.
    fn computed(&self) -> usize {
        self.first.len() + ANSWERS.0 - 1
    }

    /// The second turn on these tokens, computed from nothing in another way.
    fn unbroken(&self, history: &[u32]) -> Outcome {
        let dir = Scratch::new();
        let mut world = World::open(self.model, &dir, Shape { kv_dtype: self.shape.kv_dtype, ..UNBROKEN });
        let session = world.create();
        let answer = world.turn(session, &[history, &self.second].concat(), ANSWERS.1);
        assert_eq!(world.last.map(|kv| kv.cached_tokens), Some(0));
        let pages = world.pages(session);
        world.close();
        Outcome { answer, pages }
    }

    fn history(&self) -> Vec<u32> {
        let (world, session) = self.begin(&Scratch::new());
        let tenant = world.store.tenant(TENANT).unwrap().id;
        world.store.tokens(tenant, session).unwrap()
    }
}

type Scenario = (&'static str, fn(&Case<'_>) -> Outcome);

const SCENARIOS: [Scenario; 6] = [
    ("in memory", |case| {
        let dir = Scratch::new();
        let (world, session) = case.begin(&dir);
        case.go_on(world, session)
    }),
    ("restart", |case| {
        let dir = Scratch::new();
        let (world, session) = case.begin(&dir);
        world.close();
        case.restore(case.open(&dir), session, case.computed())
    }),
    ("kill -9", |case| {
        let dir = Scratch::new();
        let (world, session) = case.begin(&dir);
        world.kill();
        case.restore(case.open(&dir), session, case.computed())
    }),
    ("evict and restore", |case| {
        let dir = Scratch::new();
        let (mut world, session) = case.begin(&dir);
        // Others take every page of the device.
        let len = world.handle.limits().context - 8;
        for salt in 0..2 {
            world.generate(&tokens(case.model, len, 100 + salt), 1);
        }
        case.restore(world, session, case.computed())
    }),
    ("export and import", |case| {
        let (from, to) = (Scratch::new(), Scratch::new());
        let (world, session) = case.begin(&from);
        let tenant = world.store.tenant(TENANT).unwrap().id;
        let mut bundle = Vec::new();
        world.store.export(tenant, session, Some(world.export_pages(session)), &mut bundle).unwrap();
        world.close();
        let world = case.open(&to);
        let (own, pages) =
            (world.store.tenant(TENANT).unwrap(), world.handle.import_pages(TENANT, None).unwrap());
        let imported = world.store.import(&own, &mut &bundle[..], ImportAs::default(), pages).unwrap();
        assert_eq!(imported.pages_refused, 0);
        world.store.flush().unwrap();
        case.restore(world, imported.session.id, case.computed())
    }),
    ("move through an object store", |case| {
        let (from, to, place) = (Scratch::new(), Scratch::new(), Scratch::new());
        std::fs::create_dir_all(&place.0).unwrap();
        let tier =
            ObjectTier::open(&format!("file://{}", place.0.display()), ObjectOptions::default()).unwrap();
        let (world, session) = case.begin(&from);
        let tenant = world.store.tenant(TENANT).unwrap().id;
        tier.release(&world.store, tenant, session, Some(world.export_pages(session))).unwrap();
        world.close();
        let world = case.open(&to);
        let (own, pages) =
            (world.store.tenant(TENANT).unwrap(), world.handle.import_pages(TENANT, None).unwrap());
        let acquire = Acquire { pages, takeover: Takeover::No };
        let acquired = tier.acquire(&world.store, &own, session, acquire).unwrap();
        assert_eq!(acquired.pages_missed, 0);
        world.store.flush().unwrap();
        case.restore(world, session, case.computed())
    }),
];

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

fn model(family: &str) -> Model {
    Model::open(&fixture(family)).unwrap_or_else(|e| panic!("{e}"))
}

/// Qwen 2's fixture, whose upper layer sees so many tokens.
fn windowed(window: usize) -> Model {
    let dir = Scratch::new();
    std::fs::create_dir_all(&dir.0).unwrap();
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("qwen2").join(name), dir.0.join(name)).unwrap();
    }
    let config = std::fs::read(fixture("qwen2").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["use_sliding_window"] = true.into();
    config["sliding_window"] = window.into();
    config["layer_types"] = serde_json::json!(["full_attention", "sliding_attention"]);
    std::fs::write(dir.0.join("config.json"), config.to_string()).unwrap();
    let model = Model::open(&dir.0).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(KvLayout::of(&model.graph, KvDType::F32).windows(), [None, Some(window)]);
    model
}

/// Every model, and lengths at which its pages and its window have their borders.
fn models() -> impl Iterator<Item = (String, Model, Vec<usize>)> {
    let families = FAMILIES.into_iter().map(|family| (family.to_owned(), model(family), LENGTHS.to_vec()));
    // After `window + 31` tokens the next one sees nothing of the first page.
    let borders = |window: usize| [window + 30, window + 31, window + 32, 80, 97].to_vec();
    let name = |window: usize| format!("a window of {window}");
    families.chain(WINDOWS.into_iter().map(move |window| (name(window), windowed(window), borders(window))))
}

fn tokens(model: &Model, len: usize, salt: u32) -> Vec<u32> {
    let vocab = model.graph.vocab as u32;
    (0..len as u32).map(|i| (i * i * 31 + i * 17 + salt) % vocab).collect()
}

fn cases<'a>(model: &'a Model, lengths: &[usize]) -> impl Iterator<Item = Case<'a>> {
    lengths.iter().zip([KvDType::F32, KvDType::BF16, KvDType::Q8, KvDType::F16].into_iter().cycle()).map(
        |(len, kv_dtype)| Case {
            model,
            first: tokens(model, len + 1 - ANSWERS.0, 3),
            second: tokens(model, 5, 11),
            shape: Shape { kv_dtype, ..TESTED },
        },
    )
}

#[track_caller]
fn assert_same(found: &Outcome, expected: &Outcome, what: &str) {
    assert_eq!(found.answer.tokens, expected.answer.tokens, "{what}: tokens");
    assert!(found.answer.scores == expected.answer.scores, "{what}: bits of the logits");
    assert!(expected.pages.iter().all(|page| !page.is_empty()), "{what}: all pages are stored");
    for (i, (found, expected)) in found.pages.iter().zip(&expected.pages).enumerate() {
        assert!(found == expected, "{what}: bits of the keys and values of page {i}");
    }
    assert_eq!(found.pages.len(), expected.pages.len(), "{what}: pages");
}

#[test]
fn an_interrupted_session_goes_on_bit_for_bit() {
    for (family, model, lengths) in models() {
        for case in cases(&model, &lengths) {
            let expected = case.unbroken(&case.history());
            for (name, scenario) in SCENARIOS {
                let what = format!("{family}, {} tokens, {name}", case.computed());
                assert_same(&scenario(&case), &expected, &what);
            }
        }
    }
}

#[test]
fn forks_and_rollbacks_go_on_bit_for_bit() {
    for (family, model, lengths) in models() {
        for case in cases(&model, &lengths) {
            // In the middle of the answer, and of the prompt; in memory, and after a restart.
            let whole = case.history();
            for (cut, restarts) in [(case.computed() - 2, false), (case.computed() - 2, true), (35, true)] {
                let what = format!("{family}, {} tokens cut at {cut}", case.computed());
                let dir = Scratch::new();
                let (mut world, session) = case.begin(&dir);
                let tenant = world.store.tenant(TENANT).unwrap().id;
                let at = At::Token(cut as u32);
                let fork = world.store.fork(tenant, session, at, None).unwrap().id;
                if restarts {
                    world.close();
                    world = case.open(&dir);
                }
                let expected = case.unbroken(&whole[..cut]);
                let found = world.turn(fork, &case.second, ANSWERS.1);
                let pages = world.pages(fork);
                assert_same(&Outcome { answer: found, pages }, &expected, &what);
                // The parent is what it was, and goes the same way when it is rolled back.
                assert_eq!(world.store.tokens(tenant, session).unwrap(), whole);
                world.store.rollback(tenant, session, at, None).unwrap();
                assert_same(&case.go_on(world, session), &expected, &what);
            }
        }
    }
}

/// The grid must see what it is there to see.
#[test]
fn a_kernel_that_depends_on_the_chunk_and_a_restore_that_errs_are_found() {
    let model = model("llama");
    for (name, wrap) in control::CONTROLS {
        let case =
            cases(&model, &LENGTHS).next().map(|case| Case { shape: Shape { wrap, ..case.shape }, ..case });
        let case = case.expect("there are cases");
        let expected = case.unbroken(&case.history());
        let outcomes = SCENARIOS.map(|(_, scenario)| scenario(&case));
        assert!(outcomes.iter().any(|outcome| *outcome != expected), "{name} was not noticed");
    }
}
