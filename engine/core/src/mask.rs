//! Which tokens a choice under a grammar may draw next: computed by threads of its own, while the engine goes on.
//!
//! The engine knows nothing of a grammar but its masks. State and buffers of a choice travel to a thread and back by
//! value, so nothing is shared and the engine's thread takes no lock.

use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::UnboundedSender;

use crate::Request;
use crate::run::Message;
use crate::sequence::SequenceId;

/// What the choices of a request are held to.
pub trait Grammar: std::fmt::Debug + Send + Sync {
    /// Begins a choice. Called where masks are computed, not on the engine's thread.
    fn start(&self) -> Box<dyn Masker>;
}

/// One choice under a grammar. What it answers is a function of the grammar and the tokens it was given alone.
pub trait Masker: Send {
    /// Takes the tokens drawn since the last call, and overwrites `mask` with those that may come next: bit `id % 32`
    /// of word `id / 32`. Tokens that end a text are among them where the grammar lets it end. A mask without any
    /// token ends the choice.
    ///
    /// # Errors
    /// Where it cannot go on, for people.
    fn advance(&mut self, drawn: &[u32], mask: &mut Vec<u32>) -> Result<(), String>;
}

/// Takes tokens out of a mask.
pub(crate) fn forbid(mask: &mut [u32], tokens: &[u32]) {
    for &token in tokens {
        if let Some(word) = mask.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }
}

/// A choice's state and buffers, which are used again for every token.
pub(crate) struct Masking {
    grammar: Arc<dyn Grammar>,
    masker: Option<Box<dyn Masker>>,
    /// Drawn since the mask was computed.
    pub(crate) drawn: Vec<u32>,
    pub(crate) mask: Vec<u32>,
}

impl Masking {
    /// Of a choice of which these tokens were drawn before.
    pub(crate) fn new(grammar: Arc<dyn Grammar>, drawn: &[u32]) -> Box<Self> {
        Box::new(Self { grammar, masker: None, drawn: drawn.to_vec(), mask: Vec::new() })
    }

    /// Computes the mask for the next position.
    pub(crate) fn compute(&mut self) -> Result<(), String> {
        let Self { grammar, masker, drawn, mask } = self;
        let advance = || masker.get_or_insert_with(|| grammar.start()).advance(drawn, mask);
        let result = std::panic::catch_unwind(AssertUnwindSafe(advance));
        drawn.clear();
        result.unwrap_or_else(|_| Err("the grammar's state contradicts itself".to_owned()))
    }
}

impl std::fmt::Debug for Masking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Masking").field("grammar", &self.grammar).field("drawn", &self.drawn).finish()
    }
}

/// How a choice is held to its request's grammar.
#[derive(Debug)]
pub(crate) enum Held {
    /// It may draw anything.
    Free,
    /// Its mask has not been asked for.
    Unasked(Box<Masking>),
    /// Its mask is being computed.
    Asked,
    /// Its mask is that of the next position.
    Ready(Box<Masking>),
    /// Its grammar allows no token.
    Ended,
}

impl Held {
    /// A choice of a request of which these tokens were drawn before.
    pub(crate) fn new(request: &Request, drawn: &[u32]) -> Self {
        let masking = |grammar: &Arc<dyn Grammar>| Self::Unasked(Masking::new(Arc::clone(grammar), drawn));
        request.grammar.as_ref().filter(|_| request.stop.max_tokens > 0).map_or(Self::Free, masking)
    }

    /// What to send where masks are computed, once: its mask holds no longer, or was never computed.
    pub(crate) fn ask(&mut self) -> Option<Box<Masking>> {
        match std::mem::replace(self, Self::Asked) {
            Self::Unasked(masking) | Self::Ready(masking) => Some(masking),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// A mask to compute, or one that was.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) id: SequenceId,
    pub(crate) masking: Box<Masking>,
}

/// A computed mask on its way back.
#[derive(Debug)]
pub(crate) struct Masked {
    pub(crate) ask: Ask,
    pub(crate) result: Result<(), String>,
}

/// Most threads that compute masks.
const THREADS_MAX: usize = 4;

/// The threads, started for the first grammar.
pub(crate) struct MaskThreads {
    asks: Option<Sender<Ask>>,
    inbox: UnboundedSender<Message>,
}

impl MaskThreads {
    /// Threads that will answer to this inbox.
    pub(crate) fn new(inbox: UnboundedSender<Message>) -> Self {
        Self { asks: None, inbox }
    }

    /// Has a mask computed.
    pub(crate) fn ask(&mut self, ask: Ask) {
        let asks = self.asks.get_or_insert_with(|| start(&self.inbox));
        if let Err(unsent) = asks.send(ask) {
            // No thread could be started.
            let result = Err("the system gives no thread to compute masks".to_owned());
            let _ = self.inbox.send(Message::Masked(Masked { ask: unsent.0, result }));
        }
    }
}

fn start(inbox: &UnboundedSender<Message>) -> Sender<Ask> {
    let (sender, asks) = channel();
    let asks = Arc::new(Mutex::new(asks));
    let count = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    for _ in 0..count {
        let (asks, inbox) = (Arc::clone(&asks), inbox.clone());
        // Those that were started do the work of one that was not.
        let _ = std::thread::Builder::new().name("masks".to_owned()).spawn(move || serve(&asks, &inbox));
    }
    sender
}

/// Computes masks until the engine is gone.
fn serve(asks: &Mutex<Receiver<Ask>>, inbox: &UnboundedSender<Message>) {
    loop {
        // Bound first: a lock taken in the condition would be held while the mask is computed.
        let next = asks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut ask) = next else { return };
        let result = ask.masking.compute();
        if inbox.send(Message::Masked(Masked { ask, result })).is_err() {
            return;
        }
    }
}
