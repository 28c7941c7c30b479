//! Choices under a grammar, through the engine's handle, over the echo backend.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_backend_api::echo::{EchoExecutor, expected_of, expected_run};
use mainstay_backend_api::{KvDType, Limits, Sampling};
use mainstay_engine::{
    EngineOptions, Event, FinishReason, Generation, Grammar, Handle, Keep, Masker, Request, RequestError,
    SamplingRequest, StopRule,
};

const VOCAB: usize = 100;

fn start() -> Handle {
    let limits = Limits {
        context: 512,
        tokens_per_step: 48,
        chunks: 8,
        output_rows: 8,
        pages: vec![65],
        kv_dtype: KvDType::F32,
    };
    let executor = EchoExecutor::new(VOCAB, limits.clone());
    Handle::start(Box::new(executor), EngineOptions::new(limits, 16, VOCAB)).unwrap()
}

/// What goes wrong with a mask.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Error,
    Panic,
}

/// Allows every third token from the number drawn on, more of them each time, for so many tokens in all. Each mask waits
/// for a message, if it has a gate.
#[derive(Debug)]
struct Counting {
    len: usize,
    fault: Fault,
    gate: Option<Arc<Mutex<Receiver<()>>>>,
    alive: Arc<AtomicUsize>,
}

struct Count {
    grammar: Counting,
    drawn: usize,
}

fn counting(len: usize) -> Counting {
    Counting { len, fault: Fault::None, gate: None, alive: Arc::default() }
}

fn gated(len: usize) -> (Counting, Sender<()>) {
    let (open, gate) = channel();
    (Counting { gate: Some(Arc::new(Mutex::new(gate))), ..counting(len) }, open)
}

