//! Groups of pages that see only a window: what they hold, what they let go of, and what a prefix needs of them.

use super::rig::{Rig, alone, alone_within, limits, request};
use super::*;

/// A group that keeps all, and one whose tokens see 40.
const WINDOWS: [Option<usize>; 2] = [None, Some(40)];

fn rig(pages: [usize; 2]) -> Rig {
    Rig::windowed(limits(&pages), &WINDOWS)
}

/// A rig over the same store with an empty device.
fn again(rig: Rig, pages: [usize; 2]) -> Rig {
    let mut again = self::rig(pages);
    again.store = rig.store;
    again.scheduler.tier = TierUse { spills: true, is_invariant: true };
    again
}

/// Pages of each group with references.
fn used(rig: &Rig, pages: [usize; 2]) -> [usize; 2] {
    [0, 1].map(|group| pages[group] - 1 - rig.pool.free_len(group))
}

#[test]
fn a_long_prompt_holds_its_window_and_a_step() {
    // 40 tokens and a step of 64 lie in 5 pages at most.
    let pages = [40, 6];
    let mut rig = rig(pages);
    let wanted = request(&prompt(1000, 0), 30);
    let mut client = rig.submit(wanted.clone());
    for turn in 1..=16 {
        rig.turns(1);
        let [full, windowed] = used(&rig, pages);
        assert!(full == 32 && windowed <= 5, "{full} and {windowed} pages after step {turn}");
    }
    rig.drain();
    assert_eq!(tokens(&client.hear(), 0), alone(&wanted, 0, 2000).0);
}

#[test]
fn what_a_window_has_passed_is_found_until_it_is_reused() {
    let mut rig = rig([40, 20]);
    let long = prompt(400, 0);
    let _first = rig.submit(request(&long, 1));
    rig.drain();
    // Cuts inside the prompt, at its end, and right behind its first pages.
    for (len, found) in [(400, 384), (200, 192), (70, 64)] {
        let wanted = request(&[&long[..len], &[1, 2]].concat(), 5);
        let mut client = rig.submit(wanted.clone());
        rig.drain();
        let events = client.hear();
        assert_eq!((cached(&events), tokens(&events, 0)), (found, alone(&wanted, 0, 2000).0), "{len}");
    }
    // Another prompt takes all pages of the window, and few of the others.
    let _other = rig.submit(request(&prompt(640, 7), 1));
    rig.drain();
    let wanted = request(&[&long[..], &[3]].concat(), 5);
    let mut client = rig.submit(wanted.clone());
    rig.drain();
    let events = client.hear();
    assert_eq!((cached(&events), tokens(&events, 0)), (0, alone(&wanted, 0, 2000).0));
}

#[test]
fn a_restart_reads_of_a_window_what_the_next_token_sees() {
    for len in [31, 32, 33, 39, 40, 41, 63, 64, 65, 103, 104, 105, 300] {
        let mut rig = rig([40, 20]).storing(10_000);
        let first = request(&prompt(len, 0), 7);
        let _first = rig.submit(first.clone());
        rig.drain();
        let mut rig = again(rig, [40, 6]);
        let second = request(&next_turn(&first, 3), 12);
        let mut client = rig.submit(second.clone());
        rig.turns(1);
        // All but the last token that was drawn had keys and values.
        let had = len + 6;
        let read = |group| rig.pending[0].0.headers.iter().filter(|h| h.name.group == group).count();
        let (pages, unseen) = (had.div_ceil(32), (had + 1).saturating_sub(40) / 32);
        assert_eq!((read(0), read(1)), (pages, pages - unseen), "{had} tokens");
        rig.drain();
        let events = client.hear();
        assert_eq!(tokens(&events, 0), alone(&second, 0, 2000).0);
        let kv = report(&events);
        assert_eq!((kv.state, kv.cached_tokens, kv.restored_tokens), (KvState::Exact, had, had));
    }
}

#[test]
fn pages_that_are_on_the_device_are_not_read() {
    let mut rig = rig([80, 7]).storing(10_000);
    let first = request(&prompt(300, 0), 7);
    let _first = rig.submit(first.clone());
    rig.drain();
    // Takes all pages of the window.
    let _other = rig.submit(request(&prompt(640, 7), 1));
    rig.drain();
    let second = request(&next_turn(&first, 3), 12);
    let mut client = rig.submit(second.clone());
    rig.turns(1);
    let read: Vec<_> = rig.pending[0].0.headers.iter().map(|h| (h.name.group, h.tokens.len())).collect();
    // 306 tokens: the tail of both groups, and of the window the page before, where the token at 267 is.
    assert_eq!(read, [(1, 32), (0, 18), (1, 18)]);
    rig.drain();
    let events = client.hear();
    assert_eq!((tokens(&events, 0), cached(&events)), (alone(&second, 0, 2000).0, 306));
    // What was on the device is not there twice.
    assert_eq!(report(&events).restored_tokens, 306);
}

