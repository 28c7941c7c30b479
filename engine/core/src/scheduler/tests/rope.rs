//! Sequences that grow beyond what the first of a model's rope tables is for.

use mainstay_backend_api::echo::EchoExecutor;

use super::rig::Hashed;
use super::*;

/// Longest sequence that turns by the first table: in the middle of a page.
const SWITCH: usize = 70;

/// The echo of a page depends on the table by which it was written, so that what is mixed draws other tokens.
fn switching(pages: &[usize]) -> Rig {
    let limits = limits(pages);
    Rig::over(EchoExecutor::new(VOCAB, limits.clone()).switching_at(SWITCH), limits)
}

/// Runs to the end; each chunk's table, first position and end.
fn watch(rig: &mut Rig) -> Vec<(usize, usize, usize)> {
    let mut seen = Vec::new();
    while !rig.scheduler.is_idle() {
        rig.turns(1);
        while !rig.asked.is_empty() {
            rig.mask(0);
        }
        while !rig.pending.is_empty() {
            rig.deliver(0, 1);
        }
        seen.extend(rig.step.chunks.iter().map(|c| (c.rope_table, c.position, c.position + c.tokens.len())));
    }
    rig.drain();
    seen
}

#[test]
fn a_sequence_that_outgrows_its_table_is_computed_anew_by_the_other() {
    let mut rig = switching(&[20]);
    let wanted = request(&prompt(60, 0), 40);
    let mut client = rig.submit(wanted.clone());
    let seen = watch(&mut rig);
    // 60 tokens and those drawn up to the 70th by the first table; all of 71, in two steps, by the second; then on.
    let first = seen.iter().take_while(|chunk| chunk.0 == 0).count();
    assert_eq!(seen[first - 1], (0, 69, 70));
    assert_eq!(seen[first..first + 3], [(1, 0, 64), (1, 64, 71), (1, 71, 72)]);
    assert!(seen[first..].iter().all(|chunk| chunk.0 == 1));
    let events = client.hear();
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Started { .. })).count(), 1);
    assert_eq!(tokens(&events, 0), alone(&wanted, 0, 1000).0);
    assert_eq!(rig.scheduler.totals.preemptions, 0);
}

#[test]
fn guesses_end_where_the_table_does() {
    for len in 55..63 {
        let mut rig = switching(&[20]);
        rig.scheduler.pace = Some(Pace::default());
        let mut wanted = request(&prompt(len, 0), 40);
        // Always the same word, which is guessed.
        wanted.sampling.logit_bias = vec![(5, 100.0)];
        let mut client = rig.submit(wanted.clone());
        let seen = watch(&mut rig);
        let guessed = |chunk: &&(usize, usize, usize)| chunk.1 >= len && chunk.2 - chunk.1 > 1;
        assert!(seen.iter().filter(guessed).any(|chunk| chunk.0 == 0), "{seen:?}");
        assert!(
            seen.iter().all(|chunk| chunk.0 == usize::from(chunk.2 > SWITCH) || chunk.0 == 1),
            "{seen:?}"
        );
        expect_alone(&rig, &mut client, &wanted);
    }
}

#[test]
fn a_prompt_in_chunks_turns_by_the_table_of_all_of_it() {
    for (len, table) in [(SWITCH, 0), (SWITCH + 1, 1), (200, 1)] {
        let mut rig = switching(&[20]);
        let wanted = request(&prompt(len, 0), 1);
        let mut client = rig.submit(wanted.clone());
        let seen = watch(&mut rig);
        assert!(seen.len() > 1 && seen.iter().all(|chunk| chunk.0 == table), "{len}: {seen:?}");
        expect_alone(&rig, &mut client, &wanted);
    }
}

