//! Load against a server made of clocks.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::*;

/// Answers after a tenth of a second, then a token every hundredth; remembers what it was asked and how many at a time.
#[derive(Default)]
struct Clock {
    keeps: bool,
    /// Which request fails, from 0.
    fails: Option<usize>,
    seen: Mutex<Vec<Call>>,
    now: Mutex<(usize, usize)>,
}

impl Target for Clock {
    fn keeps_conversations(&self) -> bool {
        self.keeps
    }

    async fn send(self: Arc<Self>, call: Call) -> Outcome {
        let number = {
            let mut seen = self.seen.lock().unwrap();
            seen.push(call.clone());
            seen.len() - 1
        };
        {
            let mut now = self.now.lock().unwrap();
            now.0 += 1;
            now.1 = now.1.max(now.0);
        }
        let begun = Instant::now();
        sleep(Duration::from_millis(100)).await;
        let first_s = Some(begun.elapsed().as_secs_f64());
        let gaps = call.output_tokens - 1;
        sleep(Duration::from_millis(10 * gaps as u64)).await;
        self.now.lock().unwrap().0 -= 1;
        Outcome {
            first_s,
            gaps_s: vec![0.01; gaps],
            total_s: begun.elapsed().as_secs_f64(),
            input_tokens: call.messages.iter().map(|(_, text)| text.split(' ').count()).sum(),
            output_tokens: call.output_tokens,
            cached_tokens: Some(0),
            text: format!("answer {number}"),
            error: (self.fails == Some(number)).then(|| "refused".to_owned()),
        }
    }
}

fn sizes(requests: usize, turns: usize) -> Sizes {
    Sizes { requests, input: 20, output: 11, prefix: 30, groups: 2, turns, pause_s: 1.0, seed: 1 }
}

fn load(workload: Workload, requests: usize, turns: usize, arrivals: Arrivals) -> Load {
    let words = Words { tokens_each: 1.0, tokens_around: 0.0 };
    let conversations = workload.conversations(&sizes(requests, turns), &words);
    Load { conversations, arrivals, clients_max: None, limit_s: 100.0, seed: 1 }
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 0.02, "expected {expected}, found {found}");
}

#[tokio::test(start_paused = true)]
async fn a_closed_loop_keeps_its_clients_busy() {
    let target = Arc::new(Clock::default());
    let mut told = Vec::new();
    let load = load(Workload::Fixed, 9, 1, Arrivals::Closed { clients: 3 });
    let loaded = run(target.clone(), load, |done| told.push(done)).await;
    // three rounds of 0.1 s and 10 tokens
    near(loaded.duration_s, 0.6);
    assert_eq!((loaded.records.len(), loaded.unsent, target.now.lock().unwrap().1), (9, 0, 3));
    assert_eq!(told, (1..=9).collect::<Vec<_>>());
    let summary = Summary::of(&loaded.records, loaded.duration_s, &[]);
    assert_eq!((summary.completed, summary.concurrent_max, summary.output_tokens), (9, 3, 99));
    near(summary.ttft.p50, 100.0);
    near(summary.tpot.p99, 10.0);
    near(summary.e2el.mean, 200.0);
}

#[tokio::test(start_paused = true)]
async fn open_arrivals_do_not_wait_and_bounded_ones_queue() {
    let trace = Arrivals::Trace { seconds: vec![0.0, 0.05, 0.1, 2.0] };
    let mut load = load(Workload::Fixed, 4, 1, trace);
    let loaded = run(Arc::new(Clock::default()), load.clone(), |_| ()).await;
    let starts: Vec<f64> = loaded.records.iter().map(|r| r.start_s).collect();
    starts.iter().zip([0.0, 0.05, 0.1, 2.0]).for_each(|(found, expected)| near(*found, expected));
    near(loaded.duration_s, 2.2);
    load.clients_max = Some(1);
    let loaded = run(Arc::new(Clock::default()), load, |_| ()).await;
    let queued: Vec<f64> = loaded.records.iter().map(|r| r.queue_s).collect();
    queued.iter().zip([0.0, 0.15, 0.3, 0.0]).for_each(|(found, expected)| near(*found, expected));
}

