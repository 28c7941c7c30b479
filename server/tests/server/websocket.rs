//! Responses over a WebSocket, frame by frame.

use std::net::SocketAddr;
use std::sync::mpsc::channel;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::lifecycle::drained;
use crate::sessions::with_store;
use crate::testbed::{Directory, MODEL, Setup, start};

/// One end of a connection.
struct Socket {
    stream: TcpStream,
}

impl Socket {
    async fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = "GET /v1/responses HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.unwrap());
        }
        let answer = String::from_utf8(answer).unwrap().to_lowercase();
        assert!(answer.starts_with("http/1.1 101 "), "{answer}");
        assert!(answer.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{answer}");
        Self { stream }
    }

    /// Sends a text, masked as a client's has to be, with zeros.
    async fn send(&mut self, message: &Value) {
        let text = message.to_string();
        let length = u16::try_from(text.len()).unwrap();
        let mut frame = vec![0x81, 0x80 | 126];
        frame.extend(length.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(text.as_bytes());
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The next message; nothing where the server has closed.
    async fn next(&mut self) -> Option<Value> {
        let kind = self.stream.read_u8().await.ok()?;
        let length = match self.stream.read_u8().await.unwrap() {
            126 => u64::from(self.stream.read_u16().await.unwrap()),
            127 => self.stream.read_u64().await.unwrap(),
            short => u64::from(short),
        };
        let mut text = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut text).await.unwrap();
        (kind == 0x81).then(|| serde_json::from_slice(&text).unwrap())
    }

    /// The events of a response, or the error in its place.
    async fn ask(&mut self, patch: Value) -> Vec<Value> {
        self.send(&create(patch)).await;
        self.events().await
    }

    async fn events(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            let kind = event["type"].as_str().unwrap().to_owned();
            events.push(event);
            if ["error", "response.completed", "response.incomplete", "response.failed"]
                .contains(&kind.as_str())
            {
                break;
            }
        }
        events
    }
}

fn create(patch: Value) -> Value {
    let mut message = json!({
        "type": "response.create", "model": MODEL, "input": "hello", "max_output_tokens": 8, "temperature": 0,
        "ignore_eos": true,
    });
    message.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    message
}

#[tokio::test]
async fn responses_come_one_after_the_other() {
    let directory = Directory::new();
    let server = start(with_store(&directory)).await;
    let mut socket = Socket::open(server.address).await;
    let events = socket.ask(json!({"store": false})).await;
    assert_eq!(events[0]["type"], "response.created");
    assert!((0..).zip(&events).all(|(at, event)| event["sequence_number"] == at), "{events:?}");
    let first = &events.last().unwrap()["response"];
    assert_eq!(first["status"], "incomplete");
    let chained = json!({"store": false, "previous_response_id": first["id"]});
    let events = socket.ask(chained.clone()).await;
    let second = &events.last().unwrap()["response"];
    assert_eq!(second["previous_response_id"], first["id"]);
    assert!(second["usage"]["input_tokens"].as_u64() > first["usage"]["input_tokens"].as_u64());

    let error = &socket.ask(json!({"temperature": 9})).await[0];
    assert_eq!((&error["status"], &error["error"]["param"]), (&json!(400), &json!("temperature")));
    assert_eq!(socket.ask(json!({})).await.last().unwrap()["type"], "response.incomplete");

    // What could not be gone on from is not kept.
    let result = json!([{"type": "function_call_output", "call_id": "none", "output": "x"}]);
    let kept = socket.ask(json!({"store": false})).await.last().unwrap()["response"].clone();
    let again = json!({"store": false, "previous_response_id": kept["id"]});
    let mut failing = again.clone();
    failing["input"] = result;
    assert_eq!(socket.ask(failing).await[0]["error"]["param"], "input[0].call_id");
    assert_eq!(socket.ask(again).await[0]["error"]["code"], "previous_response_not_found");

    // What was not to be stored is gone with its connection.
    let mut other = Socket::open(server.address).await;
    drop(socket);
    loop {
        let events = other.ask(chained.clone()).await;
        if events[0]["type"] == "error" {
            assert_eq!(events[0]["error"]["code"], "previous_response_not_found");
            break;
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_stops_its_response() {
    let (gate, blocked) = channel();
    let directory = Directory::new();
    let server = start(Setup { gate: Some(blocked), ..with_store(&directory) }).await;
    (0..4).for_each(|_| gate.send(()).unwrap());
    let mut socket = Socket::open(server.address).await;
    socket.send(&create(json!({"max_output_tokens": 1900}))).await;
    while socket.next().await.unwrap()["type"] != "response.output_text.delta" {}
    drop(socket);
    drop(gate);
    server.idle().await;
    let made = server.engine.stats().generated_tokens;
    assert!(made < 1900, "it ran to its end: {made}");
}

#[tokio::test]
async fn going_down_waits_for_a_response_and_for_nothing_else() {
    let (gate, blocked) = channel();
    let directory = Directory::new();
    let server = start(Setup { gate: Some(blocked), ..with_store(&directory) }).await;
    let mut idle = Socket::open(server.address).await;
    let mut busy = Socket::open(server.address).await;
    busy.send(&create(json!({"max_output_tokens": 40}))).await;
    while server.engine.stats().running == 0 {
        tokio::task::yield_now().await;
    }
    server.trigger.advance();
    assert_eq!(idle.next().await, None);
    assert!(!server.task.is_finished());
    drop(gate);
    let events = busy.events().await;
    let last = &events.last().unwrap()["response"];
    assert_eq!((&last["status"], &last["usage"]["output_tokens"]), (&json!("incomplete"), &json!(40)));
    assert_eq!(busy.next().await, None);
    drained(server).await;
}