impl Grammar for Counting {
    fn start(&self) -> Box<dyn Masker> {
        self.alive.fetch_add(1, Ordering::SeqCst);
        let Self { len, fault, gate, alive } = self;
        let grammar = Self { len: *len, fault: *fault, gate: gate.clone(), alive: Arc::clone(alive) };
        Box::new(Count { grammar, drawn: 0 })
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.grammar.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

fn allowed(drawn: usize) -> Vec<u32> {
    let mut mask = vec![0; VOCAB.div_ceil(32)];
    for token in (drawn..VOCAB).step_by(3).take(10 * (drawn + 1)) {
        mask[token / 32] |= 1 << (token % 32);
    }
    mask
}

impl Masker for Count {
    fn advance(&mut self, drawn: &[u32], mask: &mut Vec<u32>) -> Result<(), String> {
        if let Some(gate) = &self.grammar.gate {
            // Without a sender, it is open.
            let _ = gate.lock().unwrap().recv();
        }
        self.drawn += drawn.len();
        match self.grammar.fault {
            Fault::Error if self.drawn == 2 => return Err("too large".to_owned()),
            Fault::Panic if self.drawn == 2 => panic!("a masker panics"),
            _ => {}
        }
        mask.clear();
        if self.drawn < self.grammar.len {
            mask.extend(allowed(self.drawn));
        }
        Ok(())
    }
}

fn request(prompt: &[u32], grammar: Option<Counting>) -> Request {
    Request {
        tenant: "t".into(),
        prompt: prompt.to_vec(),
        choices: 1,
        sampling: SamplingRequest { temperature: 1.0, seed: 5, ..SamplingRequest::greedy() },
        stop: StopRule { max_tokens: 20, ..StopRule::default() },
        logprobs: None,
        prompt_logprobs: None,
        drawn: Vec::new(),
        keep: Keep::default(),
        priority: 0,
        adapter: None,
        grammar: grammar.map(|grammar| Arc::new(grammar) as Arc<dyn Grammar>),
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + 7) % VOCAB as u32).collect()
}

/// What a choice must draw.
fn under_masks(prompt: &[u32], choice: u32, len: usize) -> Vec<u32> {
    let sampling = Sampling { temperature: 1.0, seed: 5, choice, ..Sampling::greedy() };
    let mut tokens = prompt.to_vec();
    for drawn in 0..len {
        tokens.push(expected_of((VOCAB, None), &tokens, (&sampling, Some(&allowed(drawn))), &[]));
    }
    tokens.split_off(prompt.len())
}

fn free(prompt: &[u32]) -> Vec<u32> {
    expected_run(VOCAB, prompt, 20, &Sampling { temperature: 1.0, seed: 5, ..Sampling::greedy() })
}

#[derive(Debug, Default, PartialEq)]
struct Heard {
    tokens: Vec<u32>,
    reason: Option<FinishReason>,
    error: Option<RequestError>,
}

fn hear(mut generation: Generation, choices: usize) -> Vec<Heard> {
    let mut heard: Vec<Heard> = (0..choices).map(|_| Heard::default()).collect();
    while let Some(event) = generation.events.blocking_recv() {
        match event {
            Event::Token { choice, token, .. } => heard[choice as usize].tokens.push(token),
            Event::Finished { choice, reason } => heard[choice as usize].reason = Some(reason),
            Event::Failed(error) => heard[0].error = Some(error),
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
        }
    }
    heard
}

fn until(holds: impl Fn() -> bool) {
    for _ in 0..5000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it does not come to pass");
}

#[test]
fn choices_draw_what_the_mask_allows_and_end_with_it() {
    let handle = start();
    for len in [5, 12] {
        let wanted = Request { choices: 4, ..request(&prompt(50), Some(counting(len))) };
        for (choice, heard) in (0..).zip(hear(handle.submit(wanted).unwrap(), 4)) {
            assert_eq!(heard.tokens, under_masks(&prompt(50), choice, len), "choice {choice}");
            assert_eq!(heard.reason, Some(FinishReason::Complete));
        }
    }
    // Fewer tokens than the grammar has: the limit comes first. None at all: the prompt is computed.
    let heard = hear(handle.submit(request(&prompt(33), Some(counting(100)))).unwrap(), 1);
    assert_eq!((heard[0].tokens.len(), heard[0].reason), (20, Some(FinishReason::Length)));
    let wanted = Request { choices: 2, ..request(&prompt(40), Some(counting(0))) };
    for heard in hear(handle.submit(wanted).unwrap(), 2) {
        assert_eq!(heard, Heard { reason: Some(FinishReason::Complete), ..Heard::default() });
    }
    assert_eq!(handle.stats().pages_used, 0);
}

#[test]
fn log_probabilities_are_those_without_a_mask() {
    let handle = start();
    let score = |grammar| {
        let wanted = Request { logprobs: Some(VOCAB), ..request(&prompt(20), grammar) };
        let mut generation = handle.submit(wanted).unwrap();
        loop {
            if let Event::Token { score, .. } = generation.events.blocking_recv().unwrap() {
                return score.unwrap();
            }
        }
    };
    let (free, held) = (score(None), score(Some(counting(3))));
    assert_eq!(free.top, held.top);
    assert!(held.top.contains(&(held.token, held.logprob)));
}

#[test]
fn tokens_that_end_the_text_may_be_banned_to_the_last() {
    let handle = start();
    // Everything that the first mask allows ends the text, which it may not yet.
    let stop = StopRule { max_tokens: 20, min_tokens: 2, tokens: (0..VOCAB as u32).step_by(3).collect() };
    let wanted = Request { stop, ..request(&prompt(20), Some(counting(9))) };
    let heard = hear(handle.submit(wanted).unwrap(), 1);
    assert_eq!(heard[0], Heard { reason: Some(FinishReason::Complete), ..Heard::default() });
}

#[test]
fn a_late_mask_holds_up_nobody_else() {
    let handle = start();
    let (grammar, open) = gated(6);
    let held = handle.submit(request(&prompt(100), Some(grammar))).unwrap();
    for i in 0..6 {
        let others: Vec<Generation> =
            (0..3).map(|j| handle.submit(request(&prompt(20 + 7 * i + j), None)).unwrap()).collect();
        for (j, other) in others.into_iter().enumerate() {
            assert_eq!(hear(other, 1)[0].tokens, free(&prompt(20 + 7 * i + j)));
        }
        open.send(()).unwrap();
    }
    drop(open);
    assert_eq!(hear(held, 1)[0].tokens, under_masks(&prompt(100), 0, 6));
}

#[test]
fn what_is_cancelled_while_its_mask_is_computed_leaves_nothing() {
    let handle = start();
    for tokens in 0..4 {
        let (grammar, open) = gated(9);
        let alive = Arc::clone(&grammar.alive);
        let mut held = handle.submit(request(&prompt(70), Some(grammar))).unwrap();
        for _ in 0..tokens {
            open.send(()).unwrap();
            while !matches!(held.events.blocking_recv().unwrap(), Event::Token { .. }) {}
        }
        until(|| alive.load(Ordering::SeqCst) == 1);
        drop(held);
        // Somebody else makes it look around.
        assert_eq!(hear(handle.submit(request(&prompt(9), None)).unwrap(), 1)[0].tokens, free(&prompt(9)));
        until(|| handle.stats().running == 0 && handle.stats().pages_used == 0);
        drop(open);
        until(|| alive.load(Ordering::SeqCst) == 0);
    }
}

#[test]
fn a_grammar_that_fails_fails_its_request_alone() {
    let handle = start();
    for fault in [Fault::Error, Fault::Panic] {
        let other = handle.submit(request(&prompt(60), None)).unwrap();
        let wanted = Request { choices: 3, ..request(&prompt(30), Some(Counting { fault, ..counting(9) })) };
        let heard = hear(handle.submit(wanted).unwrap(), 3);
        assert!(matches!(heard[0].error, Some(RequestError::Grammar(_))), "{heard:?}");
        assert!(heard.iter().all(|heard| heard.tokens.len() <= 2 && heard.reason.is_none()), "{heard:?}");
        assert_eq!(hear(other, 1)[0].tokens, free(&prompt(60)));
    }
    until(|| handle.stats().pages_used == 0);
}

#[test]
fn an_answer_goes_on_after_the_tokens_drawn_before() {
    let handle = start();
    let whole = under_masks(&prompt(45), 0, 12);
    for at in [1, 7, 11, 12] {
        let wanted = Request { drawn: whole[..at].to_vec(), ..request(&prompt(45), Some(counting(12))) };
        let heard = hear(handle.submit(wanted).unwrap(), 1);
        assert_eq!(heard[0].tokens, whole[at..]);
        assert_eq!(heard[0].reason, Some(FinishReason::Complete));
    }
}

#[test]
fn it_finishes_after_its_last_handle_is_gone() {
    let handle = start();
    let (grammar, open) = gated(6);
    let held = handle.submit(request(&prompt(100), Some(grammar))).unwrap();
    drop(handle);
    std::thread::spawn(move || (0..7).for_each(|_| open.send(()).unwrap_or_default()));
    assert_eq!(hear(held, 1)[0].tokens, under_masks(&prompt(100), 0, 6));
}
