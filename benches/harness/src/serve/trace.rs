//! Recorded load in Mooncake's format: a JSON object a line with `timestamp` (milliseconds), `input_length`,
//! `output_length` and `hash_ids`, one id for each 512 tokens of the prompt; equal ids at the beginning of two prompts are
//! equal beginnings (<https://github.com/kvcache-ai/Mooncake>).

use serde_json::Value;

use super::workload::{Conversation, Turn};
use super::{Arrivals, Words};

/// Tokens that one id stands for.
const BLOCK: usize = 512;
/// A prompt longer than this is no recording.
const TOKENS_MAX: u64 = 1 << 24;

/// What is wrong with a recording.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: expected {expected}, found {found}")]
pub struct TraceError {
    line: usize,
    expected: &'static str,
    found: String,
}

/// The first `most` requests of a recording. `scale` multiplies lengths, so that a small model can replay a large
/// one's load; `speed` divides times.
///
/// # Errors
/// [`TraceError`] with the first line that is none of the format.
pub fn read(
    text: &str,
    words: &Words,
    (most, scale, speed): (usize, f64, f64),
) -> Result<(Vec<Conversation>, Arrivals), TraceError> {
    let (mut conversations, mut seconds) = (Vec::new(), Vec::new());
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (at, line) in lines.take(most) {
        let line_number = at + 1;
        let wrong = |expected, found: String| TraceError { line: line_number, expected, found };
        let value: Value = serde_json::from_str(line).map_err(|e| {
            wrong("a JSON object with timestamp, input_length, output_length, hash_ids", e.to_string())
        })?;
        let length = |key: &str, expected| {
            let found = value[key].as_u64().filter(|n| (1..=TOKENS_MAX).contains(n));
            let scaled = found.map(|n| ((n as f64 * scale).round() as usize).max(1));
            scaled.ok_or_else(|| wrong(expected, value[key].to_string()))
        };
        let input = length("input_length", "input_length from 1 to 2^24")?;
        let output = length("output_length", "output_length from 1 to 2^24")?;
        let time = value["timestamp"].as_f64().filter(|&ms| ms >= 0.0);
        let time = time.ok_or_else(|| wrong("timestamp, milliseconds", value["timestamp"].to_string()))?;
        if seconds.last().is_some_and(|&before| time / 1e3 / speed < before) {
            return Err(wrong("a timestamp not before the line above", value["timestamp"].to_string()));
        }
        let none = Vec::new();
        let ids = value["hash_ids"].as_array().unwrap_or(&none);
        let ids: Option<Vec<u64>> = ids.iter().map(Value::as_u64).collect();
        let ids = ids.ok_or_else(|| wrong("hash_ids, whole numbers", value["hash_ids"].to_string()))?;
        let text = prompt(&ids, input, scale, line_number, words);
        conversations.push(Conversation { system: None, turns: vec![Turn { pause_s: 0.0, text, output }] });
        seconds.push(time / 1e3 / speed);
    }
    Ok((conversations, Arrivals::Trace { seconds }))
}

/// A text for each id, cut at the prompt's length; what ids do not cover is the line's own.
fn prompt(ids: &[u64], input: usize, scale: f64, line: usize, words: &Words) -> String {
    const OWN: u64 = 1 << 48;
    let block = ((BLOCK as f64 * scale).round() as usize).max(1);
    let mut left = (input as f64 - words.tokens_around).max(1.0) as usize;
    let mut parts = Vec::new();
    for id in ids.iter().copied().map(Some).chain([None]) {
        if left == 0 {
            break;
        }
        let take = if id.is_some() { block.min(left) } else { left };
        parts.push(words.text(id.unwrap_or(OWN + line as u64), take));
        left -= take;
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: Words = Words { tokens_each: 1.0, tokens_around: 0.0 };
    const TRACE: &str = concat!(
        "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 52, \"hash_ids\": [46, 47, 48]}\n\n",
        "{\"timestamp\": 3000, \"input_length\": 1536, \"output_length\": 26, \"hash_ids\": [46, 47, 9]}\n",
        "{\"timestamp\": 3000, \"input_length\": 700, \"output_length\": 1, \"hash_ids\": [46]}\n",
    );

    #[test]
    fn equal_ids_are_equal_beginnings() {
        let (made, arrivals) = read(TRACE, &WORDS, (10, 1.0, 2.0)).unwrap();
        assert_eq!(arrivals, Arrivals::Trace { seconds: vec![0.0, 1.5, 1.5] });
        let words: Vec<Vec<&str>> = made.iter().map(|c| c.turns[0].text.split(' ').collect()).collect();
        assert_eq!(words.iter().map(Vec::len).collect::<Vec<_>>(), [1100, 1536, 700]);
        assert_eq!(words[0][..1024], words[1][..1024]);
        assert_ne!(words[0][1024..1100], words[1][1024..1100]);
        assert_eq!(words[2][..512], words[0][..512]);
        assert_ne!(words[2][512..600], words[0][512..600]);
        assert_eq!(made[0].turns[0].output, 52);
    }

    #[test]
    fn lengths_are_scaled_and_requests_cut() {
        let (made, _) = read(TRACE, &WORDS, (2, 0.1, 1.0)).unwrap();
        let words: Vec<Vec<&str>> = made.iter().map(|c| c.turns[0].text.split(' ').collect()).collect();
        assert_eq!(words.iter().map(Vec::len).collect::<Vec<_>>(), [110, 154]);
        assert_eq!(words[0][..102], words[1][..102], "two blocks of 51");
        assert_eq!(made[1].turns[0].output, 3);
    }

    #[test]
    fn what_is_no_trace_is_told_by_line() {
        for (line, expected) in [
            ("nonsense", "line 1: expected a JSON object"),
            (r#"{"timestamp": 0, "input_length": 0, "output_length": 5}"#, "input_length from 1"),
            (r#"{"timestamp": 0, "input_length": 5, "output_length": "x"}"#, "found \"x\""),
            (r#"{"timestamp": -1, "input_length": 5, "output_length": 5}"#, "timestamp, milliseconds"),
            (r#"{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [-1]}"#, "hash_ids"),
        ] {
            let message = read(line, &WORDS, (1, 1.0, 1.0)).unwrap_err().to_string();
            assert!(message.contains(expected), "{line}: {message}");
        }
        let backwards = format!("{TRACE}{{\"timestamp\": 2999, \"input_length\": 5, \"output_length\": 5}}");
        let message = read(&backwards, &WORDS, (9, 1.0, 1.0)).unwrap_err().to_string();
        assert!(message.starts_with("line 5: expected a timestamp not before"), "{message}");
    }
}
