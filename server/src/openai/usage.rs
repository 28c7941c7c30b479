//! The object `usage`.

use serde_json::{Value, json};

/// Tokens of one request, all its prompts and choices together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    /// Of these, found and not computed again.
    pub(crate) cached_tokens: usize,
    pub(crate) completion_tokens: usize,
    /// Of these, drawn while the model was thinking.
    pub(crate) reasoning_tokens: usize,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
            reasoning_tokens: self.reasoning_tokens + other.reasoning_tokens,
        }
    }
}

impl Usage {
    /// What [`Usage::to_json`] wrote.
    pub(crate) fn of_json(value: &Value) -> Self {
        let count = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
        Self {
            prompt_tokens: count(&value["prompt_tokens"]),
            cached_tokens: count(&value["prompt_tokens_details"]["cached_tokens"]),
            completion_tokens: count(&value["completion_tokens"]),
            reasoning_tokens: count(&value["completion_tokens_details"]["reasoning_tokens"]),
        }
    }

    pub(crate) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        })
    }
}
