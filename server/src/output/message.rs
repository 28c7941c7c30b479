//! The message that an answer is, put together from its parts.

use serde_json::{Value, json};

use super::part::Part;

/// A call of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON text as the model wrote it; cut where the answer was.
    pub(crate) arguments: String,
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) content: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<Call>,
}

impl Message {
    pub(crate) fn push(&mut self, part: &Part) {
        match part {
            Part::Text(text) => self.content.push_str(text),
            Part::Reasoning(text) => self.reasoning.push_str(text),
            Part::CallBegin { id, name, .. } => {
                self.calls.push(Call { id: id.clone(), name: name.clone(), arguments: String::new() });
            }
            Part::CallArguments { index, text } => self.calls[*index].arguments.push_str(text),
        }
    }

    pub(crate) fn extend<'a>(&mut self, parts: impl IntoIterator<Item = &'a Part>) {
        parts.into_iter().for_each(|part| self.push(part));
    }

    /// The assistant's message of a conversation. Content is null where there are only calls.
    pub(crate) fn to_json(&self) -> Value {
        let content = Some(&self.content).filter(|text| !text.is_empty() || self.calls.is_empty());
        let mut message = json!({"role": "assistant", "content": content});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = json!(self.reasoning);
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.iter().map(Call::to_json).collect();
        }
        message
    }
}

impl Call {
    fn to_json(&self) -> Value {
        let function = json!({"name": self.name, "arguments": self.arguments});
        json!({"id": self.id, "type": "function", "function": function})
    }
}
