//! Makes a parser of a constraint, within limits of time, memory and depth.

use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::{TokenParser, regex_to_lark};
use serde_json::{Map, Value, json};

use super::masker::{Compiled, shown};
use super::source::{Constraint, Wanted};
use super::vocabulary::Vocabulary;

/// Longest constraint, bytes of its JSON.
const SOURCE_LEN_MAX: usize = 256 << 10;
/// Deepest nesting of brackets in a grammar or an expression: they are read recursively.
const DEPTH_MAX: usize = 200;
/// The compiler follows references and rules recursively.
const STACK_BYTES: usize = 256 << 20;
/// The name of a constraint that begins after a marker.
const BODY: &str = "body";
/// White space where JSON allows any: a space, or a line break and an indentation. It is bounded, since a model could
/// go on with it for ever.
const JSON_SPACE: &str = r"\x20|\n\x20{0,16}";

/// `\d` and `\w` stand for ASCII alone, as in the patterns of JSON schemas.
const ASCII_CLASSES: &str = "dw";

/// What compiling and one mask may cost. Fuel is spent at about 50,000 a millisecond when a grammar is compiled, and at
/// 14,000 for a mask; a state of the lexer takes about 2 KB, for each answer by itself.
pub(super) fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Compiles a constraint. Blocks.
///
/// # Errors
/// What is wrong with it, for people.
pub(super) fn compile(wanted: Wanted, vocabulary: Arc<Vocabulary>) -> Result<Arc<Compiled>, String> {
    check_size(&wanted)?;
    let work = move || {
        let parser = parser(&wanted, &vocabulary)?;
        let compiled = Arc::new(Compiled::new(wanted, parser));
        // What cannot even begin is found before an answer does.
        compiled.grammar(Vec::new()).start().advance(&[], &mut Vec::new())?;
        Ok(compiled)
    };
    let thread = std::thread::Builder::new().name("compile grammar".to_owned()).stack_size(STACK_BYTES);
    let thread = thread.spawn(work).map_err(|error| format!("the system gives no thread: {error}"))?;
    thread.join().unwrap_or_else(|_| Err("the constraint cannot be compiled".to_owned()))
}

fn check_size(wanted: &Wanted) -> Result<(), String> {
    let len = wanted.to_json().to_string().len();
    if len > SOURCE_LEN_MAX {
        return Err(format!("expected at most {SOURCE_LEN_MAX} bytes, found {len}"));
    }
    if let Constraint::Regex(text) | Constraint::Lark(text) = &wanted.constraint {
        let depth = depth(text);
        if depth > DEPTH_MAX {
            return Err(format!("expected brackets nested at most {DEPTH_MAX} deep, found {depth}"));
        }
    }
    Ok(())
}

/// Opening brackets that are not closed, at most; those inside of literals are counted too.
fn depth(text: &str) -> usize {
    let (mut open, mut most) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

fn parser(wanted: &Wanted, vocabulary: &Vocabulary) -> Result<TokenParser, String> {
    let mut all = TopLevelGrammar::from_grammar(grammar(&wanted.constraint)?);
    if let Some(marker) = &wanted.after {
        all.grammars[0].name = Some(BODY.to_owned());
        all.grammars.insert(0, GrammarWithLexer::from_lark(preamble(marker, vocabulary)));
    }
    let parser = vocabulary.factory.create_parser(all);
    let mut parser = parser.map_err(|error| explained(&shown(format!("{error:#}"))))?;
    parser.start_without_prompt();
    Ok(parser)
}

/// Any text up to the first marker, and then the body. A marker may be a token of its own, which is no text.
fn preamble(marker: &str, vocabulary: &Vocabulary) -> String {
    match vocabulary.special(marker) {
        Some(id) => format!("start: /(.|\\n)*/ <[{id}]> @{BODY}\n"),
        None => format!("start: before @{BODY}\nbefore[suffix={}]: /(.|\\n)*/\n", quoted(marker)),
    }
}

fn grammar(constraint: &Constraint) -> Result<GrammarWithLexer, String> {
    Ok(match constraint {
        Constraint::JsonObject => json_schema(&json!({"type": "object"}))?,
        Constraint::JsonSchema(schema) => json_schema(schema)?,
        Constraint::Regex(text) if text.is_empty() => {
            return Err("expected an expression, found an empty one".to_owned());
        }
        Constraint::Regex(text) => GrammarWithLexer::from_lark(format!(
            "start: /{}/",
            regex_to_lark(unanchored(text), ASCII_CLASSES)
        )),
        Constraint::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
            // One word for all: as words of their own, they would be followed one by one.
            GrammarWithLexer::from_lark(format!("start: CHOICE\nCHOICE: {}\n", choices.join(" | ")))
        }
        Constraint::Lark(text) => GrammarWithLexer::from_lark(text.clone()),
    })
}

/// A string of a Lark grammar, which is one of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The whole text is matched anyway, and the library knows no anchors.
fn unanchored(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|byte| *byte == b'\\').count() % 2 == 0 => rest,
        _ => regex,
    }
}

fn json_schema(schema: &Value) -> Result<GrammarWithLexer, String> {
    let mut schema = match schema {
        Value::Bool(true) => Map::new(),
        Value::Object(schema) => schema.clone(),
        _ => return Err("expected a schema that some value fits".to_owned()),
    };
    // The library's own key: what a client puts there must not change the rules.
    schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_SPACE}));
    Ok(GrammarWithLexer::from_json_schema(Value::Object(schema)))
}

/// The library's message, with the schema's keyword in the words of this server.
fn explained(message: &str) -> String {
    if let Some((_, keys)) = message.split_once("Unimplemented keys: ") {
        let keys = keys.trim_matches(|c| matches!(c, '[' | ']')).replace('"', "`");
        return format!("the schema keyword {keys} is not supported");
    }
    if message.contains("oneOf constraints are not supported") {
        return "the schema keyword `oneOf` is supported only where no value fits two of its schemas, seen from their types, \
                constants or required properties; use `anyOf`"
            .to_owned();
    }
    if let Some((_, format)) = message.split_once("Unknown format: ") {
        return format!("the schema keyword `format` with {format:?} is not supported");
    }
    message.to_owned()
}
