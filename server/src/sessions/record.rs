//! What the server writes into a session's and a turn's opaque fields: JSON, read back leniently.

use mainstay_engine::Identity;
use serde_json::{Map, Value, json};

use crate::openai::messages;

/// The opaque field of a session.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SessionRecord {
    /// The client's own pairs.
    pub(crate) metadata: Map<String, Value>,
    /// What the model was made of when the last turn was written, by [`Identity::parts`].
    pub(crate) identity: Map<String, Value>,
}

impl SessionRecord {
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let value: Value = serde_json::from_slice(bytes).unwrap_or_default();
        let object = |key: &str| value[key].as_object().cloned().unwrap_or_default();
        Self { metadata: object("metadata"), identity: object("identity") }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        json!({"metadata": self.metadata, "identity": self.identity}).to_string().into_bytes()
    }

    /// The part of the model that is not what it was, if there was one.
    pub(crate) fn changed(&self, now: &Identity) -> Option<&'static str> {
        if self.identity.is_empty() {
            return None;
        }
        now.changed(|name| self.identity.get(name)?.as_str())
    }

    /// Notes what the model is made of.
    pub(crate) fn set_identity(&mut self, now: &Identity) {
        self.identity = now.parts().iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    }
}

/// The opaque field of a turn.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct TurnRecord {
    /// Id of the answer, `chatcmpl-...`.
    pub(crate) id: String,
    /// When it was begun, unix seconds.
    pub(crate) created: u64,
    /// The model's name.
    pub(crate) model: String,
    /// The messages that the client added with this turn, as they went into the template.
    pub(crate) messages: Vec<Value>,
    /// The message that was answered, as the client got it.
    pub(crate) answer: Value,
    pub(crate) finish_reason: String,
    /// The object `usage`.
    pub(crate) usage: Value,
    /// The seed of its draws, chosen by the server where the client chose none.
    pub(crate) seed: u64,
    /// How many of the turn's tokens were sent; the rest was drawn.
    pub(crate) sent_len: usize,
    /// Bytes of the session's text before this turn that stand.
    pub(crate) text_kept: usize,
    /// The text that the turn's tokens stand for, special tokens shown.
    pub(crate) text: String,
    /// Bytes of it that were sent; the rest was drawn.
    pub(crate) text_sent: usize,
    /// Tokens drawn after the answer's end: those of a stop string. They are no part of the session.
    pub(crate) dropped: Vec<u32>,
    /// The object `kv` of the answer.
    pub(crate) kv: Value,
    /// How the answer was generated, so that its tokens become the same text again.
    pub(crate) options: Value,
}

impl TurnRecord {
    /// What the client added, and the answer, as they go into the template.
    pub(crate) fn all_messages(&self) -> Vec<Value> {
        let answer = (!self.answer.is_null()).then(|| messages::of_answer(&self.answer));
        self.messages.iter().cloned().chain(answer).collect()
    }

    pub(crate) fn read(bytes: &[u8]) -> Self {
        Self::of_json(&serde_json::from_slice(bytes).unwrap_or_default())
    }

    pub(crate) fn of_json(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| value[key].as_u64().unwrap_or_default();
        Self {
            id: text("id"),
            created: number("created"),
            model: text("model"),
            messages: value["messages"].as_array().cloned().unwrap_or_default(),
            answer: value["answer"].clone(),
            finish_reason: text("finish_reason"),
            usage: value["usage"].clone(),
            seed: number("seed"),
            sent_len: number("sent_len") as usize,
            text_kept: number("text_kept") as usize,
            text: text("text"),
            text_sent: number("text_sent") as usize,
            dropped: serde_json::from_value(value["dropped"].clone()).unwrap_or_default(),
            kv: value["kv"].clone(),
            options: value["options"].clone(),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.to_json().to_string().into_bytes()
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "messages": self.messages,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "seed": self.seed,
            "sent_len": self.sent_len,
            "text_kept": self.text_kept,
            "text": self.text,
            "text_sent": self.text_sent,
            "dropped": self.dropped,
            "kv": self.kv,
            "options": self.options,
        })
    }
}
