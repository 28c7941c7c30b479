//! What the machine can do: memory bandwidth and f32 arithmetic, measured in about a second together.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::Aligned;
use crate::{Isa, Kernels};

/// Bytes that are read: several times the last cache of most machines.
const BUFFER_BYTES: usize = 256 << 20;

/// Places that one thread reads from at the same time, as products of few rows do.
const STREAMS: usize = 4;

/// How long each of the two measurements goes on.
const DURATION: Duration = Duration::from_millis(400);

/// Fused multiply-adds of a vector in one burst.
const BURST: usize = 20_000;

/// Bytes that `threads` threads together read from memory in a second: the best of several sweeps over a buffer
/// much larger than the caches. 0 where the system gives no memory for it.
pub fn read_bytes_per_second(threads: usize) -> f64 {
    let threads = threads.max(1);
    let Some(mut memory) = Aligned::zeroed(BUFFER_BYTES) else { return 0.0 };
    // Pages that were never written may all be one page of zeros.
    memory.bytes_mut().iter_mut().step_by(4096).for_each(|b| *b = 1);
    let (words, _) = memory.bytes().as_chunks::<8>();
    let share = words.len() / threads;
    let seconds = best_round(threads, |thread| {
        let own = &words[thread * share..(thread + 1) * share];
        black_box(sum(black_box(own)));
    });
    (share * threads * 8) as f64 / seconds
}

/// Sums words from [`STREAMS`] places in turn.
fn sum(words: &[[u8; 8]]) -> u64 {
    const LINE: usize = 8;
    let mut totals = [0u64; LINE];
    let streams: [_; STREAMS] = std::array::from_fn(|i| {
        let len = words.len() / STREAMS;
        words[i * len..(i + 1) * len].as_chunks::<LINE>().0
    });
    for i in 0..streams[0].len() {
        for stream in &streams {
            for (total, word) in totals.iter_mut().zip(&stream[i]) {
                *total = total.wrapping_add(u64::from_ne_bytes(*word));
            }
        }
    }
    totals.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// f32 multiplications and additions that `threads` threads together do in a second in fused multiply-adds, on the
/// best instruction set: the best of several bursts.
pub fn fma_flops_per_second(threads: usize) -> f64 {
    let Ok(kernels) = Kernels::new(Isa::best()) else { return 0.0 };
    let threads = threads.max(1);
    // SAFETY: the table was chosen for this machine.
    let burst = |rounds| unsafe { (kernels.table().fma_burst)(rounds) };
    let flops = burst(1) * BURST as f64;
    let seconds = best_round(threads, |_| {
        black_box(burst(black_box(BURST)));
    });
    flops * threads as f64 / seconds
}

/// The shortest time in which all threads did `work` once, of as many rounds as fit into [`DURATION`].
fn best_round(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let over = AtomicBool::new(false);
    let rounds = |thread: usize| {
        let start = Instant::now();
        let mut best = f64::INFINITY;
        loop {
            barrier.wait();
            let round = Instant::now();
            work(thread);
            barrier.wait();
            best = best.min(round.elapsed().as_secs_f64());
            // One thread decides, before the barrier at which all read it.
            if thread == 0 {
                over.store(start.elapsed() > DURATION, Ordering::Relaxed);
            }
            barrier.wait();
            if over.load(Ordering::Relaxed) {
                return best;
            }
        }
    };
    thread::scope(|scope| {
        let rounds = &rounds;
        for thread in 1..threads {
            scope.spawn(move || rounds(thread));
        }
        rounds(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_within_reason() {
        for threads in [1, 2] {
            let (read, fma) = (read_bytes_per_second(threads), fma_flops_per_second(threads));
            assert!(read > 1e7 && read < 1e14, "{read} bytes/s");
            assert!(fma > 1e6 && fma < 1e15, "{fma} flop/s");
        }
    }

    #[test]
    fn all_words_are_read() {
        let words: Vec<[u8; 8]> = (0..4096u64).map(|i| i.to_ne_bytes()).collect();
        assert_eq!(sum(&words), 4096 * 4095 / 2);
    }
}
