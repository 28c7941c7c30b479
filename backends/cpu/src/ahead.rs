//! Has the system give memory of pages before they are used: the first touch of a page costs more than filling it, and
//! a session that is read back touches thousands at once.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use mainstay_kernels_cpu::Aligned;

use crate::machine;

/// The most bytes that are had before they are used, of all groups together,
const AHEAD_BYTES_MAX: usize = 1 << 30;
/// where this part of the machine's memory is no less. The same part is left to everybody else.
const AHEAD_SHARE: u64 = 16;
/// Bytes that are asked for at a time.
const PIECE_BYTES: usize = 32 << 20;
/// Memory of fewer bytes is not worth a thread.
const REGION_BYTES_MIN: usize = 4 << 20;

/// A thread that keeps some memory ready beyond what was used. Pages are given out in ascending order at first, so that
/// what comes next is what lies behind the furthest. Dropping it waits for the piece in hand.
pub(crate) struct Ahead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    regions: Vec<Region>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// A region wants more than before.
    is_behind: bool,
    ends: bool,
}

/// The memory of one group.
struct Region {
    memory: Arc<Aligned>,
    /// Bytes to have beyond those that are used.
    ahead: usize,
    /// Bytes to have, from the first on, and those that were had.
    wanted: AtomicUsize,
    had: AtomicUsize,
}

impl Ahead {
    /// Begins with the first bytes of each memory.
    pub(crate) fn start(memories: &[Arc<Aligned>]) -> Self {
        let total = machine::memory_bytes().unwrap_or(0) / AHEAD_SHARE;
        Self::with(memories, usize::try_from(total).unwrap_or(usize::MAX).min(AHEAD_BYTES_MAX))
    }

    fn with(memories: &[Arc<Aligned>], ahead_bytes: usize) -> Self {
        let all: usize = memories.iter().map(|memory| memory.len()).sum();
        let region = |memory: &Arc<Aligned>| {
            let share = ahead_bytes as u128 * memory.len() as u128 / all.max(1) as u128;
            let ahead = if memory.len() < REGION_BYTES_MIN { 0 } else { share as usize };
            let (wanted, had) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Region { memory: Arc::clone(memory), ahead, wanted, had }
        };
        let regions: Vec<Region> = memories.iter().map(region).collect();
        let is_of_use = regions.iter().any(|region| region.ahead > 0);
        let shared = Arc::new(Shared { regions, state: Mutex::default(), changed: Condvar::new() });
        let thread = is_of_use.then(|| {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("mainstay-ahead".to_owned()).spawn(move || shared.serve())
        });
        // Without a thread, memory comes when it is touched.
        let ahead = Self { shared, thread: thread.and_then(Result::ok) };
        (0..memories.len()).for_each(|index| ahead.used(index, 0));
        ahead
    }

    /// The bytes of a memory up to `end` are in use.
    pub(crate) fn used(&self, index: usize, end: usize) {
        let region = &self.shared.regions[index];
        if self.thread.is_none() || region.ahead == 0 {
            return;
        }
        let wanted = end.saturating_add(region.ahead).next_multiple_of(PIECE_BYTES).min(region.memory.len());
        if region.wanted.fetch_max(wanted, Relaxed) < wanted {
            self.shared.lock().is_behind = true;
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        loop {
            let state = self.changed.wait_while(self.lock(), |state| !state.is_behind && !state.ends);
            state.unwrap_or_else(PoisonError::into_inner).is_behind = false;
            for region in &self.regions {
                while !self.lock().ends && region.lacks() && has_room() {
                    if !region.have_piece() {
                        return;
                    }
                }
            }
            if self.lock().ends {
                return;
            }
        }
    }
}

impl Region {
    fn lacks(&self) -> bool {
        self.had.load(Relaxed) < self.wanted.load(Relaxed)
    }

    /// `false` where the system does not give memory ahead.
    fn have_piece(&self) -> bool {
        let had = self.had.load(Relaxed);
        let end = self.wanted.load(Relaxed).min(had + PIECE_BYTES);
        let given = self.memory.populate(had..end);
        self.had.store(end, Relaxed);
        given
    }
}

/// Whether a piece more leaves enough to everybody else.
fn has_room() -> bool {
    let (Some(all), Some(free)) = (machine::memory_bytes(), machine::available_bytes()) else { return false };
    free >= all / AHEAD_SHARE + PIECE_BYTES as u64
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn had(ahead: &Ahead) -> Vec<usize> {
        ahead.shared.regions.iter().map(|region| region.had.load(Relaxed)).collect()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_had_ahead_of_use_and_no_further() {
        let memories = [256, 1, 64].map(|mib| Arc::new(Aligned::zeroed(mib << 20).expect("memory")));
        let ahead = Ahead::with(&memories, 80 << 20);
        let settles_at = |wanted: [usize; 3]| {
            let until = Instant::now() + Duration::from_secs(20);
            while had(&ahead) != wanted.map(|mib| mib << 20) && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(20));
            assert_eq!(had(&ahead), wanted.map(|mib| mib << 20));
        };
        // 80 MiB in proportion, in pieces of 32 MiB.
        settles_at([64, 0, 32]);
        ahead.used(0, 1 << 20);
        settles_at([96, 0, 32]);
        ahead.used(0, 250 << 20);
        ahead.used(1, 1 << 20);
        ahead.used(2, 40 << 20);
        settles_at([256, 0, 64]);
        let used = Aligned::resident_bytes(&memories[0]);
        assert_eq!(used, Some(256 << 20));
    }

    #[test]
    fn small_memory_is_let_alone() {
        let memory = Arc::new(Aligned::zeroed(1 << 20).expect("memory"));
        let ahead = Ahead::start(&[memory]);
        assert!(ahead.thread.is_none());
        ahead.used(0, 1 << 20);
        assert_eq!(had(&ahead), [0]);
    }
}
