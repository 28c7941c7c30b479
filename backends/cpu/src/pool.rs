//! Threads that run one function together: one parallel region per step, with barriers inside it.
//!
//! Waiting is a short spin, then yields, then sleep, so that a busy machine is not made busier.

#![expect(unsafe_code, reason = "the region's function is borrowed from the caller's stack")]

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Rounds of spinning, then of yielding, before a thread sleeps.
const SPINS: usize = 400;
const YIELDS: usize = 200;

/// A region's function, borrowed from the caller of [`Pool::run`], which waits for all threads.
type Task<'a> = &'a (dyn Fn(&Worker<'_>) + Sync);

/// The threads of one executor. The caller is one of them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    wakers: Vec<Thread>,
}

struct Shared {
    count: usize,
    /// Points at a [`Task`] while a region runs.
    task: AtomicPtr<Task<'static>>,
    /// Grows by one for every region; `usize::MAX` ends the threads.
    region: AtomicUsize,
    /// Whether a thread sleeps until the next region.
    asleep: Vec<AtomicBool>,
    barrier: Barrier,
    /// How many of its own jobs each thread has given out, in even and in odd phases.
    given: [Vec<Given>; 2],
}

/// On a cache line of its own, so that threads do not slow each other down.
#[repr(align(64))]
#[derive(Default)]
struct Given(AtomicUsize);

struct Barrier {
    arrived: AtomicUsize,
    generation: AtomicUsize,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// One thread inside a region.
pub(crate) struct Worker<'a> {
    /// Number of the thread, below the pool's count.
    pub(crate) index: usize,
    shared: &'a Shared,
    phase: Cell<usize>,
}

/// Ends the process when a thread unwinds: the others would wait for it for ever.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

impl Pool {
    /// A pool of `count` threads, the caller's included.
    pub(crate) fn new(count: usize) -> std::io::Result<Self> {
        assert!(count > 0, "a pool of no threads");
        let shared = Arc::new(Shared {
            count,
            task: AtomicPtr::new(std::ptr::null_mut()),
            region: AtomicUsize::new(0),
            asleep: (0..count).map(|_| AtomicBool::new(false)).collect(),
            barrier: Barrier {
                arrived: AtomicUsize::new(0),
                generation: AtomicUsize::new(0),
                sleepers: AtomicUsize::new(0),
                lock: Mutex::new(()),
                wake: Condvar::new(),
            },
            given: [(); 2].map(|()| (0..count).map(|_| Given::default()).collect()),
        });
        let mut pool = Self { shared, threads: Vec::new(), wakers: Vec::new() };
        for index in 1..count {
            let shared = Arc::clone(&pool.shared);
            let thread = thread::Builder::new()
                .name(format!("mainstay-cpu-{index}"))
                .spawn(move || shared.serve(index))?;
            pool.wakers.push(thread.thread().clone());
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Runs `task` on all threads at once and returns when all have ended. A panic in it ends the process.
    pub(crate) fn run(&mut self, task: Task<'_>) {
        let shared = &*self.shared;
        let mut task = task;
        // SAFETY: only the lifetime changes. No thread touches the task after the barrier at the end of this
        // region, and this function does not return (or unwind: it aborts) before it has passed that barrier.
        let erased = unsafe { std::mem::transmute::<*mut Task<'_>, *mut Task<'static>>(&raw mut task) };
        shared.task.store(erased, Relaxed);
        shared.given.iter().flatten().for_each(|given| given.0.store(0, Relaxed));
        shared.region.fetch_add(1, SeqCst);
        for (waker, asleep) in self.wakers.iter().zip(&shared.asleep[1..]) {
            if asleep.swap(false, SeqCst) {
                waker.unpark();
            }
        }
        shared.enter(0);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.region.store(usize::MAX, SeqCst);
        self.wakers.iter().for_each(Thread::unpark);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                std::process::abort();
            }
        }
    }
}

impl Shared {
    /// A thread's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.wait_for_region(index, seen);
            match self.region.load(SeqCst) {
                usize::MAX => return,
                region => seen = region,
            }
            self.enter(index);
        }
    }

    fn wait_for_region(&self, index: usize, seen: usize) {
        for round in 0..SPINS + YIELDS {
            if self.region.load(Acquire) != seen {
                return;
            }
            pause(round);
        }
        while self.region.load(SeqCst) == seen {
            self.asleep[index].store(true, SeqCst);
            // Whoever starts a region changes its number first and looks at `asleep` then, so one of both sees it.
            if self.region.load(SeqCst) == seen {
                thread::park();
            }
        }
        self.asleep[index].store(false, SeqCst);
    }

    /// Runs the region's task on this thread and waits for the others.
    fn enter(&self, index: usize) {
        let guard = AbortOnPanic;
        let task = self.task.load(Acquire);
        // SAFETY: the pointer was stored before the region began and stays valid until all threads have passed the
        // barrier below.
        let task = unsafe { *task };
        task(&Worker { index, shared: self, phase: Cell::new(0) });
        self.barrier.wait(self.count, || {});
        drop(guard);
    }
}

