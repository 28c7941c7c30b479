//! The fields and headers about sessions and about what becomes of a request's keys and values.

use axum::http::{HeaderMap, header};
use mainstay_engine::store::Durability;
use mainstay_engine::{Keep, Reuse};
use serde_json::Value;

use super::fields::{Fields, unexpected};
use crate::error::ApiError;

/// Longest `cache_salt`, bytes.
const SALT_BYTES_MAX: usize = 128;

pub(crate) const SESSION_ID: &str = "x-session-id";

/// What a request says about its keys and values.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct KeepFields {
    pub(crate) durability: Option<Durability>,
    reuse: Reuse,
    salt: Vec<u8>,
}

impl KeepFields {
    /// The fields `durability`, `kv_reuse` and `cache_salt`. `reuse` holds where the request does not say.
    pub(crate) fn read(fields: &Fields<'_, '_>, reuse: Reuse) -> Result<Self, ApiError> {
        let durability = match fields.string("durability")? {
            None => None,
            Some(name) => Some(durability(name).ok_or_else(|| {
                unexpected("durability", "ephemeral, async, turn or full", &Value::from(name))
            })?),
        };
        let reuse = match fields.string("kv_reuse")? {
            None => reuse,
            Some("exact") => Reuse::Exact,
            Some("equivalent") => Reuse::Equivalent,
            Some(other) => return Err(unexpected("kv_reuse", "exact or equivalent", &Value::from(other))),
        };
        Ok(Self { durability, reuse, salt: salt(fields)? })
    }

    /// For the engine. `durability` holds where the request does not say.
    pub(crate) fn keep(self, durability: Durability) -> Keep {
        Keep { salt: self.salt, durability: self.durability.unwrap_or(durability), reuse: self.reuse }
    }
}

/// A level of durability by its name.
pub(crate) fn durability(name: &str) -> Option<Durability> {
    match name {
        "ephemeral" => Some(Durability::Ephemeral),
        "async" => Some(Durability::Async),
        "turn" => Some(Durability::Turn),
        "full" => Some(Durability::Full),
        _ => None,
    }
}

fn salt(fields: &Fields<'_, '_>) -> Result<Vec<u8>, ApiError> {
    let Some(salt) = fields.string("cache_salt")? else { return Ok(Vec::new()) };
    let len = salt.len();
    if !(1..=SALT_BYTES_MAX).contains(&len) {
        let message = format!("expected 1 to {SALT_BYTES_MAX} bytes, found {len}");
        return Err(ApiError::field("cache_salt", message));
    }
    if salt.chars().any(char::is_control) {
        return Err(ApiError::field(
            "cache_salt",
            "expected printable characters, found a control character",
        ));
    }
    Ok(salt.as_bytes().to_vec())
}

/// Whether the messages of a request are the whole conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SessionMode {
    /// All of it; what the session has already is recognised.
    #[default]
    Full,
    /// Only what is new.
    Append,
}

/// What to do with a conversation that has grown out of the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Truncation {
    /// The request is refused.
    #[default]
    Disabled,
    /// The oldest turns are left out, in a fork of the session.
    Auto,
}

/// The session that a request is a turn of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SessionFields {
    /// Its id or name.
    pub(crate) session: String,
    pub(crate) mode: SessionMode,
    pub(crate) expected_turn: Option<u32>,
    pub(crate) truncation: Truncation,
}

impl SessionFields {
    /// A session of one turn.
    pub(crate) fn own(session: String) -> Self {
        Self { session, mode: SessionMode::Full, expected_turn: None, truncation: Truncation::Disabled }
    }

    /// The fields `session_id`, `session_mode`, `expected_turn` and `truncation`, and the headers `X-Session-Id` and
    /// `If-Match`; `None` where the request names no session.
    pub(crate) fn read(fields: &Fields<'_, '_>, headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let mode = match fields.string("session_mode")? {
            None | Some("full") => SessionMode::Full,
            Some("append") => SessionMode::Append,
            Some(other) => return Err(unexpected("session_mode", "full or append", &Value::from(other))),
        };
        let truncation = match fields.string("truncation")? {
            None | Some("disabled") => Truncation::Disabled,
            Some("auto") => Truncation::Auto,
            Some(other) => return Err(unexpected("truncation", "auto or disabled", &Value::from(other))),
        };
        let Some(session) = session(fields, headers)? else {
            for field in ["session_mode", "expected_turn"] {
                if fields.get(field).is_some() {
                    return Err(needs_session(field));
                }
            }
            return if truncation == Truncation::Auto { Err(needs_session("truncation")) } else { Ok(None) };
        };
        Ok(Some(Self { session, mode, expected_turn: expected_turn(fields, headers)?, truncation }))
    }
}

fn needs_session(field: &str) -> ApiError {
    ApiError::field(field, "expected `session_id` beside it, found none")
}

fn session(fields: &Fields<'_, '_>, headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let named = fields.string("session_id")?;
    if named == Some("") {
        return Err(ApiError::field(
            "session_id",
            "expected the id or name of a session, found an empty string",
        ));
    }
    let sent = header_text(headers, SESSION_ID, "X-Session-Id", "the id or name of a session")?;
    match (named, sent) {
        (Some(named), Some(sent)) if named != sent => {
            let message = format!("expected what the header X-Session-Id says, {sent:?}, found {named:?}");
            Err(ApiError::field("session_id", message))
        }
        (named, sent) => Ok(named.map(str::to_owned).or(sent)),
    }
}