#[tokio::test(start_paused = true)]
async fn turns_follow_answers_and_pauses_and_carry_what_was_said() {
    let target = Arc::new(Clock::default());
    let loaded =
        run(target.clone(), load(Workload::Agent, 3, 3, Arrivals::Closed { clients: 1 }), |_| ()).await;
    near(loaded.duration_s, 3.0 * 0.2 + 2.0);
    let seen = target.seen.lock().unwrap();
    let roles: Vec<&str> = seen[2].messages.iter().map(|(role, _)| role.name()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant", "user"]);
    assert_eq!(seen[2].messages[..2], seen[0].messages[..]);
    assert_eq!(seen[2].messages[4].1, "answer 1");
    assert_eq!(loaded.records.iter().map(|r| r.turn).collect::<Vec<_>>(), [0, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_keeps_conversations_hears_only_what_is_new() {
    let target = Arc::new(Clock { keeps: true, ..Clock::default() });
    run(target.clone(), load(Workload::Chat, 2, 2, Arrivals::Closed { clients: 1 }), |_| ()).await;
    let lens: Vec<usize> = target.seen.lock().unwrap().iter().map(|call| call.messages.len()).collect();
    assert_eq!(lens, [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_ends_its_conversation_alone() {
    let target = Arc::new(Clock { fails: Some(0), ..Clock::default() });
    let loaded = run(target, load(Workload::Chat, 6, 3, Arrivals::Closed { clients: 1 }), |_| ()).await;
    assert_eq!((loaded.records.len(), loaded.unsent), (4, 2));
    let summary = Summary::of(&loaded.records, loaded.duration_s, &[]);
    assert_eq!((summary.completed, summary.failed), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn the_limit_cuts_what_runs_and_counts_it_as_failed() {
    let mut load = load(Workload::Fixed, 10, 1, Arrivals::Closed { clients: 2 });
    load.limit_s = 0.5;
    let loaded = run(Arc::new(Clock::default()), load, |_| ()).await;
    near(loaded.duration_s, 0.5);
    let cut: Vec<&Record> = loaded.records.iter().filter(|r| r.outcome.error.is_some()).collect();
    assert_eq!((loaded.records.len(), cut.len(), loaded.unsent), (6, 2, 4));
    near(cut[0].outcome.total_s, 0.1);
}

#[tokio::test(start_paused = true)]
async fn a_result_has_the_fields_that_other_tools_read() {
    let arrivals = Arrivals::Poisson { rate: 10.0 };
    let load = load(Workload::Random, 20, 1, arrivals.clone());
    let loaded = run(Arc::new(Clock::default()), load, |_| ()).await;
    let slos = [Slo::Ttft(500.0)];
    let about = About {
        date: "20261127-120000".into(),
        model: "m".into(),
        server: "in this process".into(),
        workload: "random",
        arrivals: &arrivals,
        clients_max: Some(64),
        slos: &slos,
        requests: 20,
        foreign_cpu_share: Some(0.25),
        joules: Some(50.0),
        price_per_hour: Some(2.0),
    };
    let found = json(&about, &loaded);
    let schema = include_str!("fields.txt");
    for line in schema.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, kind) = line.split_once(' ').unwrap();
        let value = &found[name];
        let fits = match kind {
            "text" => value.is_string(),
            "number" => value.is_number(),
            "count" => value.is_u64(),
            "numbers" => value.as_array().is_some_and(|list| list.len() == 20 && list[0].is_number()),
            "lists" => value.as_array().is_some_and(|list| list.len() == 20 && list[0].is_array()),
            "texts" => value.as_array().is_some_and(|list| list.len() == 20 && list[0].is_string()),
            other => panic!("{name}: no such kind: {other}"),
        };
        assert!(fits, "{name}: expected {kind}, found {value}");
    }
    let known =
        schema.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(' ').next());
    let known: Vec<&str> = known.collect();
    let more: Vec<&String> =
        found.as_object().unwrap().keys().filter(|key| !known.contains(&key.as_str())).collect();
    assert!(more.is_empty(), "fields that fields.txt lacks: {more:?}");
    assert_eq!((&found["completed"], &found["request_rate"]), (&20.into(), &10.0.into()));
    assert_eq!(found["joules_per_output_token"], 50.0 / found["total_output_tokens"].as_f64().unwrap());
    let text = table(&[(&about, &loaded)]);
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    assert!(text.contains("10/s Poisson") && text.contains("20/20"), "{text}");
    // without bounds, energy and price, they are absent or null, and never zero
    let bare = About { slos: &[], joules: None, price_per_hour: None, foreign_cpu_share: None, ..about };
    let found = json(&bare, &loaded);
    assert!(found["request_goodput"].is_null() && found.get("joules_per_output_token").is_none(), "{found}");
    assert!(found.get("cost_per_million_output_tokens").is_none());
}
