//! Sessions and turns as text for people.

use serde_json::Value;

/// Longest piece of a message that is shown.
const SHOWN_CHARS: usize = 60;
const HEADS: [&str; 7] = ["ID", "NAME", "MODEL", "TURNS", "TOKENS", "LAST USED", "FLAGS"];

/// One line for each session, under a line of heads.
pub(super) fn sessions(sessions: &[Value], now_s: u64) -> String {
    let row = |session: &Value| {
        [
            text(&session["id"]),
            text(&session["name"]),
            text(&session["model"]),
            session["turn_count"].to_string(),
            session["token_count"].to_string(),
            ago(&session["last_used_at"], now_s),
            flags(session),
        ]
    };
    let rows: Vec<_> = std::iter::once(HEADS.map(str::to_owned)).chain(sessions.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEADS.len()).map(width).collect();
    let line = |row: &[String; HEADS.len()]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// A session with its turns.
pub(super) fn session(session: &Value, turns: &[Value], now_s: u64) -> String {
    let parent = &session["parent"];
    let from = || format!("{}, turn {}", text(&parent["id"]), parent["turn"]);
    let kv = &session["kv"];
    let reason = kv["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
    let pairs = session["metadata"].as_object().into_iter().flatten();
    let metadata: Vec<String> = pairs.map(|(key, value)| format!("{key}={}", text(value))).collect();
    let expires = session["expires_at"].as_u64().map(|at| span(at.saturating_sub(now_s)));
    let lines = [
        ("id", text(&session["id"])),
        ("name", text(&session["name"])),
        ("model", text(&session["model"])),
        ("turns", session["turn_count"].to_string()),
        ("tokens", session["token_count"].to_string()),
        ("made", ago(&session["created_at"], now_s)),
        ("last used", ago(&session["last_used_at"], now_s)),
        ("expires in", expires.unwrap_or_default()),
        ("forked from", if parent.is_null() { String::new() } else { from() }),
        ("durability", text(&session["durability"])),
        ("priority", session["priority"].to_string()),
        ("flags", flags(session)),
        ("metadata", metadata.join(", ")),
        ("stored", format!("{}, {} tokens{reason}", text(&kv["state"]), kv["stored_tokens"])),
    ];
    let told = lines.iter().filter(|(_, value)| !value.is_empty());
    let told: String = told.map(|(name, value)| format!("{name:12} {value}\n")).collect();
    let turns: String = turns.iter().map(|turn| self::turn(turn, now_s)).collect();
    if turns.is_empty() { told } else { format!("{told}\n{turns}") }
}

fn turn(turn: &Value, now_s: u64) -> String {
    let range = format!("tokens {} to {}", turn["token_start"], turn["token_end"]);
    let ending = text(&turn["finish_reason"]);
    let ending = if ending.is_empty() { String::new() } else { format!(", {ending}") };
    let messages = turn["messages"].as_array().into_iter().flatten().chain([&turn["answer"]]);
    let said = messages.filter(|message| message.is_object());
    let said = said.map(|m| format!("    {}: {}\n", text(&m["role"]), shortened(&m["content"])));
    let head = format!("turn {}, {range}, {}{ending}\n", turn["number"], ago(&turn["created_at"], now_s));
    head + &said.collect::<String>()
}

/// A string without what would move a terminal's cursor.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).collect()
}

/// The beginning of a message on one line.
fn shortened(content: &Value) -> String {
    let whole = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
    let line = whole.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    match line.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

fn flags(session: &Value) -> String {
    let known = [("pinned", "pinned"), ("in_flight", "running"), ("damaged", "damaged")];
    let set: Vec<_> =
        known.iter().filter(|(field, _)| session[*field] == true).map(|(_, flag)| *flag).collect();
    set.join(",")
}

fn ago(at: &Value, now_s: u64) -> String {
    at.as_u64().map_or_else(String::new, |at| format!("{} ago", span(now_s.saturating_sub(at))))
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sample() -> Value {
        json!({"id": "sess_A", "name": "notes", "model": "m", "turn_count": 2, "token_count": 64,
            "created_at": 1000, "last_used_at": 8000, "expires_at": null, "parent": {"id": "sess_B", "turn": 1},
            "pinned": true, "priority": 0, "durability": "async", "ttl": null, "metadata": {"k": "v\u{1b}[2J"},
            "in_flight": true, "damaged": false, "kv": {"state": "exact", "stored_tokens": 64, "reason": null}})
    }

    #[test]
    fn columns_stand_under_their_heads() {
        let text = sessions(&[sample()], 8100);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "ID      NAME   MODEL  TURNS  TOKENS  LAST USED  FLAGS");
        assert_eq!(lines[1], "sess_A  notes  m      2      64      100 s ago  pinned,running");
    }

    #[test]
    fn nothing_that_a_message_holds_reaches_the_terminal_raw() {
        let long = "word\n\u{1b}[2J ".repeat(40);
        let turn = json!({"number": 1, "token_start": 0, "token_end": 9, "created_at": 8000, "finish_reason": "stop",
            "messages": [{"role": "user", "content": long}], "answer": {"role": "assistant", "content": "yes"}});
        let text = session(&sample(), &[turn], 8100);
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(text.contains("turn 1, tokens 0 to 9, 100 s ago, stop\n    user: word [2J word"), "{text}");
        assert!(
            text.contains("...\n    assistant: yes\n") && text.contains("forked from  sess_B, turn 1"),
            "{text}"
        );
    }

    #[test]
    fn spans_are_short() {
        assert_eq!([0, 119, 120, 7200, 172_800].map(span), ["0 s", "119 s", "2 min", "2 h", "2 d"]);
    }
}
