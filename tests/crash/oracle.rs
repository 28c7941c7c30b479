//! What a server has acknowledged, and whether it still knows it.

use serde_json::{Value, json};

use crate::client;

/// One session as its client knows it.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) name: String,
    pub(crate) durability: &'static str,
    /// Answers that arrived whole: their token ids.
    pub(crate) acknowledged: Vec<Vec<u64>>,
    /// Turns that the server has and that were proven, the last acknowledged or not.
    pub(crate) known: usize,
}

/// What is sent in a turn: a function of session and turn, so that it can be sent again elsewhere.
pub(crate) fn turn_body(name: &str, turn: usize) -> Value {
    let facts = ["I like green.", "I live in Paris.", "My cat is called Tom.", "I am a baker."];
    let text = format!("{} This is message {turn} of {name}.", facts[(turn + name.len()) % facts.len()]);
    json!({
        "model": "mainstay-default",
        "session_mode": "append",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0.8,
        "seed": turn * 31 + name.len(),
        "max_tokens": 16 + turn % 7,
        "repetition_penalty": 1.1,
        "return_token_ids": true,
    })
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

impl Client {
    pub(crate) fn new(name: String, durability: &'static str) -> Self {
        Self { name, durability, acknowledged: Vec::new(), known: 0 }
    }

    /// Makes the session; one that is there already is taken.
    pub(crate) fn create(&self, address: &str) -> Option<()> {
        let body = json!({"name": self.name, "durability": self.durability});
        let (status, reply) = client::call(address, "POST", "/v1/sessions", Some(&body))?;
        assert!(status == 201 || status == 409, "{status}: {reply}");
        Some(())
    }

    /// Sends the next turn, whole or streamed. `None` where no whole answer came.
    pub(crate) fn turn(&mut self, address: &str, streams: bool) -> Option<()> {
        let turn = self.known;
        let mut body = turn_body(&self.name, turn);
        body["session_id"] = json!(self.name);
        body["expected_turn"] = json!(turn);
        let tokens = if streams {
            body["stream"] = json!(true);
            let events = client::events(address, "POST", "/v1/chat/completions", Some(&body)).ok()?;
            events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect()
        } else {
            let (status, reply) = client::call(address, "POST", "/v1/chat/completions", Some(&body))?;
            assert_eq!(status, 200, "{reply}");
            ids(&reply["choices"][0]["token_ids"])
        };
        self.acknowledged.push(tokens);
        self.known += 1;
        Some(())
    }

    /// Goes on with an answer that was interrupted, as its client would.
    pub(crate) fn resume(&mut self, address: &str) -> bool {
        let path = format!("/v1/sessions/{}", self.name);
        let Some((200, session)) = client::call(address, "GET", &path, None) else { return false };
        if session["in_flight"] != true {
            return false;
        }
        let path = format!("{path}/stream?after=0");
        let events = client::events(address, "GET", &path, None)
            .unwrap_or_else(|found| panic!("{}: expected the rest of the answer, found {found}", self.name));
        let tokens = events.iter().flat_map(|event| ids(&event["choices"][0]["token_ids"])).collect();
        self.acknowledged.push(tokens);
        self.known += 1;
        true
    }

    /// Compares what the server knows with what was acknowledged: nothing is missing, at most one turn more is there.
    pub(crate) fn check(&mut self, address: &str) {
        let path = format!("/v1/sessions/{}/turns?limit=100&include=tokens", self.name);
        let (status, reply) = client::call(address, "GET", &path, None).expect("a live server answers");
        if status == 404 {
            assert!(self.acknowledged.is_empty(), "{}: the session is lost", self.name);
            return;
        }
        let turns = reply["data"].as_array().expect("a list");
        let acknowledged = self.acknowledged.len();
        assert!(
            turns.len() >= acknowledged && turns.len() <= acknowledged + 1,
            "{} ({}): {acknowledged} turns were acknowledged, {} are there",
            self.name,
            self.durability,
            turns.len()
        );
        for (i, (turn, drawn)) in turns.iter().zip(&self.acknowledged).enumerate() {
            let tokens = ids(&turn["tokens"]);
            assert!(
                tokens.ends_with(drawn),
                "{}, turn {i}: {drawn:?} is not the end of {tokens:?}",
                self.name
            );
        }
        if let Some(turn) = turns.get(acknowledged) {
            // It was written, and its answer did not arrive: from here on it counts.
            let (tokens, sent) = (ids(&turn["tokens"]), turn["sent_tokens"].as_u64().expect("a count"));
            self.acknowledged.push(tokens[sent as usize..].to_vec());
        }
        self.known = self.acknowledged.len();
    }

    /// Sends all turns to a server that never ended: it must draw the same tokens.
    pub(crate) fn replay(&self, address: &str) {
        let golden = Client::new(format!("{}-golden", self.name), "ephemeral");
        golden.create(address).expect("a live server answers");
        for (turn, drawn) in self.acknowledged.iter().enumerate() {
            let mut body = turn_body(&self.name, turn);
            body["session_id"] = json!(golden.name);
            let reply = client::call(address, "POST", "/v1/chat/completions", Some(&body));
            let (status, reply) = reply.expect("a live server answers");
            assert_eq!(status, 200, "{reply}");
            let expected = ids(&reply["choices"][0]["token_ids"]);
            assert_eq!(
                *drawn, expected,
                "{}, turn {turn}: other tokens than an unbroken server's",
                self.name
            );
        }
    }
}
