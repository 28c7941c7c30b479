//! What the scheduler promises, one promise a test.

mod fuzz;
mod rig;
mod rope;
mod windows;

use super::*;
use crate::{KvReport, KvState};
use rig::{Client, Rig, VOCAB, alone, limits, request};

fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + i / 7 + salt) % VOCAB as u32).collect()
}

fn tokens(events: &[Event], of: u32) -> Vec<u32> {
    let token = |e: &Event| match e {
        Event::Token { choice, token, .. } if *choice == of => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

fn cached(events: &[Event]) -> usize {
    report(events).cached_tokens
}

fn report(events: &[Event]) -> KvReport {
    let Some(Event::Started { kv }) = events.first() else { panic!("{events:?}") };
    *kv
}

/// Chunk lengths of the last step, in its order.
fn chunks(rig: &Rig) -> Vec<usize> {
    rig.step.chunks.iter().map(|c| c.tokens.len()).collect()
}

/// Hears a request to its end and holds each choice against its lone run.
fn expect_alone(rig: &Rig, client: &mut Client, wanted: &crate::Request) {
    let events = client.hear();
    for choice in 0..wanted.choices {
        let (want, _) = alone(wanted, choice, rig.scheduler.limits.context);
        assert_eq!(tokens(&events, choice), want, "choice {choice}");
    }
    assert!(client.events.is_closed());
}

#[test]
fn a_long_prompt_holds_no_draw_up() {
    let mut rig = Rig::new(limits(&[40]));
    let mut first = rig.submit(request(&prompt(10, 0), 50));
    rig.turns(1);
    let mut long = rig.submit(request(&prompt(500, 1), 5));
    first.hear();
    for _ in 0..7 {
        rig.turns(1);
        assert_eq!(chunks(&rig), [1, 63]);
        assert_eq!(tokens(&first.hear(), 0).len(), 1);
    }
    rig.turns(1);
    assert_eq!(chunks(&rig), [1, 500 - 7 * 63]);
    assert_eq!(tokens(&long.hear(), 0).len(), 1);
}

#[test]
fn prompts_share_a_step_in_the_order_of_arrival() {
    let mut rig = Rig::new(limits(&[40]));
    let wanted: Vec<_> = [20, 30, 40].iter().map(|&n| request(&prompt(n, n as u32), 3)).collect();
    let mut clients: Vec<Client> = wanted.iter().map(|w| rig.submit(w.clone())).collect();
    rig.turns(1);
    assert_eq!(chunks(&rig), [20, 30, 14]);
    rig.turns(1);
    assert_eq!(chunks(&rig), [1, 1, 26]);
    rig.drain();
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn short_prompts_do_not_starve_a_long_one() {
    let mut rig = Rig::new(limits(&[40]));
    let mut long = rig.submit(request(&prompt(640, 0), 1));
    let mut others = Vec::new();
    for turn in 0..10 {
        others.push(rig.submit(request(&prompt(60, turn), 1)));
        rig.turns(1);
    }
    assert_eq!(tokens(&long.hear(), 0).len(), 1, "640 tokens take ten steps of 64");
}

#[test]
fn a_prefix_is_found_again_by_its_tenant_only() {
    let mut rig = Rig::new(limits(&[20]));
    let wanted = request(&prompt(100, 0), 5);
    let mut first = rig.submit(wanted.clone());
    rig.drain();
    let mut again = rig.submit(wanted.clone());
    let mut other = rig.submit(crate::Request { tenant: "u".into(), ..wanted.clone() });
    rig.drain();
    let (first, again, other) = (first.hear(), again.hear(), other.hear());
    assert_eq!((cached(&first), cached(&again), cached(&other)), (0, 96, 0));
    assert_eq!(tokens(&again, 0), tokens(&first, 0));
    assert_eq!(tokens(&other, 0), tokens(&first, 0));
    let stats = rig.scheduler.stats(&rig.pool);
    assert_eq!((stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens), (300, 96, 15));
}

#[test]
fn generated_tokens_are_found_by_the_next_turn() {
    let mut rig = Rig::new(limits(&[20]));
    let wanted = request(&prompt(20, 0), 50);
    let mut client = rig.submit(wanted.clone());
    rig.drain();
    let next: Vec<u32> = wanted.prompt.iter().copied().chain(tokens(&client.hear(), 0)).collect();
    let mut next = rig.submit(request(&next, 2));
    rig.drain();
    assert_eq!(cached(&next.hear()), 64);
}

#[test]
fn at_least_one_token_is_computed() {
    let mut rig = Rig::new(limits(&[20]));
    let wanted = request(&prompt(64, 0), 3);
    rig.submit(wanted.clone());
    // Dropping the client right away cancels the request, so this one finds nothing.
    let mut first = rig.submit(wanted.clone());
    rig.drain();
    let mut again = rig.submit(wanted.clone());
    rig.drain();
    assert_eq!(cached(&first.hear()), 0);
    let events = again.hear();
    assert_eq!(cached(&events), 32);
    assert_eq!(tokens(&events, 0), alone(&wanted, 0, 1000).0);
}

#[test]
fn scored_prompts_take_no_hit_but_leave_pages() {
    let mut rig = Rig::new(limits(&[20]));
    let plain = request(&prompt(90, 0), 2);
    let scored = crate::Request { prompt_logprobs: Some(3), ..plain.clone() };
    let mut clients = [scored.clone(), scored, plain].map(|w| {
        let client = rig.submit(w);
        rig.drain();
        client
    });
    let heard = clients.each_mut().map(Client::hear);
    assert_eq!(heard.each_ref().map(|h| cached(h)), [0, 0, 64]);
    let Event::Prompt(scores) = &heard[0][1] else { panic!("{:?}", heard[0]) };
    assert_eq!(scores.iter().map(|s| s.token).collect::<Vec<u32>>(), prompt(90, 0)[1..]);
    assert!(matches!(heard[0][2], Event::Token { .. }));
}

#[test]
fn a_scored_prompt_keeps_to_the_output_rows_and_to_the_draws_of_others() {
    let mut rig = Rig::new(limits(&[20]));
    let mut drawing = rig.submit(request(&prompt(5, 0), 30));
    rig.turns(1);
    let mut scored = rig.submit(crate::Request { prompt_logprobs: Some(0), ..request(&prompt(20, 1), 0) });
    for outputs in [8, 8, 6] {
        rig.turns(1);
        assert_eq!(rig.step.outputs.len(), outputs);
    }
    let events = scored.hear();
    assert!(matches!(&events[1], Event::Prompt(scores) if scores.len() == 19), "{events:?}");
    assert!(matches!(events[2], Event::Finished { choice: 0, reason: FinishReason::Length }));
    assert_eq!(tokens(&drawing.hear(), 0).len(), 4);
}

#[test]
fn choices_compute_their_prompt_once_and_copy_its_last_page() {
    let mut rig = Rig::new(limits(&[20, 20]));
    let wanted = crate::Request { choices: 3, ..request(&prompt(40, 0), 40) };
    let mut client = rig.submit(wanted.clone());
    rig.turns(1);
    assert_eq!((chunks(&rig), rig.step.outputs.len()), (vec![40], 3));
    let shared = rig.scheduler.running[0].pages.clone();
    assert!((0..2).all(|group| shared[group].iter().all(|&p| rig.pool.refs(group, p) == 3)));
    rig.turns(1);
    assert_eq!(chunks(&rig), [1, 1, 1]);
    // Two copy, in each group; the last one writes in place.
    assert_eq!(rig.step.copies.len(), 4);
    assert_eq!(rig.pool.used_len(), 2 * 4);
    rig.drain();
    expect_alone(&rig, &mut client, &wanted);
    let firsts: Vec<_> = (0..3).map(|choice| alone(&wanted, choice, 1000).0).collect();
    assert!(firsts[0] != firsts[1] && firsts[1] != firsts[2], "choices should differ");
}

#[test]
fn choices_of_a_prompt_that_fills_its_pages_copy_nothing() {
    let mut rig = Rig::new(limits(&[20]));
    let wanted = crate::Request { choices: 2, ..request(&prompt(64, 0), 4) };
    let mut client = rig.submit(wanted.clone());
    rig.turns(2);
    assert!(rig.step.copies.is_empty());
    rig.drain();
    expect_alone(&rig, &mut client, &wanted);
}

#[test]
fn the_last_to_come_is_preempted_and_loses_nothing() {
    // Each needs 5 pages in the end; there are 7.
    let mut rig = Rig::new(limits(&[8]));
    let wanted = [request(&prompt(90, 0), 60), request(&prompt(70, 1), 80)];
    let mut clients = wanted.each_ref().map(|w| rig.submit(w.clone()));
    rig.turns(40);
    let stats = rig.scheduler.stats(&rig.pool);
    assert_eq!((stats.preemptions, stats.running, stats.waiting), (1, 1, 1));
    assert_eq!(rig.scheduler.running[0].id.request, clients[0].id);
    rig.drain();
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn lower_numbers_go_first_and_equal_ones_in_the_order_of_arrival() {
    let mut rig = Rig::new(Limits { chunks: 1, ..limits(&[20]) });
    let wanted = [0, 5, 0, -5, 5, -5]
        .map(|priority| crate::Request { priority, ..request(&prompt(20, priority.unsigned_abs()), 3) });
    let mut clients = wanted.each_ref().map(|w| rig.submit(w.clone()));
    let mut order = Vec::new();
    while !rig.scheduler.is_idle() {
        rig.turn();
        let running = rig.scheduler.running.first().map(|s| s.id.request);
        order.extend(running.filter(|id| order.last() != Some(id)));
    }
    let expected = [3, 5, 0, 2, 1, 4].map(|at: usize| clients[at].id);
    assert_eq!(order, expected);
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn the_least_urgent_is_preempted_although_it_came_first() {
    // Each needs 5 pages in the end; there are 7.
    let mut rig = Rig::new(limits(&[8]));
    let urgent = crate::Request { priority: -1, ..request(&prompt(70, 1), 80) };
    let wanted = [request(&prompt(90, 0), 60), urgent];
    let mut clients = wanted.each_ref().map(|w| rig.submit(w.clone()));
    rig.turns(40);
    let stats = rig.scheduler.stats(&rig.pool);
    assert_eq!((stats.preemptions, stats.running, stats.waiting), (1, 1, 1));
    assert_eq!(rig.scheduler.running[0].id.request, clients[1].id);
    rig.drain();
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn choices_without_pages_wait_and_lose_nothing() {
    let mut rig = Rig::new(limits(&[5]));
    let wanted = crate::Request { choices: 4, ..request(&prompt(70, 0), 40) };
    let mut client = rig.submit(wanted.clone());
    rig.drain();
    assert!(rig.scheduler.stats(&rig.pool).preemptions > 0);
    expect_alone(&rig, &mut client, &wanted);
}

#[test]
fn the_cache_gives_way_oldest_first() {
    let mut rig = Rig::new(limits(&[7]));
    for salt in [0, 1, 0] {
        let _heard = rig.submit(request(&prompt(80, salt), 1));
        rig.drain();
    }
    // Two pages hold nothing and go first; then prompt 1, which was used before prompt 0, loses its end.
    let _heard = rig.submit(request(&prompt(90, 2), 1));
    rig.drain();
    let found = [0, 1].map(|salt| {
        let mut client = rig.submit(request(&prompt(80, salt), 1));
        rig.turn();
        cached(&client.hear())
    });
    assert_eq!(found, [64, 32]);
}

#[test]
fn whoever_hangs_up_frees_pages_and_seat() {
    let mut rig = Rig::new(Limits { chunks: 2, ..limits(&[40]) });
    let drawing = rig.submit(request(&prompt(33, 0), 100));
    let prefilling = rig.submit(request(&prompt(600, 1), 100));
    let waiting = rig.submit(request(&prompt(10, 2), 100));
    rig.turns(2);
    let stats = rig.scheduler.stats(&rig.pool);
    assert_eq!((stats.running, stats.waiting, stats.pages_used), (2, 1, 2 + 19));
    drop(waiting);
    rig.turns(1);
    assert_eq!(rig.scheduler.stats(&rig.pool).waiting, 0);
    drop(prefilling);
    rig.turns(1);
    assert_eq!(rig.pool.used_len(), 2);
    drop(drawing);
    rig.turns(1);
    assert!(rig.scheduler.is_idle());
    rig.drain();
}

#[test]
fn stop_tokens_end_a_choice_once_they_may() {
    let all = alone(&request(&prompt(12, 0), 60), 0, 1000).0;
    let stop = all[3];
    let mut wanted = request(&prompt(12, 0), 60);
    wanted.stop.tokens = vec![stop];
    let mut rig = Rig::new(limits(&[20]));
    let mut early = rig.submit(wanted.clone());
    wanted.stop.min_tokens = 20;
    let mut late = rig.submit(wanted.clone());
    rig.drain();
    let (early, late) = (early.hear(), late.hear());
    let end = all.iter().position(|&t| t == stop).unwrap();
    assert_eq!(tokens(&early, 0), all[..=end]);
    assert!(
        matches!(early.last(), Some(Event::Finished { reason: FinishReason::Stop(t), .. }) if *t == stop)
    );
    let late = tokens(&late, 0);
    assert_eq!(late, alone(&wanted, 0, 1000).0);
    assert!(late.len() > 20 && !late[..20].contains(&stop));
}

#[test]
fn guesses_that_come_true_draw_several_tokens_a_step() {
    let mut wanted = request(&prompt(10, 1), 90);
    wanted.sampling.logit_bias = vec![(5, 100.0)];
    // Penalties count guesses as they would count tokens.
    wanted.sampling.frequency_penalty = 0.01;
    let mut steps = Vec::new();
    for pace in [None, Some(Pace::default())] {
        let mut rig = Rig::new(limits(&[9]));
        rig.scheduler.pace = pace;
        let mut client = rig.submit(wanted.clone());
        rig.drain();
        expect_alone(&rig, &mut client, &wanted);
        let stats = rig.scheduler.stats(&rig.pool);
        assert!(stats.draft_kept_tokens <= stats.drafted_tokens && stats.drafted_tokens < 90, "{stats:?}");
        steps.push(stats.steps);
    }
    assert!(steps[1] * 3 < steps[0], "{steps:?}");
}

#[test]
fn the_context_ends_a_choice() {
    let mut rig = Rig::new(limits(&[3]));
    let mut client = rig.submit(request(&prompt(60, 0), 100));
    rig.drain();
    let events = client.hear();
    assert_eq!(tokens(&events, 0).len(), 4);
    assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Length, .. })));
}

#[test]
fn the_server_ends_a_choice_and_not_its_siblings() {
    let mut rig = Rig::new(limits(&[20]));
    let wanted = crate::Request { choices: 2, ..request(&prompt(40, 0), 10) };
    let mut client = rig.submit(wanted.clone());
    let of = |choice| SequenceId { request: client.id, choice };
    let ids = [of(0), of(1)];
    // Nothing is drawn yet, and choice 0 carries the prompt of both.
    rig.scheduler.stop(ids[0], &mut rig.pool);
    rig.turns(3);
    rig.scheduler.stop(ids[0], &mut rig.pool);
    rig.scheduler.stop(ids[0], &mut rig.pool);
    rig.drain();
    let events = client.hear();
    assert_eq!((tokens(&events, 0).len(), tokens(&events, 1)), (3, alone(&wanted, 1, 1000).0));
    let stopped = |e: &&Event| matches!(e, Event::Finished { choice: 0, reason: FinishReason::Stopped });
    assert_eq!(events.iter().filter(stopped).count(), 1);
}

#[test]
fn a_failed_step_fails_its_requests_and_no_other() {
    let mut rig = Rig::over(
        mainstay_backend_api::echo::EchoExecutor::new(VOCAB, limits(&[20])).failing_every(3),
        Limits { chunks: 2, ..limits(&[20]) },
    );
    let wanted = crate::Request { choices: 2, ..request(&prompt(40, 0), 10) };
    let mut failing = rig.submit(wanted.clone());
    let waiting = request(&prompt(40, 0), 2);
    let mut spared = rig.submit(waiting.clone());
    rig.turns(2);
    assert!(!rig.turn());
    let events = failing.hear();
    let failures = |e: &&Event| matches!(e, Event::Failed(RequestError::Device(_)));
    assert_eq!(events.iter().filter(failures).count(), 1);
    assert!(failures(&events.last().unwrap()) && failing.events.is_closed());
    assert_eq!(rig.pool.used_len(), 0);
    rig.turns(2);
    expect_alone(&rig, &mut spared, &waiting);
}

/// The tokens of a conversation's next turn: the prompt, what was drawn, and something new.
fn next_turn(wanted: &crate::Request, new: u32) -> Vec<u32> {
    let (drawn, _) = alone(wanted, 0, 1000);
    [&wanted.prompt[..], &drawn, &prompt(9, new)].concat()
}

fn storing(limits: Limits) -> Rig {
    Rig::new(limits).storing(10_000)
}

/// A rig over the same store with an empty device: what a restart leaves.
fn restarted(rig: Rig, limits: Limits) -> Rig {
    let mut again = Rig::new(limits);
    again.store = rig.store;
    again.scheduler.tier = TierUse { spills: true, is_invariant: true };
    again
}

#[test]
fn a_conversation_goes_on_from_stored_pages_and_its_tail() {
    for groups in [&[40][..], &[40, 30]] {
        for len in [30, 31, 32, 33, 63, 64, 65, 100] {
            let mut rig = storing(limits(groups));
            let first = request(&prompt(len, 0), 7);
            let _first = rig.submit(first.clone());
            rig.drain();
            let mut rig = restarted(rig, limits(groups));
            let second = request(&next_turn(&first, 3), 12);
            let mut client = rig.submit(second.clone());
            rig.drain();
            let events = client.hear();
            let (want, _) = alone(&second, 0, 1000);
            assert_eq!(tokens(&events, 0), want);
            // All but the last token that was drawn had keys and values.
            let had = len + 6;
            let kv = report(&events);
            assert_eq!((kv.state, kv.cached_tokens, kv.restored_tokens), (KvState::Exact, had, had), "{len}");
        }
    }
}

#[test]
fn a_page_that_is_gone_is_computed_again_and_stored_again() {
    let mut rig = storing(limits(&[40]));
    let first = request(&prompt(150, 0), 5);
    let _kept = rig.submit(first.clone());
    rig.drain();
    let mut rig = restarted(rig, limits(&[40]));
    let second = request(&next_turn(&first, 3), 12);
    let mut client = rig.submit(second.clone());
    rig.turns(1);
    // Between the look-up and the read, the pages went: a tenant's quota, say.
    let store = rig.store.as_ref().unwrap();
    let tenant = store.tenant("t").unwrap().id;
    store.set_quota(tenant, mainstay_store::Quota { page_bytes: 2 * 8192, ..Default::default() });
    store.maintain().unwrap();
    store.set_quota(tenant, mainstay_store::Quota::default());
    rig.drain();
    let events = client.hear();
    assert_eq!(tokens(&events, 0), alone(&second, 0, 1000).0);
    let kv = report(&events);
    assert_eq!((kv.state, kv.reason, kv.restored_tokens), (KvState::Exact, Some("absent"), 64));
    let mut rig = restarted(rig, limits(&[40]));
    let mut client = rig.submit(second.clone());
    rig.drain();
    assert_eq!(report(&client.hear()).restored_tokens, 160);
}

#[test]
fn a_prefix_that_is_being_loaded_is_loaded_once() {
    let mut rig = storing(limits(&[60]));
    let base = request(&prompt(200, 0), 1);
    let _kept = rig.submit(base.clone());
    rig.drain();
    let mut rig = restarted(rig, limits(&[60]));
    let forks: Vec<crate::Request> =
        (0..4).map(|i| request(&[&prompt(200, 0)[..], &prompt(5, i)].concat(), 6)).collect();
    let mut clients: Vec<Client> = forks.iter().map(|f| rig.submit(f.clone())).collect();
    let other = request(&prompt(20, 9), 3);
    let mut passing = rig.submit(other.clone());
    rig.turns(2);
    assert_eq!(rig.pending.len(), 1, "one load for all");
    assert_eq!(tokens(&passing.hear(), 0).len(), 2, "who needs no pages passes");
    rig.drain();
    for (client, fork) in clients.iter_mut().zip(&forks) {
        let events = client.hear();
        assert_eq!(tokens(&events, 0), alone(fork, 0, 1000).0);
        assert!(cached(&events) >= 192);
    }
    // Each fork may bring a tail page of its own; the six full pages came once.
    let restored = rig.scheduler.totals.restored_tokens;
    assert!((192..=192 + 4 * 8).contains(&restored), "{restored}");
}

#[test]
fn an_interrupted_answer_goes_on_as_if_it_never_had_been() {
    let whole = crate::Request {
        sampling: crate::SamplingRequest { repetition_penalty: 1.2, ..request(&[1], 1).sampling },
        ..request(&prompt(50, 0), 40)
    };
    let (want, reason) = alone(&whole, 0, 1000);
    for drawn in 1..40 {
        let mut rig = Rig::new(limits(&[40]));
        let mut client = rig.submit(crate::Request { drawn: want[..drawn].to_vec(), ..whole.clone() });
        rig.drain();
        let events = client.hear();
        assert_eq!(tokens(&events, 0), want[drawn..], "after {drawn}");
        assert!(matches!(events.last(), Some(Event::Finished { reason: found, .. }) if *found == reason));
    }
}

#[test]
fn an_ephemeral_request_stores_nothing() {
    let mut rig = storing(limits(&[40]));
    let mut quiet = request(&prompt(100, 0), 5);
    quiet.keep.durability = Durability::Ephemeral;
    let _kept = rig.submit(quiet.clone());
    rig.drain();
    let written =
        rig.store.as_ref().unwrap().page_counts().written.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(written, 0);
    // A request that keeps its pages stores those that it finds in memory too.
    let mut client = rig.submit(request(&prompt(100, 0), 5));
    rig.drain();
    assert_eq!(cached(&client.hear()), 96);
    let mut rig = restarted(rig, limits(&[40]));
    let mut client = rig.submit(request(&prompt(100, 0), 5));
    rig.drain();
    assert!(report(&client.hear()).restored_tokens >= 96);
}

#[test]
fn a_salt_and_a_tenant_part_pages() {
    let mut rig = storing(limits(&[40]));
    let _kept = rig.submit(request(&prompt(100, 0), 5));
    rig.drain();
    for other in [
        crate::Request { tenant: "u".into(), ..request(&prompt(100, 0), 5) },
        crate::Request {
            keep: crate::Keep { salt: b"s".to_vec(), ..Default::default() },
            ..request(&prompt(100, 0), 5)
        },
    ] {
        let mut client = rig.submit(other);
        rig.drain();
        let kv = report(&client.hear());
        assert_eq!((kv.state, kv.reason, kv.cached_tokens), (KvState::Cold, None, 0));
    }
}
