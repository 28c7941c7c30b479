//! Random arrivals, cancels, stops and failures under tiny limits, all from a seed: after every step the books must
//! balance, and whatever is reported must be what a lone run gives.

use std::collections::BTreeMap;

use mainstay_backend_api::echo::{EchoExecutor, expected_logprob};
use mainstay_backend_api::{KvDType, pages_max};

use super::super::*;
use super::rig::{Client, Hashed, Rig, VOCAB, alone_within, request};
use crate::{Request, StopRule};

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// A request and all that was heard of it.
struct Watched {
    client: Client,
    request: Request,
    started: bool,
    scored: bool,
    tokens: Vec<Vec<u32>>,
    reasons: Vec<Option<FinishReason>>,
    stopped: Vec<bool>,
    failed: bool,
    stores: bool,
    /// The widest window of all groups.
    window: Option<usize>,
    completed: usize,
}

impl Watched {
    fn new(client: Client, request: Request, (stores, window): (bool, Option<usize>)) -> Self {
        let n = request.choices as usize;
        Self {
            client,
            request,
            started: false,
            scored: false,
            tokens: vec![Vec::new(); n],
            reasons: vec![None; n],
            stopped: vec![false; n],
            failed: false,
            stores,
            window,
            completed: 0,
        }
    }

    fn is_over(&self) -> bool {
        self.failed || self.reasons.iter().all(Option::is_some)
    }

    fn hear(&mut self, event: Event, started: &mut BTreeMap<i32, RequestId>) {
        assert!(!self.is_over(), "{event:?} after the end");
        match event {
            Event::Started { kv } => {
                assert!(!self.started);
                // One that waits for pages lets others pass.
                let last = started.insert(self.request.priority, self.client.id);
                assert!(self.stores || last.is_none_or(|last| last < self.client.id), "starts in order");
                assert!(
                    kv.cached_tokens < self.request.prompt.len() && kv.restored_tokens <= kv.cached_tokens
                );
                assert!(kv.cached_tokens == 0 || self.request.prompt_logprobs.is_none());
                self.started = true;
            }
            Event::Prompt(scores) => {
                assert!(self.started && !self.scored && self.request.prompt_logprobs.is_some());
                assert!(self.tokens.iter().all(Vec::is_empty));
                assert_eq!(scores.len() + 1, self.request.prompt.len());
                for (i, score) in scores.iter().enumerate() {
                    self.check_score(score, &self.request.prompt[..=i], self.request.prompt[i + 1]);
                    assert_eq!(Some(score.top.len()), self.request.prompt_logprobs);
                }
                self.scored = true;
            }
            Event::Token { choice, token, score } => {
                assert!(self.started && self.scored == self.request.prompt_logprobs.is_some());
                assert_eq!(score.is_some(), self.request.logprobs.is_some());
                let generated = &self.tokens[choice as usize];
                if let Some(score) = score {
                    let before: Vec<u32> = self.request.prompt.iter().chain(generated).copied().collect();
                    self.check_score(&score, &before, token);
                    assert_eq!(Some(score.top.len()), self.request.logprobs);
                }
                self.tokens[choice as usize].push(token);
            }
            Event::Finished { choice, reason } => {
                assert!(self.started && self.reasons[choice as usize].is_none());
                self.reasons[choice as usize] = Some(reason);
                self.completed += usize::from(reason == FinishReason::Complete);
            }
            Event::Pooled(row) => panic!("nobody asked for {row:?}"),
            Event::Failed(error) => {
                assert!(matches!(error, RequestError::Device(_)), "{error}");
                self.failed = true;
            }
        }
    }

    fn check_score(&self, score: &Score, before: &[u32], token: u32) {
        assert_eq!(score.token, token);
        assert_eq!(score.logprob.to_bits(), expected_logprob((VOCAB, self.window), before, token).to_bits());
    }

    /// What was heard of every choice is a beginning of the lone run, and all of it if the choice ran to its end.
    fn check(&self, context: usize) {
        for choice in 0..self.request.choices {
            let i = choice as usize;
            let (tokens, reason) = alone_within(self.window, &self.request, choice, context);
            assert!(tokens.starts_with(&self.tokens[i]), "{:?} of {tokens:?}", self.tokens[i]);
            match self.reasons[i] {
                Some(FinishReason::Stopped) => assert!(self.stopped[i]),
                Some(found) => assert_eq!((found, self.tokens[i].len()), (reason, tokens.len())),
                None => {}
            }
        }
    }
}

struct World {
    rig: Rig,
    random: Random,
    watched: Vec<Watched>,
    bases: Vec<Vec<u32>>,
    context: usize,
    window: Option<usize>,
    choices_max: usize,
    /// The last that started of each priority.
    started: BTreeMap<i32, RequestId>,
    finished: usize,
    completed: usize,
    copies: usize,
    /// Requests at a time.
    crowd: usize,
    /// Chunks that began anew by the second rope table.
    crossed: usize,
}