fn pause(round: usize) {
    if round < SPINS {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

impl Barrier {
    /// Waits until `count` threads are here; the last one calls `last` before any goes on.
    fn wait(&self, count: usize, last: impl FnOnce()) {
        let generation = self.generation.load(Relaxed);
        if self.arrived.fetch_add(1, AcqRel) + 1 == count {
            self.arrived.store(0, Relaxed);
            last();
            self.generation.store(generation.wrapping_add(1), SeqCst);
            if self.sleepers.load(SeqCst) > 0 {
                let _held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.wake.notify_all();
            }
            return;
        }
        for round in 0..SPINS + YIELDS {
            if self.generation.load(Acquire) != generation {
                return;
            }
            pause(round);
        }
        self.sleepers.fetch_add(1, SeqCst);
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.generation.load(SeqCst) == generation {
            held = self.wake.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        drop(held);
        self.sleepers.fetch_sub(1, SeqCst);
    }
}

/// One job of a phase: a number that exactly one thread is given. It cannot be made or copied elsewhere, so holding
/// it is the right to write what the phase assigns to that number.
pub(crate) struct Job(usize);

impl Job {
    /// Its number.
    pub(crate) fn index(&self) -> usize {
        self.0
    }
}

impl Worker<'_> {
    /// One phase: each of `jobs` jobs goes to one thread; returns when all are done. Neighbours go to the same thread,
    /// one after the other, until a thread has none left and takes those of others. Every thread of the region must call
    /// it, with the same number.
    pub(crate) fn each(&self, jobs: usize, mut f: impl FnMut(Job)) {
        let count = self.shared.count;
        if count == 1 {
            (0..jobs).for_each(|job| f(Job(job)));
            return;
        }
        let phase = self.phase.get();
        self.phase.set(phase + 1);
        let given = &self.shared.given[phase % 2];
        let first = |thread: usize| thread * jobs / count;
        for i in 0..count {
            let owner = (self.index + i) % count;
            let (start, end) = (first(owner), first(owner + 1));
            loop {
                let job = start + given[owner].0.fetch_add(1, Relaxed);
                if job >= end {
                    break;
                }
                f(Job(job));
            }
        }
        // The other counts were last used before the previous barrier, which all threads have left.
        let others = &self.shared.given[(phase + 1) % 2];
        self.shared.barrier.wait(count, || others.iter().for_each(|given| given.0.store(0, Relaxed)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once_and_phases_follow_each_other() {
        for count in [1, 2, 3, 5] {
            let mut pool = Pool::new(count).expect("threads");
            for round in 0..300 {
                let jobs = 1 + round % 17;
                let first: Vec<AtomicUsize> = (0..jobs).map(|_| AtomicUsize::new(0)).collect();
                let second = AtomicUsize::new(0);
                pool.run(&|worker| {
                    worker.each(jobs, |job| {
                        first[job.index()].fetch_add(1, Relaxed);
                    });
                    worker.each(jobs, |job| {
                        let before: usize = first.iter().map(|n| n.load(Relaxed)).sum();
                        assert_eq!(before, jobs);
                        second.fetch_add(job.index(), Relaxed);
                    });
                    worker.each(0, |_| unreachable!("no jobs"));
                });
                assert!(first.iter().all(|n| n.load(Relaxed) == 1));
                assert_eq!(second.load(Relaxed), jobs * (jobs - 1) / 2);
            }
        }
    }

    #[test]
    fn sleeping_threads_wake() {
        let mut pool = Pool::new(3).expect("threads");
        for _ in 0..5 {
            thread::sleep(std::time::Duration::from_millis(5));
            let ran = AtomicUsize::new(0);
            pool.run(&|worker| {
                if worker.index == 0 {
                    thread::sleep(std::time::Duration::from_millis(5));
                }
                worker.each(3, |_| ());
                ran.fetch_add(1, Relaxed);
            });
            assert_eq!(ran.load(Relaxed), 3);
        }
    }

    /// The child of the next test: a thread panics while the others wait.
    #[test]
    #[ignore = "run by a_panic_ends_the_process"]
    fn child_that_panics() {
        let mut pool = Pool::new(2).expect("threads");
        pool.run(&|worker| {
            assert!(worker.index == 0, "on purpose");
            worker.each(1, |_| ());
        });
    }

    #[test]
    fn a_panic_ends_the_process() {
        let test = std::env::current_exe().expect("a path");
        let output = std::process::Command::new(test)
            .args(["--ignored", "--exact", "pool::tests::child_that_panics"])
            .output()
            .expect("the test binary starts");
        assert!(!output.status.success());
        assert!(
            output.status.code().is_none_or(|code| code != 101),
            "aborted, not failed: {:?}",
            output.status
        );
    }
}
