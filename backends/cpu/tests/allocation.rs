//! A step allocates nothing once the model is loaded and its vectors have grown.

#![expect(unsafe_code, reason = "an allocator that counts")]

#[expect(dead_code, reason = "it serves other tests too")]
mod tiny;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use mainstay_backend_api::{KvDType, Step, StepOutput};
use mainstay_models::weights::DType;
use tiny::{BLOCKS, Feed, SMALL, SPARSE, Shape, load, tokens};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing() {
    for shape in [SMALL, SPARSE, Shape { dtypes: [DType::Q4K, DType::Q6K], ..BLOCKS }] {
        steps_of_a_model_allocate_nothing(&shape);
    }
}

fn steps_of_a_model_allocate_nothing(shape: &Shape) {
    let mut executor = load(shape, 2, None, KvDType::BF16);
    let mut out = StepOutput::default();
    let mut counts = Vec::with_capacity(8);
    // The first rounds let the vectors of outputs grow.
    for round in 0..4 {
        let mut feeds = [Feed::new(&tokens(90, 1), 1, false), Feed::new(&tokens(50, 2), 8, true)];
        let mut steps = Vec::new();
        for pieces in [[60, 1], [1, 30], [28, 1], [1, 18]] {
            let mut step = Step { return_logits: true, ..Step::default() };
            feeds.iter_mut().zip(pieces).for_each(|(feed, piece)| feed.put(&mut step, piece));
            steps.push(step);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for step in &steps {
            executor.submit(step).expect("a step");
            executor.finish(&mut out).expect("a step");
        }
        let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
        counts.push(allocated);
        assert!(round < 2 || allocated == 0, "{allocated} allocations in round {round}");
    }
    assert!(counts[0] > 0, "the counter works: {counts:?}");
}