/// The turn that the session is believed to be at, by the field or the header.
pub(crate) fn expected_turn(fields: &Fields<'_, '_>, headers: &HeaderMap) -> Result<Option<u32>, ApiError> {
    let named = fields.integer("expected_turn", 0..=i64::from(u32::MAX))?;
    let named = named.and_then(|turn| u32::try_from(turn).ok());
    let expected = "the number of a turn, such as \"3\"";
    let sent = match header_text(headers, header::IF_MATCH.as_str(), "If-Match", expected)?.as_deref() {
        None | Some("*") => None,
        Some(text) => Some(
            quoted(text).parse::<u32>().map_err(|_| unexpected("If-Match", expected, &Value::from(text)))?,
        ),
    };
    match (named, sent) {
        (Some(named), Some(sent)) if named != sent => {
            let message = format!("expected what the header If-Match says, {sent}, found {named}");
            Err(ApiError::field("expected_turn", message))
        }
        (named, sent) => Ok(named.or(sent)),
    }
}

/// What stands between the quotes of an entity tag, where there are some.
fn quoted(text: &str) -> &str {
    let text = text.strip_prefix("W/").unwrap_or(text);
    text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text)
}

/// A header's text without spaces around it; one that is empty counts as absent.
pub(crate) fn header_text(
    headers: &HeaderMap,
    name: &str,
    shown: &str,
    expected: &str,
) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = std::str::from_utf8(value.as_bytes())
        .map_err(|_| ApiError::field(shown, format!("expected {expected} in UTF-8, found other bytes")))?;
    let text = text.trim();
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value, sent: &[(&'static str, &str)]) -> Result<Option<SessionFields>, ApiError> {
        let mut headers = HeaderMap::new();
        for (name, value) in sent {
            headers.insert(*name, value.parse().unwrap());
        }
        SessionFields::read(&Fields::of(body.as_object().unwrap()), &headers)
    }

    #[test]
    fn a_session_is_named_by_field_or_header() {
        let plain = |session: &str, expected_turn| SessionFields {
            session: session.to_owned(),
            mode: SessionMode::Full,
            expected_turn,
            truncation: Truncation::Disabled,
        };
        assert_eq!(read(json!({}), &[]), Ok(None));
        assert_eq!(read(json!({}), &[("x-dynamo-session-id", "a")]), Ok(None));
        assert_eq!(read(json!({"session_id": "a"}), &[]), Ok(Some(plain("a", None))));
        assert_eq!(read(json!({}), &[(SESSION_ID, " a ")]), Ok(Some(plain("a", None))));
        assert_eq!(read(json!({"session_id": "a"}), &[(SESSION_ID, "a")]), Ok(Some(plain("a", None))));
        for tag in ["7", "\"7\"", "W/\"7\""] {
            assert_eq!(read(json!({"session_id": "a"}), &[("if-match", tag)]), Ok(Some(plain("a", Some(7)))));
        }
        assert_eq!(read(json!({"session_id": "a"}), &[("if-match", "*")]), Ok(Some(plain("a", None))));
        assert_eq!(read(json!({"session_id": "a", "expected_turn": 0}), &[]), Ok(Some(plain("a", Some(0)))));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let header = |name: &'static str, value: &'static str| vec![(name, value)];
        let none = Vec::new;
        let cases = [
            (json!({"session_id": 3}), none(), "session_id"),
            (json!({"session_id": ""}), none(), "session_id"),
            (json!({"session_id": "a"}), header(SESSION_ID, "b"), "session_id"),
            (json!({"session_id": "a", "session_mode": "some"}), none(), "session_mode"),
            (json!({"session_id": "a", "expected_turn": -1}), none(), "expected_turn"),
            (json!({"session_id": "a", "expected_turn": "1"}), none(), "expected_turn"),
            (json!({"session_id": "a", "expected_turn": 1}), header("if-match", "2"), "expected_turn"),
            (json!({"session_id": "a"}), header("if-match", "x"), "If-Match"),
            (json!({"session_id": "a", "truncation": "some"}), none(), "truncation"),
            (json!({"truncation": "auto"}), none(), "truncation"),
            (json!({"session_mode": "append"}), none(), "session_mode"),
            (json!({"expected_turn": 1}), none(), "expected_turn"),
        ];
        for (body, headers, param) in cases {
            let error = read(body.clone(), &headers).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), &error.body()["error"]["param"]),
                (400, &json!(param)),
                "{body}"
            );
        }
    }

    #[test]
    fn what_becomes_of_pages_is_checked() {
        let read = |body: Value| KeepFields::read(&Fields::of(body.as_object().unwrap()), Reuse::Exact);
        let set = read(json!({"durability": "full", "kv_reuse": "equivalent", "cache_salt": "é"})).unwrap();
        let keep = Keep { salt: "é".into(), durability: Durability::Full, reuse: Reuse::Equivalent };
        assert_eq!(set.keep(Durability::Async), keep);
        assert_eq!(read(json!({})).unwrap().keep(Durability::Turn).durability, Durability::Turn);
        for (body, param) in [
            (json!({"durability": "most"}), "durability"),
            (json!({"durability": 1}), "durability"),
            (json!({"kv_reuse": "any"}), "kv_reuse"),
            (json!({"cache_salt": ""}), "cache_salt"),
            (json!({"cache_salt": "a\nb"}), "cache_salt"),
            (json!({"cache_salt": "x".repeat(129)}), "cache_salt"),
        ] {
            let error = read(body).unwrap_err();
            assert_eq!((error.status.as_u16(), &error.body()["error"]["param"]), (400, &json!(param)));
        }
    }
}
