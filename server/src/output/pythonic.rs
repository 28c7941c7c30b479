//! Calls in a block of their own: in Python's notation, `print(name(key="value"))`, or as JSON.

use serde_json::{Map, Value, json};

use super::call_object;

/// How deep values may be nested.
const DEPTH_MAX: usize = 64;

/// The name of a function and the JSON text of its arguments.
type Call = (String, String);

/// The calls of a block, `None` where it holds anything else.
pub(super) fn calls(block: &str) -> Option<Vec<Call>> {
    let text = block.trim();
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        return json_calls(&value);
    }
    let mut reader = Reader { rest: text };
    let in_list = reader.take("[");
    let mut calls = Vec::new();
    loop {
        reader.skip_space();
        if reader.rest.is_empty() || (in_list && reader.take("]")) {
            break;
        }
        calls.push(reader.statement()?);
        while reader.take(",") || reader.take(";") {}
    }
    (reader.rest.trim().is_empty() && !calls.is_empty()).then_some(calls)
}

fn json_calls(value: &Value) -> Option<Vec<Call>> {
    let items = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let call = |item: &Value| {
        let name = item["name"].as_str()?.to_owned();
        let given = item.get("arguments").or_else(|| item.get("parameters"));
        let arguments =
            given.map_or(Some("{}".to_owned()), |value| call_object::arguments(&value.to_string()))?;
        Some((name, arguments))
    };
    let calls: Option<Vec<Call>> = items.iter().map(call).collect();
    calls.filter(|calls| !calls.is_empty())
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn take(&mut self, token: &str) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn word(&mut self) -> Option<&'a str> {
        self.skip_space();
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '.')));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        (!word.is_empty() && !word.starts_with(|c: char| c.is_ascii_digit())).then_some(word)
    }

    /// A call, alone, printed, or with its result given a name.
    fn statement(&mut self) -> Option<Call> {
        let mut name = self.word()?;
        if self.take("=") {
            name = self.word()?;
        }
        if name != "print" {
            return self.call(name);
        }
        if !self.take("(") {
            return None;
        }
        let inner = self.word()?;
        let call = self.call(inner)?;
        self.take(")").then_some(call)
    }

    fn call(&mut self, name: &str) -> Option<Call> {
        let name = name.strip_prefix("default_api.").unwrap_or(name);
        if !self.take("(") {
            return None;
        }
        let mut arguments = Map::new();
        while !self.take(")") {
            let key = self.word()?.to_owned();
            if !self.take("=") {
                return None;
            }
            arguments.insert(key, self.value(0)?);
            if !self.take(",") {
                self.take(")").then_some(())?;
                break;
            }
        }
        Some((name.to_owned(), Value::Object(arguments).to_string()))
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.skip_space();
        match self.rest.chars().next()? {
            quote @ ('"' | '\'') => self.string(quote).map(Value::from),
            '[' | '(' => self.list(depth),
            '{' => self.dict(depth),
            c if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => self.number(),
            _ => match self.word()? {
                "True" | "true" => Some(json!(true)),
                "False" | "false" => Some(json!(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    fn list(&mut self, depth: usize) -> Option<Value> {
        let end = if self.take("[") { "]" } else { self.take("(").then_some(")")? };
        let mut items = Vec::new();
        while !self.take(end) {
            items.push(self.value(depth + 1)?);
            if !self.take(",") {
                self.take(end).then_some(())?;
                break;
            }
        }
        Some(Value::from(items))
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.take("{").then_some(())?;
        let mut items = Map::new();
        while !self.take("}") {
            let key = match self.value(depth + 1)? {
                Value::String(key) => key,
                other => other.to_string(),
            };
            self.take(":").then_some(())?;
            items.insert(key, self.value(depth + 1)?);
            if !self.take(",") {
                self.take("}").then_some(())?;
                break;
            }
        }
        Some(Value::Object(items))
    }

    fn number(&mut self) -> Option<Value> {
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_');
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        let text = text.replace('_', "");
        let whole = text.parse::<i64>().map(Value::from).ok();
        whole.or_else(|| text.parse::<f64>().ok().filter(|x| x.is_finite()).map(Value::from))
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let triple = quote.to_string().repeat(3);
        let end = if self.rest.starts_with(&triple) { triple } else { quote.to_string() };
        self.rest = &self.rest[end.len()..];
        let mut text = String::new();
        loop {
            if let Some(rest) = self.rest.strip_prefix(end.as_str()) {
                self.rest = rest;
                return Some(text);
            }
            let c = self.next()?;
            if c == '\\' { self.escape(&mut text)? } else { text.push(c) }
        }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn escape(&mut self, text: &mut String) -> Option<()> {
        let mut digits = 0;
        match self.next()? {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            '\n' => {}
            'x' => digits = 2,
            'u' => digits = 4,
            'U' => digits = 8,
            c @ ('\\' | '\'' | '"') => text.push(c),
            // Python leaves what it does not know as it is.
            other => text.extend(['\\', other]),
        }
        if digits == 0 {
            return Some(());
        }
        let number = self.rest.get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok())?;
        self.rest = &self.rest[digits..];
        text.push(char::from_u32(number)?);
        Some(())
    }
}