#[test]
fn a_rollback_finds_in_the_store_what_the_window_has_passed() {
    let mut rig = rig([80, 7]).storing(10_000);
    let long = prompt(600, 0);
    let _first = rig.submit(request(&long, 7));
    rig.drain();
    for restarts in [false, true] {
        for cut in [63, 64, 65, 103, 104, 105, 320] {
            if restarts {
                rig = again(rig, [80, 7]);
            }
            // Another way from there on each time.
            let new = if restarts { [(long[cut] + 1) % 40, 2] } else { [(long[cut] + 2) % 40, 2] };
            let wanted = request(&[&long[..cut], &new].concat(), 5);
            let mut client = rig.submit(wanted.clone());
            rig.drain();
            let events = client.hear();
            assert_eq!(tokens(&events, 0), alone(&wanted, 0, 2000).0);
            assert_eq!(cached(&events), cut / 32 * 32, "cut at {cut}, restarts: {restarts}");
        }
    }
}

#[test]
fn a_window_whose_page_is_gone_is_computed_again() {
    for missing_group in [0, 1] {
        let mut rig = rig([40, 20]).storing(10_000);
        let first = request(&prompt(300, 0), 7);
        let _first = rig.submit(first.clone());
        rig.drain();
        let mut rig = again(rig, [40, 6]);
        let second = request(&next_turn(&first, 3), 12);
        let mut client = rig.submit(second.clone());
        rig.turns(1);
        // Page 8 is one of those that are needed of both groups.
        let load = &mut rig.pending[0].0;
        let gone = load
            .headers
            .iter_mut()
            .find(|h| h.name.group == missing_group && h.tokens == second.prompt[256..288]);
        gone.unwrap().name.key.0[0] ^= 1;
        rig.drain();
        let events = client.hear();
        assert_eq!(tokens(&events, 0), alone(&second, 0, 2000).0);
        let kv = report(&events);
        assert_eq!((kv.state, kv.reason, kv.restored_tokens), (KvState::Recomputed, Some("absent"), 0));
    }
}

#[test]
fn choices_share_a_window_and_part_at_its_end() {
    let mut rig = rig([60, 30]);
    let wanted = crate::Request { choices: 3, ..request(&prompt(150, 0), 120) };
    let mut client = rig.submit(wanted.clone());
    rig.turns(4);
    // The prompt's last two pages hold what a choice sees; the last one is its own.
    assert_eq!(used(&rig, [60, 30]), [4 + 3, 1 + 3]);
    rig.drain();
    expect_alone(&rig, &mut client, &wanted);
}

#[test]
fn sequences_without_room_in_a_window_wait_and_lose_nothing() {
    // Five pages at most each; there are eight.
    let mut rig = rig([200, 9]);
    let wanted: Vec<_> = (0..5).map(|i| request(&prompt(200 + 40 * i as usize, i), 50)).collect();
    let mut clients: Vec<Client> = wanted.iter().map(|w| rig.submit(w.clone())).collect();
    rig.drain();
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn a_page_that_a_window_has_passed_is_missed_by_no_one_further_on() {
    // Without a group that keeps all: the store has the end, and not the beginning.
    let windows = [Some(40)];
    let mut first = Rig::windowed(limits(&[20]), &windows).storing(10_000);
    let wanted = request(&prompt(300, 0), 7);
    let mut client = first.submit(crate::Request {
        keep: crate::Keep { durability: Durability::Ephemeral, ..crate::Keep::default() },
        ..wanted.clone()
    });
    first.drain();
    let drawn = tokens(&client.hear(), 0);
    let next = [&wanted.prompt[..], &drawn, &[1, 2, 3]].concat();
    // The device has the first pages no more.
    let _other = first.submit(request(&prompt(300, 9), 1));
    first.drain();
    let wanted = request(&next, 5);
    let mut client = first.submit(wanted.clone());
    first.drain();
    let events = client.hear();
    assert_eq!((cached(&events), tokens(&events, 0)), (288, alone_within(Some(40), &wanted, 0, 2000).0));
    let mut second = Rig::windowed(limits(&[20]), &windows);
    second.store = first.store;
    second.scheduler.tier = TierUse { spills: true, is_invariant: true };
    let wanted = request(&[&next[..], &[4]].concat(), 5);
    let mut client = second.submit(wanted.clone());
    second.drain();
    let events = client.hear();
    assert!(report(&events).restored_tokens >= 288, "{events:?}");
    assert_eq!(tokens(&events, 0), alone_within(Some(40), &wanted, 0, 2000).0);
}