#[test]
fn pages_are_found_by_sequences_of_their_table_only() {
    let mut rig = switching(&[40]);
    let text = prompt(200, 0);
    let mut cached_of = |len: usize, count: usize| {
        let wanted = request(&text[..len], count);
        let mut client = rig.submit(wanted.clone());
        rig.drain();
        let events = client.hear();
        assert_eq!(tokens(&events, 0), alone(&wanted, 0, 1000).0);
        cached(&events)
    };
    assert_eq!(cached_of(66, 2), 0);
    assert_eq!(cached_of(66, 2), 64);
    assert_eq!(cached_of(150, 2), 0, "a long one has no use for the pages of a short one");
    assert_eq!(cached_of(150, 2), 128);
    assert_eq!(cached_of(66, 2), 64);
    // On the way across it finds what is there of the other table.
    assert_eq!(cached_of(67, 20), 64);
}

#[test]
fn choices_cross_each_for_itself_and_grammars_go_along() {
    let mut rig = switching(&[40]);
    let mut wanted = crate::Request { choices: 3, ..request(&prompt(SWITCH - 1, 0), 30) };
    let mut client = rig.submit(wanted.clone());
    watch(&mut rig);
    expect_alone(&rig, &mut client, &wanted);
    wanted.grammar = Some(Arc::new(Hashed { len: 25 }));
    let mut client = rig.submit(wanted.clone());
    watch(&mut rig);
    expect_alone(&rig, &mut client, &wanted);
}

#[test]
fn sequences_cross_while_pages_are_short() {
    let mut rig = switching(&[9]);
    let wanted: Vec<_> = (0..4).map(|i| request(&prompt(50 + i, i as u32), 60)).collect();
    let mut clients: Vec<Client> = wanted.iter().map(|w| rig.submit(w.clone())).collect();
    rig.drain();
    assert!(rig.scheduler.totals.preemptions > 0);
    clients.iter_mut().zip(&wanted).for_each(|(c, w)| expect_alone(&rig, c, w));
}

#[test]
fn a_last_token_changes_no_table() {
    let mut rig = switching(&[20]);
    let mut client = rig.submit(request(&prompt(60, 0), SWITCH + 1 - 60));
    let seen = watch(&mut rig);
    assert_eq!(tokens(&client.hear(), 0).len(), 11);
    assert_eq!(seen.last(), Some(&(0, 69, 70)), "the 71st token is not computed");
}

#[test]
fn stored_pages_are_those_of_the_table() {
    let mut rig = switching(&[60]).storing(10_000);
    let mut turn = |text: &[u32], count: usize| {
        let wanted = request(text, count);
        let mut client = rig.submit(wanted.clone());
        rig.drain();
        let events = client.hear();
        assert_eq!(tokens(&events, 0), alone(&wanted, 0, 5000).0);
        // Nothing is left on the device, so that the next turn reads what is stored.
        let mut other = rig.submit(request(&prompt(59 * PAGE_TOKENS - 2, 1), 1));
        rig.drain();
        other.hear();
        ([text, &tokens(&events, 0)].concat(), report(&events))
    };
    let (text, kv) = turn(&prompt(40, 0), 8);
    assert_eq!((kv.restored_tokens, kv.reason), (0, None));
    let (text, kv) = turn(&text, 8);
    assert_eq!((kv.restored_tokens, kv.reason), (47, None));
    // This turn draws its way across the switch.
    let (text, kv) = turn(&text, 40);
    assert_eq!((kv.restored_tokens, kv.reason), (55, None));
    let (text, kv) = turn(&text, 8);
    assert_eq!(
        (kv.restored_tokens, kv.reason),
        (text.len() - 8 - 1, None),
        "its pages are of the second table"
    );
    // This one begins beyond it.
    let short = prompt(50, 3);
    let (short, _) = turn(&short, 8);
    let (_, kv) = turn(&[&short[..], &prompt(30, 4)].concat(), 8);
    assert_eq!((kv.restored_tokens, kv.state, kv.reason), (0, KvState::Cold, Some("rope_table")));
    let (_, kv) = turn(&[&text[..], &[1]].concat(), 8);
    assert!(kv.restored_tokens > 64);
}
