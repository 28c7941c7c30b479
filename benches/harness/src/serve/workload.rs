//! What clients say: conversations of one turn or many, made from a seed.

use super::arrivals::unit;
use super::{Role, Words};
use crate::shape::Random;

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Requests of equal length that have nothing in common.
    Fixed,
    /// Requests whose lengths are uniform around the given ones, from half to one and a half.
    Random,
    /// Requests behind a few shared instructions.
    Prefix,
    /// Conversations of several turns.
    Chat,
    /// Questions to long documents, each document asked several times by different clients.
    Documents,
    /// An agent: instructions, then results of tools that come after a pause and stay in its context.
    Agent,
}

/// How long and how many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Requests in all.
    pub requests: usize,
    /// Tokens that a turn sends.
    pub input: usize,
    /// Tokens that it gets.
    pub output: usize,
    /// Tokens of shared instructions, of a document, of an agent's instructions.
    pub prefix: usize,
    /// Different prefixes or documents.
    pub groups: usize,
    /// Turns of a conversation.
    pub turns: usize,
    /// Seconds between an answer and the next turn.
    pub pause_s: f64,
    /// What all of it is made from.
    pub seed: u64,
}

/// Turns that follow each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// What is said before the first turn.
    pub system: Option<String>,
    /// The turns.
    pub turns: Vec<Turn>,
}

/// What a client says, and how long the answer is.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Seconds after the answer before.
    pub pause_s: f64,
    /// The message.
    pub text: String,
    /// Tokens of the answer.
    pub output: usize,
}

impl Workload {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Fixed => "fixed",
            Workload::Random => "random",
            Workload::Prefix => "prefix",
            Workload::Chat => "chat",
            Workload::Documents => "documents",
            Workload::Agent => "agent",
        }
    }

    /// The conversations in the order in which they begin; together they have `sizes.requests` turns.
    pub fn conversations(self, sizes: &Sizes, words: &Words) -> Vec<Conversation> {
        let made = Made { sizes, words };
        let several = matches!(self, Workload::Chat | Workload::Agent);
        let turns = if several { sizes.turns.max(1) } else { 1 };
        let mut left = sizes.requests;
        let mut found = Vec::with_capacity(sizes.requests.div_ceil(turns));
        while left > 0 {
            let count = turns.min(left);
            left -= count;
            found.push(made.conversation(self, found.len() as u64, count));
        }
        found
    }
}

struct Made<'a> {
    sizes: &'a Sizes,
    words: &'a Words,
}

/// Seeds of prefixes, which lie apart from those of turns.
const PREFIXES: u64 = 1 << 40;

impl Made<'_> {
    fn conversation(&self, workload: Workload, at: u64, turns: usize) -> Conversation {
        let Sizes { input, output, prefix, groups, pause_s, seed, .. } = *self.sizes;
        let of_turn = |turn: u64| seed.wrapping_add(at << 16).wrapping_add(turn);
        let of_group = |group: u64| seed.wrapping_add(PREFIXES + group);
        let one = |text: String, output: usize| vec![Turn { pause_s: 0.0, text, output }];
        let group = at % groups.max(1) as u64;
        match workload {
            Workload::Fixed => {
                Conversation { system: None, turns: one(self.words.prompt(of_turn(0), input), output) }
            }
            Workload::Random => {
                let mut random = Random(of_turn(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                let mut around = |mean: usize| ((0.5 + unit(&mut random)) * mean as f64).max(1.0) as usize;
                let (input, output) = (around(input), around(output));
                Conversation { system: None, turns: one(self.words.prompt(of_turn(0), input), output) }
            }
            Workload::Prefix => Conversation {
                system: Some(self.words.text(of_group(group), prefix)),
                turns: one(self.words.prompt(of_turn(0), input), output),
            },
            Workload::Documents => {
                let document = self.words.text(of_group(group), prefix);
                let question = self.words.prompt(of_turn(0), input);
                Conversation { system: None, turns: one(format!("{document}\n\n{question}"), output) }
            }
            Workload::Chat | Workload::Agent => {
                let turn = |turn: usize| Turn {
                    pause_s: if turn == 0 { 0.0 } else { pause_s },
                    text: self.words.text(of_turn(turn as u64), input),
                    output,
                };
                let is_agent = workload == Workload::Agent;
                Conversation {
                    system: is_agent.then(|| self.words.text(of_group(group), prefix)),
                    turns: (0..turns).map(turn).collect(),
                }
            }
        }
    }
}

impl Conversation {
    /// What stands before the first answer.
    pub(crate) fn opening(&self) -> Vec<(Role, String)> {
        self.system.iter().map(|text| (Role::System, text.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const ALL: [Workload; 6] = [
        Workload::Fixed,
        Workload::Random,
        Workload::Prefix,
        Workload::Chat,
        Workload::Documents,
        Workload::Agent,
    ];
    const WORDS: Words = Words { tokens_each: 1.0, tokens_around: 0.0 };

    fn sizes() -> Sizes {
        Sizes { requests: 22, input: 40, output: 8, prefix: 100, groups: 3, turns: 4, pause_s: 0.5, seed: 9 }
    }

    fn len(text: &str) -> usize {
        text.split_whitespace().count()
    }

    #[test]
    fn every_workload_has_the_requests_that_were_asked_for_and_is_the_same_again() {
        for workload in ALL {
            let made = workload.conversations(&sizes(), &WORDS);
            let turns: usize = made.iter().map(|conversation| conversation.turns.len()).sum();
            assert_eq!(turns, 22, "{workload:?}");
            assert_eq!(made, workload.conversations(&sizes(), &WORDS), "{workload:?}");
            let texts: HashSet<&str> = made.iter().flat_map(|c| &c.turns).map(|t| t.text.as_str()).collect();
            assert_eq!(texts.len(), 22, "{workload:?}: no two turns say the same");
            let other = workload.conversations(&Sizes { seed: 10_000, ..sizes() }, &WORDS);
            assert_ne!(made, other, "{workload:?}");
        }
    }

    #[test]
    fn lengths_and_what_is_shared() {
        let of = |workload: Workload| workload.conversations(&sizes(), &WORDS);
        assert!(of(Workload::Fixed).iter().all(|c| len(&c.turns[0].text) == 40 && c.turns[0].output == 8));
        let random: Vec<usize> = of(Workload::Random).iter().map(|c| len(&c.turns[0].text)).collect();
        let (least, most) = (random.iter().min().unwrap(), random.iter().max().unwrap());
        assert!(*least >= 20 && *most <= 60 && most - least > 20, "{random:?}");
        let systems: HashSet<_> = of(Workload::Prefix).into_iter().map(|c| c.system.unwrap()).collect();
        assert_eq!((systems.len(), len(systems.iter().next().unwrap())), (3, 100));
        let documents: HashSet<String> = of(Workload::Documents)
            .iter()
            .map(|c| c.turns[0].text.split("\n\n").next().unwrap().to_owned())
            .collect();
        assert_eq!(documents.len(), 3);
        let agents = of(Workload::Agent);
        assert_eq!((agents.len(), agents[5].turns.len()), (6, 2), "the last one is cut");
        let pauses: Vec<f64> = agents[0].turns.iter().map(|turn| turn.pause_s).collect();
        assert_eq!(pauses, [0.0, 0.5, 0.5, 0.5]);
        assert!(of(Workload::Chat)[0].system.is_none() && agents[0].system.is_some());
    }
}
