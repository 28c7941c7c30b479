//! An HTTP client that takes a dying server for granted: whatever did not arrive whole is `None`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// Status and JSON of an answer that arrived whole.
pub(crate) fn call(address: &str, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
    let (status, text) = text(address, method, path, body)?;
    Some((status, serde_json::from_str(&text).ok()?))
}

/// The events of a stream that arrived whole, `[DONE]` included.
///
/// # Errors
/// What arrived instead.
pub(crate) fn events(
    address: &str,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<Vec<Value>, String> {
    let (status, text) = text(address, method, path, body).ok_or("no whole answer")?;
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let whole = data.split_last().filter(|(last, _)| status == 200 && **last == "[DONE]");
    let events = whole.and_then(|(_, events)| events.iter().map(|e| serde_json::from_str(e).ok()).collect());
    events.ok_or_else(|| format!("status {status}: {text}"))
}

fn text(address: &str, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    let head = format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).ok()?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let lower = head.to_ascii_lowercase();
    if lower.contains("transfer-encoding: chunked") {
        return Some((status, unchunk(body)?));
    }
    let len: usize = lower.split("content-length: ").nth(1)?.split("\r\n").next()?.trim().parse().ok()?;
    (body.len() == len).then(|| (status, body.to_owned()))
}

/// Chunked transfer coding (RFC 9112, 7.1), up to its end mark.
fn unchunk(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.push_str(after.get(..size)?);
        rest = after.get(size + 2..)?;
    }
}
