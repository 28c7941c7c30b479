//! Sessions as the API shows them, and what a client may choose of one.

use mainstay_engine::store::{At, Durability, NAME_BYTES_MAX, SessionId, SessionInfo, Settings, Turn};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::kv::durability_name;
use crate::openai::fields::{Fields, found, unexpected};
use crate::openai::session_fields::durability;
use crate::sessions::record::{SessionRecord, TurnRecord};
use crate::sessions::{id_or_name, shown};

/// Longest time to live, seconds: a hundred years.
const TTL_S_MAX: i64 = 100 * 365 * 24 * 60 * 60;
/// Bounds of `metadata`, as OpenAI has them: pairs, characters of a key, characters of a value.
const PAIRS_MAX: usize = 16;
const KEY_CHARS_MAX: usize = 64;
const VALUE_CHARS_MAX: usize = 512;
/// Names that a path could not tell from a route, or that clients take out of it.
const RESERVED_NAMES: [&str; 3] = ["import", ".", ".."];

/// A name for a session, if it can be one.
pub(crate) fn name(param: &str, text: &str) -> Result<String, ApiError> {
    let refuse = |expected: &str| Err(unexpected(param, expected, &json!(text)));
    if !(1..=NAME_BYTES_MAX).contains(&text.len()) || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return refuse(&format!("1 to {NAME_BYTES_MAX} printable ASCII characters"));
    }
    if id_or_name(text).parse::<SessionId>().is_ok() {
        return refuse("a name that does not look like an id");
    }
    if RESERVED_NAMES.contains(&text) {
        return refuse(&format!("another name than {}", RESERVED_NAMES.join(", ")));
    }
    Ok(text.to_owned())
}

/// What a request sets of a session. A field that it lacks stays as it is; one that it gives as null is taken away.
#[derive(Default)]
pub(crate) struct Wanted {
    name: Option<Option<String>>,
    ttl_ms: Option<Option<u64>>,
    durability: Option<Durability>,
    priority: Option<u8>,
    pinned: Option<bool>,
    metadata: Option<Map<String, Value>>,
}

impl Wanted {
    pub(crate) fn read(body: &Map<String, Value>) -> Result<Self, ApiError> {
        let fields = Fields::of(body);
        let is_null = |field: &str| body.get(field).is_some_and(Value::is_null);
        let named = fields.string("name")?.map(|text| name("name", text)).transpose()?;
        let ttl_ms = fields.integer("ttl", 1..=TTL_S_MAX)?.map(|seconds| seconds as u64 * 1000);
        let none = |field: &str| is_null(field).then(Map::new);
        Ok(Self {
            name: named.map(Some).or_else(|| is_null("name").then_some(None)),
            ttl_ms: ttl_ms.map(Some).or_else(|| is_null("ttl").then_some(None)),
            durability: level(&fields)?,
            priority: fields.integer("priority", 0..=255)?.map(|value| value as u8),
            pinned: fields.bool("pinned")?,
            metadata: metadata(&fields)?.or_else(|| none("metadata")),
        })
    }

