//! A token's logits and its keys and values are the same bits however the work is cut.

mod tiny;

use mainstay_backend_api::{KvDType, Step};
use mainstay_kernels_cpu::Isa;
use mainstay_models::weights::DType;
use tiny::{
    BLOCKS, Feed, PAGE, Random, SMALL, SPARSE, Shape, bits, feed_alone, load, page_bytes, run, tokens,
};

/// Models that use every path of attention and of products.
fn shapes() -> Vec<(Shape, KvDType)> {
    vec![
        (SMALL, KvDType::F32),
        (Shape { dtypes: [DType::BF16; 2], head_norm: true, head_dim: 16, ..SMALL }, KvDType::BF16),
        (Shape { window: Some(40), softcap: Some(5.0), bias: true, heads: 6, ..SMALL }, KvDType::Q8),
        (Shape { window: Some(7), kv_heads: 4, inner: 75, ..SMALL }, KvDType::F32),
        (Shape { dtypes: [DType::Q4K, DType::Q6K], ..BLOCKS }, KvDType::F16),
        (SPARSE, KvDType::F32),
        (Shape { latent: 16, heads: 17, experts: 3, dtypes: [DType::BF16; 2], ..SPARSE }, KvDType::Q8),
        (Shape { dtypes: [DType::Q8_0, DType::Q5_1], bias: true, ..BLOCKS }, KvDType::F32),
    ]
}

/// Logits and page bytes of a prompt that is fed whole.
fn whole(shape: &Shape, kv: KvDType, prompt: &[u32]) -> (Vec<u32>, Vec<u8>) {
    let mut executor = load(shape, 1, None, kv);
    let mut feed = Feed::new(prompt, 1, false);
    let logits = feed_alone(&mut *executor, &mut feed, &[prompt.len()]);
    assert!(logits.iter().all(|x| x.is_finite()));
    (bits(&logits), page_bytes(&mut *executor, &feed))
}

#[test]
fn every_split_of_a_prompt() {
    let prompt = tokens(100, 1);
    for (shape, kv) in shapes() {
        let wanted = whole(&shape, kv, &prompt);
        let mut executor = load(&shape, 2, None, kv);
        for first in 1..100 {
            let mut feed = Feed::new(&prompt, 1 + (first % 40) as u32, first % 2 == 0);
            let logits = feed_alone(&mut *executor, &mut feed, &[first, 100 - first]);
            assert!(bits(&logits) == wanted.0, "{shape:?}: logits differ when split at {first}");
            assert!(
                page_bytes(&mut *executor, &feed) == wanted.1,
                "{shape:?}: pages differ when split at {first}"
            );
        }
        for width in [1, 3, 12, 13, 33] {
            let mut pieces = vec![width; 100 / width];
            pieces.extend((100 % width > 0).then_some(100 % width));
            let mut feed = Feed::new(&prompt, 5, false);
            let logits = feed_alone(&mut *executor, &mut feed, &pieces);
            assert!(bits(&logits) == wanted.0, "{shape:?}: logits differ in pieces of {width}");
            assert!(
                page_bytes(&mut *executor, &feed) == wanted.1,
                "{shape:?}: pages differ in pieces of {width}"
            );
        }
    }
}

#[test]
fn threads_and_instruction_sets() {
    let prompt = tokens(100, 2);
    for (shape, kv) in shapes() {
        let wanted = whole(&shape, kv, &prompt);
        for isa in Isa::supported() {
            for threads in [1, 2, 3] {
                let mut executor = load(&shape, threads, Some(isa), kv);
                for pieces in [&[100][..], &[60, 39, 1], &[1, 1, 98]] {
                    let mut feed = Feed::new(&prompt, 3, true);
                    let logits = feed_alone(&mut *executor, &mut feed, pieces);
                    assert!(bits(&logits) == wanted.0, "{shape:?}: {isa:?}, {threads} threads, {pieces:?}");
                    assert!(page_bytes(&mut *executor, &feed) == wanted.1, "{isa:?}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn beside_other_sequences() {
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| tokens(30 + 14 * i, 10 + i as u64)).collect();
    for (shape, kv) in shapes() {
        let wanted: Vec<_> = prompts.iter().map(|p| whole(&shape, kv, p)).collect();
        let mut executor = load(&shape, 2, None, kv);
        let mut random = Random::new(3);
        for round in 0..10 {
            let mut feeds: Vec<Feed> = prompts
                .iter()
                .enumerate()
                .map(|(i, p)| Feed::new(p, 1 + 8 * i as u32, (i + round) % 2 == 0))
                .collect();
            let mut logits = vec![Vec::new(); feeds.len()];
            while feeds.iter().any(|f| f.done < f.tokens.len()) {
                let mut step = Step { return_logits: true, ..Step::default() };
                let mut order = Vec::new();
                for (i, feed) in feeds.iter_mut().enumerate() {
                    let left = feed.tokens.len() - feed.done;
                    let room = 128 - step.tokens.len();
                    if left > 0 && room > 0 && random.below(3) > 0 {
                        let count = 1 + random.below(left.min(room).min(40));
                        feed.put(&mut step, count);
                        order.push((i, count));
                    }
                }
                let out = run(&mut *executor, &step);
                let mut rows = out.logits.chunks_exact(shape.vocab);
                for (i, count) in order {
                    logits[i].extend(rows.by_ref().take(count).flatten());
                }
            }
            for (i, (alone, pages)) in wanted.iter().enumerate() {
                assert!(bits(&logits[i]) == *alone, "{shape:?}: logits of {i} in round {round}");
                assert!(
                    page_bytes(&mut *executor, &feeds[i]) == *pages,
                    "{shape:?}: pages of {i} in round {round}"
                );
            }
        }
    }
}

#[test]
fn another_token_changes_the_logits() {
    let prompt = tokens(PAGE + 8, 4);
    let mut other = prompt.clone();
    other[3] = (other[3] + 1) % SMALL.vocab as u32;
    assert!(whole(&SMALL, KvDType::F32, &prompt).0 != whole(&SMALL, KvDType::F32, &other).0);
}
