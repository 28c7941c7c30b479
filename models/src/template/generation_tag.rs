//! `{% generation %}` blocks, which mark the assistant's text for training: jinja2 learns the tag from
//! transformers, and to a reader of the text it is a plain scope.

use std::borrow::Cow;

/// The template with every `generation` tag turned into `with`, which scopes alike and keeps its whitespace marks.
pub(super) fn replaced(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{") {
        let (text, tail) = rest.split_at(start);
        out.push_str(text);
        let len = match tail.as_bytes().get(1) {
            Some(b'#') => tail.find("#}").map_or(tail.len(), |end| end + 2),
            Some(b'{') => expression_len(tail, "}}"),
            Some(b'%') => tag_len(tail),
            _ => 1,
        };
        let (part, tail) = tail.split_at(len);
        match tag_name(part) {
            Some(name @ ("generation" | "endgeneration")) => {
                let with = if name == "generation" { "with" } else { "endwith" };
                out.push_str(&part.replacen(name, with, 1));
            }
            _ => out.push_str(part),
        }
        rest = tail;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Bytes of a tag; of a `raw` tag, all up to and with its end.
fn tag_len(tail: &str) -> usize {
    let len = expression_len(tail, "%}");
    if tag_name(&tail[..len]) != Some("raw") {
        return len;
    }
    let mut from = len;
    while let Some(found) = tail[from..].find("{%") {
        let start = from + found;
        let end = start + expression_len(&tail[start..], "%}");
        if tag_name(&tail[start..end]) == Some("endraw") {
            return end;
        }
        from = start + 2;
    }
    tail.len()
}

/// Bytes up to and with `end`, where it does not stand in a string.
fn expression_len(tail: &str, end: &str) -> usize {
    let bytes = tail.as_bytes();
    let mut quote = None;
    let mut i = 2;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(open), b) if b == open => quote = None,
            (None, b @ (b'"' | b'\'')) => quote = Some(b),
            (None, _) if bytes[i..].starts_with(end.as_bytes()) => return i + end.len(),
            _ => {}
        }
        i += 1;
    }
    tail.len()
}

/// The name of a `{% name ... %}` tag.
fn tag_name(part: &str) -> Option<&str> {
    let inner = part.strip_prefix("{%")?.strip_suffix("%}")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    Some(&inner[..end])
}