impl World {
    /// Every fourth seed gives a model with two rope tables.
    fn new(seed: u64, shape: &Shape, fail_every: Option<u64>, stored_pages: Option<u64>) -> Self {
        let (limits, windows) = shape.clone();
        let mut random = Random(seed);
        let bases = (0..3).map(|_| (0..90).map(|_| random.below(VOCAB) as u32).collect()).collect();
        let echo = EchoExecutor::new(VOCAB, limits.clone()).windowed(&windows);
        let echo = fail_every.into_iter().fold(echo, EchoExecutor::failing_every);
        let echo = if seed % 4 == 3 { echo.switching_at(75) } else { echo };
        Self {
            context: limits.context,
            window: windows.iter().copied().reduce(|a, b| a.zip(b).map(|(a, b)| a.max(b))).flatten(),
            choices_max: slots_max(&limits).min(4),
            rig: stored_pages.into_iter().fold(Rig::over(echo, limits), Rig::storing),
            random,
            watched: Vec::new(),
            bases,
            started: BTreeMap::new(),
            finished: 0,
            completed: 0,
            copies: 0,
            crowd: 12,
            crossed: 0,
        }
    }

    /// A prompt that often shares its beginning with others, over all kinds of draws and stops.
    fn request(&mut self) -> Request {
        let r = &mut self.random;
        let base = r.pick(&self.bases);
        let mut prompt = base[..r.below(base.len().min(self.context - 20))].to_vec();
        if r.one_in(4) {
            // Pages end where the prompt ends, and the last one may be known.
            prompt = base[..r.pick(&[32, 64])].to_vec();
        } else {
            prompt.extend((0..1 + r.below(12)).map(|_| r.below(VOCAB) as u32));
        }
        let mut wanted = request(&prompt, r.below(100));
        wanted.tenant = r.pick(&["a", "a", "b"]).into();
        wanted.choices = if r.one_in(4) { 1 + r.below(self.choices_max) as u32 } else { 1 };
        wanted.sampling.temperature = r.pick(&[0.0, 0.7, 1.5]);
        wanted.sampling.top_k = r.pick(&[0, 0, 5]);
        wanted.sampling.top_p = r.pick(&[1.0, 0.8]);
        wanted.sampling.seed = r.below(3) as u64;
        if r.one_in(4) {
            wanted.sampling.repetition_penalty = 1.3;
            wanted.sampling.frequency_penalty = 0.5;
            wanted.sampling.logit_bias = vec![(r.below(VOCAB) as u32, 2.0)];
        }
        if r.one_in(4) {
            // Text of two words, which can be guessed.
            wanted.sampling.logit_bias = (0..2).map(|_| (r.below(VOCAB) as u32, 50.0)).collect();
        }
        let tokens = (0..r.below(3)).map(|_| r.below(VOCAB) as u32).collect();
        wanted.stop = StopRule { tokens, min_tokens: r.pick(&[0, 0, 6]), ..wanted.stop };
        if r.one_in(3) {
            wanted.grammar = Some(Arc::new(Hashed { len: r.below(30) }));
        }
        wanted.priority = r.pick(&[0, 0, 0, -3, 9]);
        wanted.logprobs = r.pick(&[None, None, Some(2)]);
        wanted.prompt_logprobs = r.pick(&[None, None, None, None, Some(1)]);
        wanted
    }

    fn act(&mut self) {
        if self.watched.len() < self.crowd && self.random.one_in(3) {
            let request = self.request();
            let client = self.rig.submit(request.clone());
            let kind = (self.rig.store.is_some(), self.window);
            self.watched.push(Watched::new(client, request, kind));
        }
        if !self.rig.pending.is_empty() && self.random.one_in(2) {
            let (at, pages) = (self.random.below(self.rig.pending.len()), 1 + self.random.below(3));
            self.rig.deliver(at, pages);
        }
        // Some come at once, most a few steps late.
        while !self.rig.asked.is_empty() && self.random.one_in(2) {
            let at = self.random.below(self.rig.asked.len());
            self.rig.mask(at);
        }
        if !self.watched.is_empty() && self.random.one_in(40) {
            let gone = self.random.below(self.watched.len());
            self.watched.swap_remove(gone).check(self.context);
        }
        if !self.watched.is_empty() && self.random.one_in(40) {
            let at = self.random.below(self.watched.len());
            let watched = &mut self.watched[at];
            let choice = self.random.below(watched.request.choices as usize);
            let id = SequenceId { request: watched.client.id, choice: choice as u32 };
            watched.stopped[choice] = true;
            self.rig.scheduler.stop(id, &mut self.rig.pool);
            self.rig.transfer();
        }
    }

    fn listen(&mut self) {
        self.watched.sort_by_key(|w| w.client.id);
        for watched in &mut self.watched {
            for event in watched.client.hear() {
                watched.hear(event, &mut self.started);
            }
        }
        for watched in self.watched.extract_if(.., |w| w.is_over()) {
            watched.check(self.context);
            self.finished += 1;
            self.completed += watched.completed;
        }
    }

