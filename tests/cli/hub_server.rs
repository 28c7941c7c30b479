//! A hub on the loopback address: the routes that models are fetched by, and the ways in which they fail.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

/// What `main` is.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// What `v1` is: another config.json, and all other files as they are.
pub(crate) const OLD_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
pub(crate) const OLD_CONFIG: &[u8] = b"{\"old\": true}";

/// How the hub behaves.
#[derive(Clone, Default)]
pub(crate) struct Manners {
    /// The token that it asks for.
    pub(crate) token: Option<&'static str>,
    /// Each GET of the named file sends at most so many bytes and then breaks the connection; the last number stays.
    pub(crate) cuts: Vec<(&'static str, Vec<usize>)>,
    /// Sends the whole file where a range was asked for.
    pub(crate) ignores_ranges: bool,
    /// Has no route for the tree of a commit.
    pub(crate) no_tree: bool,
    /// Sends other bytes than its etags promise.
    pub(crate) lies: bool,
    /// Lets nobody read the model, whatever the token.
    pub(crate) is_gated: bool,
}

/// A request as the hub saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
}

type Files = BTreeMap<&'static str, Vec<u8>>;

/// Serves the repository `org/name` at one commit until the test ends.
pub(crate) struct Hub {
    pub(crate) endpoint: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    manners: Arc<Mutex<Manners>>,
}

impl Hub {
    pub(crate) fn start(files: Files, manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("a listener has an address"));
        let (asked, manners) = (Arc::default(), Arc::new(Mutex::new(manners)));
        let hub = Self { endpoint, asked: Arc::clone(&asked), manners: Arc::clone(&manners) };
        thread::spawn(move || {
            let files = Arc::new(files);
            for stream in listener.incoming().flatten() {
                let (files, asked, manners) = (Arc::clone(&files), Arc::clone(&asked), Arc::clone(&manners));
                // a client that goes away is its own business
                thread::spawn(move || answer(stream, &files, &asked, &manners));
            }
        });
        hub
    }

    /// The same hub for a client that has no network. Nothing listens on port 1 (tcpmux) of this machine.
    pub(crate) fn unreachable(self) -> Self {
        Self { endpoint: "http://127.0.0.1:1".into(), ..self }
    }

    /// Changes its manners from the next request on.
    pub(crate) fn behave(&self, manners: Manners) {
        *self.manners.lock().unwrap() = manners;
    }

    /// What was asked since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn answer(
    stream: TcpStream,
    files: &Files,
    log: &Mutex<Vec<Asked>>,
    manners: &Mutex<Manners>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let path = path.split('?').next().unwrap_or_default().to_owned();
    let asked = Asked { method, path, range: headers.get("range").cloned() };
    log.lock().unwrap().push(asked.clone());
    let manners_now = manners.lock().unwrap().clone();
    let wanted = manners_now.token.map(|token| format!("Bearer {token}"));
    if wanted.is_some() && headers.get("authorization") != wanted.as_ref() {
        return whole(stream, 401, br#"{"error": "Invalid credentials"}"#);
    }
    if manners_now.is_gated {
        return whole(stream, 403, br#"{"error": "Access to model org/name is restricted"}"#);
    }
    let commit =
        if asked.path.contains(OLD_COMMIT) || asked.path.ends_with("/v1") { OLD_COMMIT } else { COMMIT };
    let mut files = files.clone();
    if let Some(config) = files.get_mut("config.json").filter(|_| commit == OLD_COMMIT) {
        *config = OLD_CONFIG.to_vec();
    }
    let tree = format!("/api/models/org/name/tree/{commit}");
    match asked.path.as_str() {
        "/api/models/org/name/revision/main" | "/api/models/org/name/revision/v1" => {
            let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
            let info = json!({"id": "org/name", "sha": commit, "siblings": siblings});
            whole(stream, 200, info.to_string().as_bytes())
        }
        path if path == tree && !manners_now.no_tree => {
            let entry = |(name, bytes): (&&str, &Vec<u8>)| json!({"type": "file", "path": name, "size": bytes.len(), "oid": etag(bytes)});
            let entries: Vec<_> = files.iter().map(entry).collect();
            whole(stream, 200, json!(entries).to_string().as_bytes())
        }
        path => {
            let name = path.strip_prefix(&format!("/org/name/resolve/{commit}/")).unwrap_or_default();
            match files.get(name) {
                Some(bytes) => file(stream, &asked, (name, bytes), manners),
                None => whole(stream, 404, br#"{"error": "Not found"}"#),
            }
        }
    }
}

fn whole(mut stream: TcpStream, status: u16, body: &[u8]) -> std::io::Result<()> {
    let len = body.len();
    let head = "Content-Type: application/json\r\nConnection: close";
    write!(stream, "HTTP/1.1 {status} X\r\n{head}\r\nContent-Length: {len}\r\n\r\n")?;
    stream.write_all(body)
}

fn file(
    mut stream: TcpStream,
    asked: &Asked,
    (name, bytes): (&str, &[u8]),
    manners: &Mutex<Manners>,
) -> std::io::Result<()> {
    let (cut, ignores_ranges, lies) = {
        let mut manners = manners.lock().unwrap();
        let cuts = manners.cuts.iter_mut().find(|(cut, _)| *cut == name).map(|(_, cuts)| cuts);
        let cut = cuts.filter(|_| asked.method == "GET").and_then(|cuts| match cuts.len() {
            0 => None,
            1 => Some(cuts[0]),
            _ => Some(cuts.remove(0)),
        });
        (cut, manners.ignores_ranges, manners.lies)
    };
    let start = asked
        .range
        .as_deref()
        .filter(|_| !ignores_ranges)
        .and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse::<usize>().ok());
    let mut body = bytes[start.unwrap_or(0)..].to_vec();
    if lies {
        body.iter_mut().for_each(|b| *b = !*b);
    }
    let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
    let (len, tag) = (body.len(), etag(bytes));
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len}\r\nETag: \"{tag}\"\r\n")?;
    write!(stream, "X-Repo-Commit: {COMMIT}\r\nAccept-Ranges: bytes\r\n\r\n")?;
    if asked.method == "GET" {
        stream.write_all(&body[..cut.unwrap_or(len).min(len)])?;
    }
    Ok(())
}

/// SHA-256, as hubs give it for large files.
fn etag(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
