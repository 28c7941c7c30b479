//! Sends conversations as they arrive, within a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Arrivals, Call, Conversation, Outcome, Record, Role, Target};

/// What is sent, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// In the order in which they begin.
    pub conversations: Vec<Conversation>,
    /// When.
    pub arrivals: Arrivals,
    /// Most conversations at a time, beside what arrivals say.
    pub clients_max: Option<usize>,
    /// When what is not over is cut, seconds.
    pub limit_s: f64,
    /// What arrival times are made from.
    pub seed: u64,
}

impl Load {
    /// Requests in all.
    pub fn requests(&self) -> usize {
        self.conversations.iter().map(|conversation| conversation.turns.len()).sum()
    }

    fn clients(&self) -> Option<usize> {
        match self.arrivals {
            Arrivals::Closed { clients } => Some(clients),
            _ => self.clients_max,
        }
    }
}

/// What came of a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Every request that was sent, in the order in which they were.
    pub records: Vec<Record>,
    /// Seconds from the beginning to the end of the last answer, or to the limit.
    pub duration_s: f64,
    /// Requests that were not sent: behind one that failed, or behind the limit.
    pub unsent: usize,
}

enum Event {
    Began { key: (usize, usize), start_s: f64, queue_s: f64 },
    Ended { key: (usize, usize), outcome: Outcome },
}

/// Sends everything; `tell` hears how many requests are over.
pub async fn run<T: Target>(target: Arc<T>, load: Load, mut tell: impl FnMut(usize)) -> Loaded {
    let requests = load.requests();
    let begun = Instant::now();
    let limit = sleep_until(begun + Duration::from_secs_f64(load.limit_s));
    let (send, mut events) = mpsc::unbounded_channel();
    let mut driver = std::pin::pin!(drive(target, load, begun, send));
    let mut limit = std::pin::pin!(limit);
    let (mut open, mut records) = (HashMap::new(), Vec::with_capacity(requests));
    let mut end_s = 0.0;
    let mut driving = true;
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(Event::Began { key, start_s, queue_s }) => {
                    open.insert(key, (start_s, queue_s));
                }
                Some(Event::Ended { key, outcome }) => {
                    records.extend(open.remove(&key).map(|times| record(key, times, outcome)));
                    end_s = begun.elapsed().as_secs_f64();
                    tell(records.len());
                }
                None => break,
            },
            () = &mut driver, if driving => driving = false,
            () = &mut limit => {
                end_s = begun.elapsed().as_secs_f64();
                break;
            }
        }
    }
    for (key, times) in open {
        let error = Some("cut at the time limit".to_owned());
        records.push(record(key, times, Outcome { total_s: end_s - times.0, error, ..Outcome::default() }));
    }
    records.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
    Loaded { unsent: requests - records.len(), records, duration_s: end_s }
}

fn record((conversation, turn): (usize, usize), (start_s, queue_s): (f64, f64), outcome: Outcome) -> Record {
    Record { conversation, turn, start_s, queue_s, outcome }
}

/// Begins every conversation when its time has come, and waits for all. Dropping it ends them.
async fn drive<T: Target>(target: Arc<T>, load: Load, begun: Instant, events: mpsc::UnboundedSender<Event>) {
    let times = load.arrivals.times(load.conversations.len(), load.seed);
    let clients = load.clients().map(|count| Arc::new(Semaphore::new(count)));
    let mut tasks = JoinSet::new();
    for (at, conversation) in load.conversations.into_iter().enumerate() {
        let arrival = times.as_ref().and_then(|times| times.get(at)).copied();
        if let Some(seconds) = arrival {
            sleep_until(begun + Duration::from_secs_f64(seconds)).await;
        }
        let (target, clients, events) = (target.clone(), clients.clone(), events.clone());
        tasks.spawn(async move {
            let arrived = Instant::now();
            // the semaphore is never closed
            let _permit = match clients {
                Some(clients) => clients.acquire_owned().await.ok(),
                None => None,
            };
            // a client that is part of a closed loop waits for nobody: it comes when it is free
            let queue_s = if arrival.is_some() { arrived.elapsed().as_secs_f64() } else { 0.0 };
            converse(&target, (at, conversation), (begun, queue_s), &events).await;
        });
    }
    drop(events);
    while tasks.join_next().await.is_some() {}
}

/// The turns of a conversation, each behind the answers before; ends at the first failure.
async fn converse<T: Target>(
    target: &Arc<T>,
    (at, conversation): (usize, Conversation),
    (begun, queue_s): (Instant, f64),
    events: &mpsc::UnboundedSender<Event>,
) {
    let mut messages = conversation.opening();
    for (number, turn) in conversation.turns.into_iter().enumerate() {
        if turn.pause_s > 0.0 {
            sleep(Duration::from_secs_f64(turn.pause_s)).await;
        }
        messages.push((Role::User, turn.text));
        let call = Call { messages: messages.clone(), output_tokens: turn.output, conversation: at };
        let queue_s = if number == 0 { queue_s } else { 0.0 };
        let key = (at, number);
        // nobody listens any more once the time is up
        let _ = events.send(Event::Began { key, start_s: begun.elapsed().as_secs_f64(), queue_s });
        let outcome = target.clone().send(call).await;
        let (text, failed) = (outcome.text.clone(), outcome.error.is_some());
        let _ = events.send(Event::Ended { key, outcome });
        if failed {
            return;
        }
        if target.keeps_conversations() {
            messages.clear();
        } else {
            messages.push((Role::Assistant, text));
        }
    }
}