    fn run(&mut self, steps: usize) -> Stats {
        for _ in 0..steps {
            self.act();
            self.rig.turn();
            self.copies += self.rig.step.copies.len();
            let anew = |chunk: &&Chunk| chunk.rope_table == 1 && chunk.position == 0;
            self.crossed += self.rig.step.chunks.iter().filter(anew).count();
            self.listen();
        }
        self.rig.drain();
        self.listen();
        assert!(self.watched.is_empty(), "{} requests were forgotten", self.watched.len());
        self.rig.scheduler.stats(&self.rig.pool)
    }
}

/// Limits, and the window of each group.
type Shape = (Limits, Vec<Option<usize>>);

fn tiny<const N: usize>(groups: [(usize, Option<usize>); N], step: (usize, usize, usize)) -> Shape {
    let (tokens_per_step, chunks, output_rows) = step;
    let holds = |(pages, window): (usize, Option<usize>)| {
        let is_enough = pages_max(window, 200, tokens_per_step) < pages;
        if is_enough { 200 } else { (pages - 1) * 32 }
    };
    let context = groups.map(holds).into_iter().min().unwrap();
    let (pages, windows) = groups.into_iter().unzip();
    let limits = Limits { context, tokens_per_step, chunks, output_rows, pages, kv_dtype: KvDType::F32 };
    (limits, windows)
}

#[test]
fn a_hundred_thousand_steps_keep_the_books() {
    let shapes = [
        tiny([(5, None)], (7, 3, 3)),
        tiny([(6, None), (9, None)], (16, 4, 5)),
        tiny([(13, None)], (40, 6, 6)),
        tiny([(9, None)], (1, 4, 4)),
        tiny([(30, None), (14, None)], (100, 5, 12)),
    ];
    let reached = live(&shapes, 0..20, 6000);
    // The seeds must reach what they are there for.
    assert!(reached.steps >= 100_000 && reached.finished > 2000, "{reached:?}");
    assert!(reached.preemptions > 400 && reached.cached > 10_000, "{reached:?}");
    assert!(reached.copies > 500 && reached.restored > 5000, "{reached:?}");
    assert!(reached.completed > 300 && reached.crossed > 300, "{reached:?}");
    assert!(reached.kept > 500 && reached.drafted > reached.kept + 500, "{reached:?}");
}

#[test]
fn windows_keep_the_books() {
    // Windows shorter than a page, as long, and longer; with groups that keep all, and without.
    let shapes = [
        tiny([(9, None), (5, Some(20))], (7, 4, 4)),
        tiny([(13, None), (7, Some(32))], (40, 6, 6)),
        tiny([(9, None), (4, Some(1)), (12, Some(70))], (16, 4, 5)),
        tiny([(6, Some(40))], (16, 3, 3)),
        tiny([(5, Some(12)), (9, Some(70))], (33, 4, 5)),
        tiny([(30, None), (5, Some(33))], (1, 4, 4)),
        tiny([(14, Some(33)), (9, None)], (100, 5, 12)),
    ];
    let reached = live(&shapes, 100..128, 4000);
    assert!(reached.steps >= 90_000 && reached.finished > 2000, "{reached:?}");
    assert!(reached.preemptions > 400 && reached.cached > 10_000, "{reached:?}");
    assert!(reached.copies > 500 && reached.restored > 5000, "{reached:?}");
    assert!(reached.completed > 300 && reached.crossed > 300, "{reached:?}");
    assert!(reached.kept > 500 && reached.drafted > reached.kept + 500, "{reached:?}");
}

/// What lives came to.
#[derive(Debug, Default)]
struct Reached {
    steps: u64,
    finished: usize,
    preemptions: u64,
    cached: u64,
    copies: usize,
    restored: u64,
    completed: usize,
    crossed: usize,
    drafted: u64,
    kept: u64,
}

fn live(shapes: &[Shape], seeds: std::ops::Range<u64>, steps: usize) -> Reached {
    let mut reached = Reached::default();
    for seed in seeds {
        let shape = &shapes[seed as usize % shapes.len()];
        let fail_every = (seed % 3 == 2).then_some(23 + seed % 100);
        // Every other life has a store, which holds less than what is handed over.
        let stored_pages = (seed % 2 == 1).then_some(40);
        let mut world = World::new(seed, shape, fail_every, stored_pages);
        if seed % 4 < 2 {
            (world.rig.scheduler.pace, world.crowd) = (Some(Pace::default()), 3);
        }
        let stats = world.run(steps);
        reached.drafted += stats.drafted_tokens;
        reached.kept += stats.draft_kept_tokens;
        reached.restored += stats.restored_tokens;
        reached.copies += world.copies;
        reached.crossed += world.crossed;
        reached.finished += world.finished;
        reached.completed += world.completed;
        reached.steps += stats.steps;
        reached.preemptions += stats.preemptions;
        reached.cached += stats.cached_tokens;
    }
    reached
}

#[test]
fn a_seed_decides_every_step() {
    let steps = || {
        let shape = tiny([(6, None), (9, Some(50))], (16, 4, 5));
        let mut world = World::new(5, &shape, Some(31), Some(40));
        let turn = |_| {
            world.act();
            world.rig.turn();
            world.listen();
            world.rig.step.clone()
        };
        (0..500).map(turn).collect::<Vec<Step>>()
    };
    assert_eq!(steps(), steps());
}
