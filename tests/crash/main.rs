//! A real server under load, killed at random moments and at every step of its writing: no acknowledged turn is lost,
//! and whatever it says afterwards is what a server says that never ended.

mod client;
mod oracle;
#[path = "../cli/program.rs"]
#[expect(dead_code, reason = "a crash test speaks HTTP in its own way")]
mod program;

use std::process::{Command, Stdio};
use std::time::Duration;

use oracle::Client;
use program::{Scratch, Server, mainstay};

const CYCLES_IN_CI: usize = 200;
/// Turns before a client begins another session.
const TURNS_MAX: usize = 25;
const LEVELS: [&str; 4] = ["async", "turn", "full", "async"];

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn command(dir: &Scratch) -> Command {
    let mut command = mainstay(&["serve", "--port", "0", "--kv-memory", "24M", "--segment-bytes", "1M"]);
    command.args(["--journal-interval-ms", "1", "--data-dir"]).arg(&dir.0).stderr(Stdio::null());
    command
}

fn start(dir: &Scratch) -> Server {
    Server::spawn(command(dir))
}

/// Everybody talks until the server is gone.
fn load(clients: &mut [Client], server: Server, millis: u64) {
    let address = server.address.clone();
    std::thread::scope(|scope| {
        for (i, client) in clients.iter_mut().enumerate() {
            let address = &address;
            scope.spawn(move || {
                if client.create(address).is_none() {
                    return;
                }
                while client.known < TURNS_MAX && client.turn(address, i % 2 == 1).is_some() {}
            });
        }
        std::thread::sleep(Duration::from_millis(millis));
        // SIGKILL; dropping waits for the end.
        drop(server);
    });
}

#[test]
fn a_server_killed_at_any_moment_loses_no_acknowledged_turn() {
    let cycles = std::env::var("CRASH_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(CYCLES_IN_CI);
    let seed = std::env::var("CRASH_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (dir, mut random) = (Scratch::new(), Random(seed));
    let mut begun = 0;
    let mut next = |level: &'static str| {
        begun += 1;
        Client::new(format!("client-{begun}"), level)
    };
    let mut clients: Vec<Client> = LEVELS.into_iter().map(&mut next).collect();
    let (mut ended, mut resumed) = (Vec::new(), 0);
    for _ in 0..cycles {
        load(&mut clients, start(&dir), 2 + random.below(120));
        let server = start(&dir);
        for client in &mut clients {
            client.check(&server.address);
            if random.below(2) == 0 {
                resumed += usize::from(client.resume(&server.address));
            }
            if client.known >= TURNS_MAX {
                ended.push(std::mem::replace(client, next(client.durability)));
            }
        }
        // Every other time the check's own server is killed too, at rest.
        if random.below(2) == 0 {
            server.signal("TERM");
            assert_eq!(server.wait().0, Some(0));
        }
    }
    ended.extend(clients);
    let turns: usize = ended.iter().map(|client| client.acknowledged.len()).sum();
    assert!(turns >= cycles && resumed > cycles / 20, "{turns} turns, {resumed} answers resumed");
    let golden = Scratch::new();
    let server = start(&golden);
    ended.iter().for_each(|client| client.replay(&server.address));
}

#[test]
fn a_server_killed_at_every_step_of_its_writing_loses_no_acknowledged_turn() {
    let golden = Scratch::new();
    let unbroken = start(&golden);
    let mut at = 0;
    loop {
        at += 1;
        let dir = Scratch::new();
        let mut clients = [Client::new("turn".to_owned(), "turn"), Client::new("full".to_owned(), "full")];
        let died = !script(&dir, at, &mut clients);
        if died {
            let server = start(&dir);
            clients.iter_mut().for_each(|client| client.check(&server.address));
            clients.iter_mut().for_each(|client| {
                client.resume(&server.address);
            });
            if at % 10 == 0 {
                for client in &mut clients {
                    client.name = format!("{}-{at}", client.name);
                }
            }
        } else {
            assert!(at > 100, "only {at} steps of writing were seen");
            clients.iter().for_each(|client| client.replay(&unbroken.address));
            return;
        }
    }
}

/// A few turns on a server that ends itself at a step; `true` where it lived to the end and closed.
fn script(dir: &Scratch, at: usize, clients: &mut [Client]) -> bool {
    let mut command = command(dir);
    command.env("MAINSTAY_CRASH_AT", at.to_string());
    let Some(server) = Server::try_spawn(command) else { return false };
    for client in clients.iter_mut() {
        if client.create(&server.address).is_none() {
            return false;
        }
    }
    for turn in 0..3 {
        for client in clients.iter_mut() {
            if client.turn(&server.address, turn % 2 == 1).is_none() {
                return false;
            }
        }
    }
    server.signal("TERM");
    server.wait().0 == Some(0)
}
