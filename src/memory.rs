//! The owner of the server's memory: how much there is, what each model holds of it, and what the next one may take.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::exit::Usage;
use crate::{machine, size};

/// Of the memory that is free at the start, this part is left to activations, connections and everybody else,
const RESERVE_SHARE: u64 = 8;
/// and at least this much.
const RESERVE_BYTES_MIN: u64 = 256 << 20;
/// What is assumed to be free where the system does not tell.
const FREE_BYTES_UNKNOWN: u64 = 4 << 30;

/// How much memory models may take, weights and pages together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryChoice {
    /// What the machine, or its container, has free at the start, less a reserve.
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl MemoryChoice {
    /// Reads `auto` or a number of bytes.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { size::parse(text).map(Self::Bytes) }
    }
}

/// What a model takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Need {
    pub(crate) weight_bytes: u64,
    /// Keys and values without which it is of no use, and tokens of one sequence that these hold.
    pub(crate) kv_least: (u64, usize),
    /// The most that it is given for keys and values.
    pub(crate) kv_most: u64,
}

impl Need {
    fn least(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_least.0)
    }
}

struct Share {
    need: Need,
    /// Bytes that it has while it is loaded.
    held: Option<u64>,
}

/// The budget, and who has what of it.
pub(crate) struct Memory {
    total_bytes: u64,
    choice: MemoryChoice,
    shares: Mutex<BTreeMap<String, Share>>,
}

impl Memory {
    pub(crate) fn new(choice: MemoryChoice) -> Self {
        let total_bytes = match choice {
            MemoryChoice::Bytes(bytes) => bytes,
            MemoryChoice::Auto => {
                let free = machine::memory().map_or(FREE_BYTES_UNKNOWN, |m| m.available_bytes);
                free.saturating_sub((free / RESERVE_SHARE).max(RESERVE_BYTES_MIN))
            }
        };
        Self { total_bytes, choice, shares: Mutex::default() }
    }

    fn shares(&self) -> MutexGuard<'_, BTreeMap<String, Share>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a model known, so that others leave it room where there is enough for all.
    ///
    /// # Errors
    /// [`Usage`] where it could not be loaded though it had all memory.
    pub(crate) fn declare(&self, id: &str, need: Need) -> Result<(), Usage> {
        let missing = need.least().saturating_sub(self.total_bytes);
        if missing > 0 {
            return Err(Usage(format!("{}: {} are missing", self.told(id, &need), size::show(missing))));
        }
        self.shares().insert(id.to_owned(), Share { need, held: None });
        Ok(())
    }

    /// Checks that these models can be loaded beside each other.
    ///
    /// # Errors
    /// [`Usage`], telling by how much they cannot.
    pub(crate) fn check_together(&self, ids: &[&str]) -> Result<(), Usage> {
        let shares = self.shares();
        let needs = ids.iter().filter_map(|id| Some((id, shares.get(*id)?.need.least())));
        let (names, sizes): (Vec<String>, Vec<u64>) =
            needs.map(|(id, need)| (format!("`{id}`"), need)).unzip();
        let all: u64 = sizes.iter().sum();
        let missing = all.saturating_sub(self.total_bytes);
        if missing == 0 {
            return Ok(());
        }
        Err(Usage(format!(
            "the models {} need {} together; {}: {} are missing (load some on demand)",
            names.join(", "),
            size::show(all),
            self.gives(),
            size::show(missing)
        )))
    }

    /// Bytes that the model may take for keys and values beside those that are loaded now. As much is left to the
    /// models that are not, where all fit beside each other.
    ///
    /// # Errors
    /// The bytes that others would have to give up.
    pub(crate) fn room(&self, id: &str) -> Result<u64, u64> {
        let shares = self.shares();
        let need = shares.get(id).map(|share| share.need).unwrap_or_default();
        let held: u64 = shares.values().filter_map(|share| share.held).sum();
        let free = self.total_bytes.saturating_sub(held);
        if let missing @ 1.. = need.least().saturating_sub(free) {
            return Err(missing);
        }
        let away = shares.values().filter(|share| share.held.is_none()).map(|share| share.need);
        let (count, weights) =
            away.fold((0, 0u64), |(count, sum), need| (count + 1, sum + need.weight_bytes));
        let shared = free.saturating_sub(weights) / count.max(1);
        let alone = free - need.weight_bytes;
        let kv_bytes = if shared >= need.kv_least.0 { shared } else { alone };
        Ok(kv_bytes.min(need.kv_most))
    }

