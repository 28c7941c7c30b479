//! POST /v1/responses/compact: a conversation made short by the model itself.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// What the model is told.
pub(crate) const TASK: &str = "Summarise the conversation so far for somebody who has to go on with it: what was \
                               asked, what was found and decided, names and numbers that matter, and what is left to \
                               do. Write only the summary.";
const INTRODUCTION: &str = "Summary of the conversation so far:\n";
/// Tokens of a summary where the client names no limit.
pub(crate) const SUMMARY_TOKENS: usize = 1024;

/// The item that stands for a conversation.
pub(crate) fn item(summary: &str) -> Value {
    json!({
        "id": crate::random::id("cmp_"),
        "type": "compaction",
        "encrypted_content": STANDARD.encode(summary),
    })
}

/// The text that such an item is to the model; `None` for another server's.
pub(crate) fn summary(content: &str) -> Option<String> {
    let summary = String::from_utf8(STANDARD.decode(content).ok()?).ok()?;
    Some(format!("{INTRODUCTION}{summary}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_comes_back() {
        let item = item("größer");
        assert_eq!(
            summary(item["encrypted_content"].as_str().unwrap()).unwrap(),
            format!("{INTRODUCTION}größer")
        );
        assert_eq!(summary("no base64!"), None);
    }
}