    /// Refuses what cannot be changed of a session that exists.
    pub(crate) fn check_change(&self, old: Durability) -> Result<(), ApiError> {
        let is_ephemeral = |level| level == Durability::Ephemeral;
        match self.durability {
            Some(new) if is_ephemeral(new) != is_ephemeral(old) => {
                let expected = if is_ephemeral(old) { "ephemeral" } else { "async, turn or full" };
                let what = format!("expected {expected}, found {}", durability_name(new));
                Err(ApiError::field("durability", format!("{what}: whether a session is on disk stays")))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn apply(self, settings: &mut Settings) {
        let (name, ttl_ms) = (self.name, self.ttl_ms);
        settings.name = name.unwrap_or_else(|| settings.name.take());
        settings.ttl_ms = ttl_ms.unwrap_or(settings.ttl_ms);
        settings.durability = self.durability.unwrap_or(settings.durability);
        settings.priority = self.priority.unwrap_or(settings.priority);
        settings.pinned = self.pinned.unwrap_or(settings.pinned);
        if let Some(metadata) = self.metadata {
            let record = SessionRecord { metadata, ..SessionRecord::read(&settings.meta) };
            settings.meta = record.to_bytes();
        }
    }
}

fn level(fields: &Fields<'_, '_>) -> Result<Option<Durability>, ApiError> {
    let Some(value) = fields.get("durability") else { return Ok(None) };
    let level = value.as_str().and_then(durability);
    level.map(Some).ok_or_else(|| unexpected("durability", "ephemeral, async, turn or full", value))
}

pub(crate) fn metadata(fields: &Fields<'_, '_>) -> Result<Option<Map<String, Value>>, ApiError> {
    let Some(pairs) = fields.object("metadata")? else { return Ok(None) };
    if pairs.len() > PAIRS_MAX {
        let what = format!("expected at most {PAIRS_MAX} pairs, found {}", pairs.len());
        return Err(ApiError::field("metadata", what));
    }
    for (key, value) in pairs {
        let chars = key.chars().count();
        if !(1..=KEY_CHARS_MAX).contains(&chars) {
            let what = format!("expected keys of 1 to {KEY_CHARS_MAX} characters, found one of {chars}");
            return Err(ApiError::field("metadata", what));
        }
        let fits = value.as_str().is_some_and(|text| text.chars().count() <= VALUE_CHARS_MAX);
        if !fits {
            let expected = format!("a string of at most {VALUE_CHARS_MAX} characters");
            return Err(unexpected(format!("metadata.{key}"), &expected, value));
        }
    }
    Ok(Some(pairs.clone()))
}

/// What the store has of a session's keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredKv {
    pub(crate) tokens: usize,
    /// Why there is nothing, where that is known.
    pub(crate) reason: Option<&'static str>,
}

impl StoredKv {
    pub(crate) fn to_json(self) -> Value {
        let state = if self.tokens > 0 { "exact" } else { "cold" };
        json!({"state": state, "stored_tokens": self.tokens, "reason": self.reason})
    }
}

/// The object `session`.
pub(crate) fn session_object(info: &SessionInfo, kv: StoredKv) -> Value {
    let settings = &info.settings;
    // A pinned session does not expire.
    let expires_ms = info.expires_ms.filter(|_| !settings.pinned);
    json!({
        "id": shown(info.id),
        "object": "session",
        "name": settings.name,
        "model": settings.model,
        "created_at": info.created_ms / 1000,
        "last_used_at": info.used_ms / 1000,
        "expires_at": expires_ms.map(|ms| ms / 1000),
        "turn_count": info.turn_count,
        "token_count": info.token_count,
        "parent": info.parent.map(|(id, turn)| json!({"id": shown(id), "turn": turn})),
        "pinned": settings.pinned,
        "priority": settings.priority,
        "durability": durability_name(settings.durability),
        "ttl": settings.ttl_ms.map(|ms| ms / 1000),
        "metadata": SessionRecord::read(&settings.meta).metadata,
        "in_flight": info.in_flight,
        "damaged": info.is_damaged,
        "kv": kv.to_json(),
    })
}

/// Whether a turn is shown with its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TurnTokens {
    Left,
    Shown,
}

/// The object `session.turn`. Of a turn that was cut, the messages are not known.
pub(crate) fn turn_object(turn: &Turn, tokens: TurnTokens) -> Value {
    let record = TurnRecord::read(&turn.meta);
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let mut object = json!({
        "object": "session.turn",
        "number": turn.number,
        "created_at": turn.at_ms / 1000,
        "token_start": turn.start,
        "token_end": turn.end(),
        // The rest was drawn.
        "sent_tokens": record.sent_len,
        "messages": record.messages,
        "answer": record.answer,
        "finish_reason": text(record.finish_reason),
        "usage": record.usage,
        "response_id": text(record.id),
    });
    if tokens == TurnTokens::Shown {
        object["tokens"] = json!(turn.tokens);
    }
    object
}

/// A page of a list; `id` names the field that a client continues after.
pub(crate) fn list_object(data: Vec<Value>, has_more: bool, id: &str) -> Value {
    let (first, last) = (data.first().map(|item| &item[id]), data.last().map(|item| &item[id]));
    json!({"object": "list", "first_id": first, "last_id": last, "has_more": has_more, "data": data})
}

/// A position in a session: after a turn, or after so many tokens. `None` where the request names neither.
pub(crate) fn position(
    fields: &Fields<'_, '_>,
    (turn, token): (&'static str, &'static str),
) -> Result<Option<(At, &'static str)>, ApiError> {
    const MAX: i64 = u32::MAX as i64;
    let turns = fields.integer(turn, 0..=MAX)?.map(|n| (At::Turn(n as u32), turn));
    let tokens = fields.integer(token, 0..=MAX)?.map(|n| (At::Token(n as u32), token));
    match (turns, tokens) {
        (Some(_), Some(_)) => {
            let value = fields.get(token).map(found).unwrap_or_default();
            Err(ApiError::field(
                token,
                format!("expected only one of `{turn}` and `{token}`, found {value} too"),
            ))
        }
        (turns, tokens) => Ok(turns.or(tokens)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(body: Value) -> Result<Wanted, ApiError> {
        Wanted::read(body.as_object().unwrap())
    }

    #[test]
    fn absent_fields_stay_and_null_takes_away() {
        let mut settings = Settings::default();
        let body = json!({"name": "a b", "ttl": 5, "durability": "turn", "priority": 3, "pinned": true,
            "metadata": {"k": "v"}});
        wanted(body).unwrap().apply(&mut settings);
        let before = settings.clone();
        assert_eq!((settings.ttl_ms, settings.priority, settings.pinned), (Some(5000), 3, true));
        wanted(json!({"priority": null, "pinned": null, "durability": null})).unwrap().apply(&mut settings);
        assert_eq!(settings, before);
        wanted(json!({"name": null, "ttl": null, "metadata": null})).unwrap().apply(&mut settings);
        assert_eq!((settings.name, settings.ttl_ms), (None, None));
        assert!(SessionRecord::read(&settings.meta).metadata.is_empty());
    }

    #[test]
    fn bad_values_name_their_field() {
        let long = "x".repeat(257);
        let many: Map<String, Value> = (0..17).map(|i| (i.to_string(), json!("v"))).collect();
        let cases = [
            (json!({"name": ""}), "name"),
            (json!({"name": long}), "name"),
            (json!({"name": "a\nb"}), "name"),
            (json!({"name": "import"}), "name"),
            (json!({"name": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}), "name"),
            (json!({"name": "sess_01ARZ3NDEKTSV4RRFFQ69G5FAV"}), "name"),
            (json!({"ttl": 0}), "ttl"),
            (json!({"ttl": "1h"}), "ttl"),
            (json!({"durability": "strong"}), "durability"),
            (json!({"priority": 256}), "priority"),
            (json!({"pinned": 1}), "pinned"),
            (json!({"metadata": many}), "metadata"),
            (json!({"metadata": {"x": 1}}), "metadata.x"),
            (json!({"metadata": {"k".repeat(65): "v"}}), "metadata"),
            (json!({"metadata": {"k": "v".repeat(513)}}), "metadata.k"),
        ];
        for (body, param) in cases {
            let error = wanted(body.clone()).err().unwrap_or_else(|| panic!("{body} was taken"));
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
        let edge = json!({"name": "x".repeat(256), "metadata": {"k".repeat(64): "é".repeat(512)}});
        assert!(wanted(edge).is_ok());
    }

    #[test]
    fn what_is_on_disk_stays_there() {
        let to = |name: &str| wanted(json!({"durability": name})).unwrap();
        assert!(to("ephemeral").check_change(Durability::Async).is_err());
        assert!(to("async").check_change(Durability::Ephemeral).is_err());
        assert!(to("full").check_change(Durability::Async).is_ok());
        assert!(Wanted::default().check_change(Durability::Ephemeral).is_ok());
    }
}