    /// The model is loaded, and has so much.
    pub(crate) fn hold(&self, id: &str, bytes: u64) {
        if let Some(share) = self.shares().get_mut(id) {
            share.held = Some(bytes);
        }
    }

    /// The model has gone.
    pub(crate) fn release(&self, id: &str) {
        if let Some(share) = self.shares().get_mut(id) {
            share.held = None;
        }
    }

    /// Why a model is not loaded now.
    pub(crate) fn shortage(&self, id: &str, missing: u64) -> String {
        let shares = self.shares();
        let need = shares.get(id).map(|share| share.need).unwrap_or_default();
        let held = shares.iter().filter_map(|(name, share)| {
            share.held.map(|bytes| format!("`{name}` in use holds {}", size::show(bytes)))
        });
        let held: Vec<String> = held.collect();
        format!("{}, of which {}: {} are missing", self.told(id, &need), held.join(", "), size::show(missing))
    }

    fn told(&self, id: &str, need: &Need) -> String {
        let (kv_bytes, tokens) = need.kv_least;
        format!(
            "`{id}` needs {} (weights {}, keys and values of {tokens} tokens {}); {}",
            size::show(need.least()),
            size::show(need.weight_bytes),
            size::show(kv_bytes),
            self.gives()
        )
    }

    fn gives(&self) -> String {
        let choice = if self.choice == MemoryChoice::Auto { "--memory auto" } else { "--memory" };
        format!("{choice} gives {}", size::show(self.total_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(weights: u64, least: u64) -> Need {
        Need { weight_bytes: weights, kv_least: (least, 32), kv_most: u64::MAX }
    }

    fn memory(total: u64, needs: &[(&str, Need)]) -> Memory {
        let memory = Memory::new(MemoryChoice::Bytes(total));
        for (id, need) in needs {
            memory.declare(id, *need).unwrap();
        }
        memory
    }

    #[test]
    fn a_lone_model_gets_what_is_left() {
        let memory = memory(1000, &[("a", need(300, 10))]);
        assert_eq!(memory.room("a"), Ok(700));
        let capped = Need { kv_most: 256, ..need(300, 10) };
        memory.declare("a", capped).unwrap();
        assert_eq!(memory.room("a"), Ok(256));
    }

    #[test]
    fn models_that_fit_beside_each_other_share_what_is_left() {
        let memory = memory(1000, &[("a", need(300, 10)), ("b", need(100, 10))]);
        assert_eq!(memory.room("a"), Ok(300));
        memory.hold("a", 600);
        assert_eq!(memory.room("b"), Ok(300));
        memory.hold("b", 400);
        memory.release("a");
        assert_eq!(memory.room("a"), Ok(300), "as before it went");
    }

    #[test]
    fn of_models_that_do_not_each_gets_all() {
        let memory = memory(1000, &[("a", need(600, 50)), ("b", need(500, 50))]);
        assert_eq!(memory.room("a"), Ok(400));
        memory.hold("a", 1000);
        assert_eq!(memory.room("b"), Err(550));
        let told = memory.shortage("b", 550);
        assert!(told.contains("`a` in use holds 1000 B") && told.contains("550 B are missing"), "{told}");
        memory.release("a");
        assert_eq!(memory.room("b"), Ok(500));
    }

    #[test]
    fn what_cannot_be_is_refused_with_numbers() {
        let memory = memory(1000, &[("a", need(600, 50)), ("b", need(500, 50))]);
        let refused = memory.declare("c", need(990, 30)).unwrap_err().to_string();
        for part in
            ["`c` needs 1020 B", "weights 990 B", "32 tokens 30 B", "gives 1000 B", "20 B are missing"]
        {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        assert!(memory.check_together(&["a"]).is_ok());
        let refused = memory.check_together(&["a", "b"]).unwrap_err().to_string();
        assert!(
            refused.contains("`a`, `b` need 1.2 KiB") && refused.contains("200 B are missing"),
            "{refused}"
        );
    }

    #[test]
    fn the_option_is_read() {
        assert_eq!(MemoryChoice::parse("auto"), Ok(MemoryChoice::Auto));
        assert_eq!(MemoryChoice::parse("2G"), Ok(MemoryChoice::Bytes(2 << 30)));
        assert!(MemoryChoice::parse("much").is_err());
    }
}
