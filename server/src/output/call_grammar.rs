//! Grammars that hold an answer to calls of the functions of a request, in the syntax of the crate `llguidance`.
//!
//! Behind a marker, the frame of a call is written out as the format has it, and only the arguments are free, within
//! their schema. Without one, a call is JSON as a whole, so that JSON of another form may stand in its place: a grammar
//! cannot tell text from JSON where both begin alike.

use mainstay_models::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use super::{Output, ToolFormat, harmony, hermes, objects};
use crate::openai::tools::{CallMode, CallStyle, Function, Tools};

/// Most calls of one answer.
const CALLS_MAX: usize = 64;
/// White space in the arguments, bounded as in other JSON.
pub(crate) const JSON_SPACE: &str = r"\x20|\n\x20{0,16}";
/// Text in which calls cannot be told from an answer by a marker: it begins as no call does.
const UNLIKE_JSON: &str = r"/[^{\[`\s](.|\n)*/";
const ANY_TEXT: &str = r"/(.|\n)*/";

/// Whose arguments are held to their schema; those of the others are any object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Schemas {
    /// Those of all functions.
    All,
    /// Those of strict functions, for requests with schemas that cannot be compiled.
    Strict,
}

impl Output {
    /// The text at which the reasoning ends that the prompt has begun. The grammar of the answer begins behind it.
    pub(crate) fn reasoning_end(&self) -> Option<&'static str> {
        self.tags().filter(|_| self.is_open).map(|tags| tags.close)
    }

    /// The grammar of an answer to a request: calls alone where they are required; where they are the model's choice,
    /// text in which every call is as it should be, if some function is strict, or if there may be one call only and
    /// calls have a marker; otherwise none.
    pub(crate) fn call_grammar(
        &self,
        tools: &Tools,
        tokenizer: &Tokenizer,
        schemas: Schemas,
    ) -> Option<String> {
        let functions: Vec<&Function> = tools.callable().collect();
        let is_free = tools.mode != CallMode::Required;
        let is_marked = matches!(self.format.tools, ToolFormat::Hermes | ToolFormat::Mistral);
        let is_single = !tools.is_parallel && tools.style == CallStyle::Tools && is_marked;
        let is_strict = functions.iter().any(|function| function.is_strict);
        if functions.is_empty() || (is_free && !is_strict && !is_single) {
            return None;
        }
        let most = if tools.is_parallel { CALLS_MAX } else { 1 };
        let grammar = Grammar { tokenizer, functions, schemas, most, is_free };
        let body = match self.format.tools {
            ToolFormat::None => return None,
            ToolFormat::Hermes => grammar.hermes(),
            ToolFormat::Mistral => grammar.mistral(),
            ToolFormat::Harmony => grammar.harmony(),
            ToolFormat::Llama3Json => grammar.alone("parameters", ("", "; ", "")),
            ToolFormat::Gemma => grammar.alone("parameters", ("[", ", ", "]")),
            ToolFormat::Json => grammar.alone("arguments", ("[", ", ", "]")),
        };
        let space = if self.is_open { r#"/\n{0,2}/ "# } else { "" };
        Some(format!("start: {space}answer\n{body}"))
    }
}

struct Grammar<'a> {
    tokenizer: &'a Tokenizer,
    functions: Vec<&'a Function>,
    schemas: Schemas,
    most: usize,
    /// The model may also answer in words.
    is_free: bool,
}

impl Grammar<'_> {
    /// A marker, as the token that it is, or as text.
    fn marker(&self, text: &str) -> String {
        self.token(text).map_or_else(|| quoted(text), |id| format!("<[{id}]>"))
    }

    fn token(&self, text: &str) -> Option<u32> {
        self.tokenizer.id(text).filter(|id| self.tokenizer.is_special(*id))
    }

    /// The rules of `call`, with what stands around its arguments.
    fn calls(&self, frame: impl Fn(&str) -> (String, String)) -> String {
        let names: Vec<String> = (0..self.functions.len()).map(|at| format!("call_{at}")).collect();
        let rule = |(at, function): (usize, &&Function)| {
            let (before, after) = frame(&function.name);
            format!("call_{at}: {before} %json {} {after}", self.schema(function)).trim_end().to_owned()
        };
        let rules: Vec<String> = self.functions.iter().enumerate().map(rule).collect();
        format!("call: {}\n{}\n", names.join(" | "), rules.join("\n"))
    }

    /// The frame of an object with a name and, under `key`, arguments.
    fn object(key: &str, name: &str) -> (String, String) {
        (quoted(&format!("{{\"name\": {}, \"{key}\": ", quoted(name))), quoted("}"))
    }

    /// The rules of `call` as whole objects with a name and, under `key`, arguments.
    fn objects(&self, key: &str) -> String {
        let names: Vec<String> = (0..self.functions.len()).map(|at| format!("call_{at}")).collect();
        let rule = |(at, function): (usize, &&Function)| {
            let mut arguments = Value::Object(self.arguments(function));
            move_references(&mut arguments, &format!("#/properties/{key}"));
            let schema = json!({
                "type": "object",
                "properties": {"name": {"const": function.name}, key: arguments},
                "required": ["name", key],
                "additionalProperties": false,
                "x-guidance": {"whitespace_pattern": JSON_SPACE},
            });
            format!("call_{at}: %json {schema}\n")
        };
        let rules: String = self.functions.iter().enumerate().map(rule).collect();
        format!("call: {}\n{rules}", names.join(" | "))
    }

    fn schema(&self, function: &Function) -> Value {
        let mut schema = self.arguments(function);
        // The library's own key: what a client puts there must not change the rules.
        schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_SPACE}));
        Value::Object(schema)
    }

    /// The schema that the arguments are held to.
    fn arguments(&self, function: &Function) -> Map<String, Value> {
        let is_held = self.schemas == Schemas::All || function.is_strict;
        let mut schema = if is_held { function.schema() } else { Map::new() };
        if !["$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| schema.contains_key(*key)) {
            schema.entry("type").or_insert_with(|| json!("object"));
        }
        for key in ["x-guidance", "$schema", "$id"] {
            schema.shift_remove(key);
        }
        schema
    }

    /// `calls` one after another, `separator` between them.
    fn repeated(&self, separator: &str) -> String {
        match self.most {
            1 => "call".to_owned(),
            most => format!("call ({separator} call){{0,{}}}", most - 1),
        }
    }

    fn hermes(&self) -> String {
        let close = self.marker(hermes::CLOSE);
        let object = |name: &str| {
            let (before, after) = Self::object("arguments", name);
            (before, format!("{after} \"\\n\" {close}"))
        };
        let open = hermes::OPEN;
        let begin = |marker: String| format!("begin: {marker} \"\\n\"\n");
        if !self.is_free {
            let answer = self.repeated("\"\\n\" begin");
            return format!("answer: begin {answer}\n{}{}", begin(self.marker(open)), self.calls(object));
        }
        let calls = self.calls(object);
        match self.token(open) {
            Some(_) => {
                let begin = begin(self.marker(open));
                let most = self.most;
                format!("answer: text (begin call text){{0,{most}}}\n{begin}text: {ANY_TEXT}\n{calls}")
            }
            None => self.free_after(open, "\"\\n\"", &calls),
        }
    }

    /// Text in which a marker that is no token of its own is followed by a call.
    fn free_after(&self, marker: &str, between: &str, calls: &str) -> String {
        let (most, marker) = (self.most, quoted(marker));
        if most == 1 {
            // Text after the call could begin another one.
            return format!(
                "answer: begin {between} call | text\nbegin[lazy]: TEXT {marker}\ntext: TEXT\nTEXT: {ANY_TEXT}\n{calls}"
            );
        }
        format!(
            "answer: (begin {between} call){{0,{most}}} text\nbegin[lazy]: TEXT {marker}\ntext: TEXT\nTEXT: {ANY_TEXT}\n{calls}"
        )
    }

    fn mistral(&self) -> String {
        let marker = objects::TOOL_CALLS;
        if let (Some(arguments), Some(_)) = (self.token(objects::ARGS), self.token(marker)) {
            let begin = self.marker(marker);
            let frame = |name: &str| (format!("{begin} {} <[{arguments}]>", quoted(name)), String::new());
            let calls = self.calls(frame);
            let most = self.most;
            return if self.is_free {
                format!("answer: text call{{0,{most}}}\ntext: {ANY_TEXT}\n{calls}")
            } else {
                format!("answer: call{{1,{most}}}\n{calls}")
            };
        }
        let calls = self.calls(|name| Self::object("arguments", name));
        let array = format!("\"[\" {} \"]\"", self.repeated("\", \""));
        match (self.is_free, self.token(marker)) {
            (false, _) => format!("answer: {} {array}\n{calls}", self.marker(marker)),
            (true, Some(id)) => format!("answer: text (<[{id}]> {array})?\ntext: {ANY_TEXT}\n{calls}"),
            (true, None) => {
                let marker = quoted(marker);
                format!(
                    "answer: begin {array} | text\nbegin[lazy]: TEXT {marker}\ntext: TEXT\nTEXT: {ANY_TEXT}\n{calls}"
                )
            }
        }
    }

    /// Objects in place of a text.
    fn alone(&self, key: &str, (open, separator, close): (&str, &str, &str)) -> String {
        let calls = self.objects(key);
        let mut answer = "call".to_owned();
        if self.most > 1 {
            let several = self.repeated(&quoted(separator));
            answer = match open {
                "" => several,
                _ => format!("call | {} {several} {}", quoted(open), quoted(close)),
            };
        }
        if self.is_free {
            return format!("answer: {answer} | text\ntext: {UNLIKE_JSON}\n{calls}");
        }
        format!("answer: {answer}\n{calls}")
    }

    /// One call: the token that ends it ends the answer.
    fn harmony(&self) -> String {
        let [channel, message, constrain] =
            [harmony::CHANNEL, harmony::MESSAGE, harmony::CONSTRAIN].map(|marker| self.marker(marker));
        let frame = |name: &str| {
            let recipient = quoted(&format!("commentary to=functions.{name} "));
            (format!("{channel} {recipient} {constrain} \"json\" {message}"), String::new())
        };
        let calls = self.calls(frame);
        if !self.is_free {
            return format!("answer: call\n{calls}");
        }
        let [end, start] = [harmony::END, harmony::START].map(|marker| self.marker(marker));
        let ended = match self.token(harmony::END) {
            Some(_) => format!("ended: text {end}"),
            None => format!("ended[lazy]: {ANY_TEXT} {end}"),
        };
        format!(
            "answer: before* (final | call)\n\
             before: {channel} (\"analysis\" | \"commentary\") {message} ended {start} \"assistant\"\n{ended}\n\
             final: {channel} \"final\" {message} text\ntext: {ANY_TEXT}\n{calls}"
        )
    }
}

/// Lets the references inside of a schema mean the same where the schema stands at `place` of another.
fn move_references(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(target) if key == "$ref" && (target == "#" || target.starts_with("#/")) => {
                        target.replace_range(..1, place);
                    }
                    // What stands there is data.
                    _ if matches!(key.as_str(), "const" | "enum" | "default" | "examples") => {}
                    value => move_references(value, place),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| move_references(item, place)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A string of a Lark grammar, which is one of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Format, ReasoningFormat, ShowReasoning};
    use super::*;
    use crate::openai::fields::Fields;

    /// A tokenizer in which these are special tokens, 900 the first.
    fn tokenizer(special: &[&str]) -> Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama/tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (at, text) in special.iter().enumerate() {
            let added = json!({"id": 900 + at, "content": text, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false});
            file["added_tokens"].as_array_mut().unwrap().push(added);
        }
        let tokenizer = Tokenizer::from_bytes(&path, file.to_string().as_bytes()).unwrap();
        for (at, text) in special.iter().enumerate() {
            assert!(tokenizer.is_special(tokenizer.id(text).unwrap()), "{at}");
        }
        tokenizer
    }

    /// The grammar of a request with the strict function `f` and the function `g`, their schemas left out.
    fn grammar(format: ToolFormat, special: &[&str], patch: Value) -> Option<String> {
        let function = |name: &str, strict: bool| {
            let parameters = json!({"properties": {"x": {"enum": [1, "}"]}}, "required": ["x"]});
            json!({"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}})
        };
        let mut body =
            json!({"tools": [function("f", true), function("g", false)], "tool_choice": "required"});
        body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        let tools = Tools::read(&Fields::of(body.as_object().unwrap())).unwrap();
        let tokenizer = tokenizer(special);
        let format = Format { reasoning: ReasoningFormat::None, tools: format };
        let calls = (tools.names(), CallStyle::Tools);
        let output = Output::new(format, &tokenizer, calls, ShowReasoning::Yes);
        let mut text = output.call_grammar(&tools, &tokenizer, Schemas::Strict)?;
        for id in (0..special.len()).rev() {
            let real = tokenizer.id(special[id]).unwrap();
            text = text.replace(&format!("<[{real}]>"), special[id]);
        }
        let guidance = json!({"whitespace_pattern": JSON_SPACE});
        let strict = json!({"properties": {"x": {"enum": [1, "}"]}}, "required": ["x"], "type": "object", "x-guidance": guidance});
        let any = json!({"type": "object", "x-guidance": guidance});
        Some(text.replace(&strict.to_string(), "STRICT").replace(&any.to_string(), "ANY"))
    }

    const TAGS: [&str; 2] = [hermes::OPEN, hermes::CLOSE];

    #[test]
    fn required_calls_are_all_there_is() {
        let json_calls = |key: &str| {
            let call = |at: usize, name: &str, schema: &str| {
                format!(
                    "call_{at}: \"{{\\\"name\\\": \\\"{name}\\\", \\\"{key}\\\": \" %json {schema} \"}}\"\n"
                )
            };
            format!("call: call_0 | call_1\n{}{}", call(0, "f", "STRICT"), call(1, "g", "ANY"))
        };
        let object_calls = |key: &str| {
            let rule = |at: usize, name: &str, schema: Value| {
                let object = json!({"type": "object", "properties": {"name": {"const": name}, key: schema},
                    "required": ["name", key], "additionalProperties": false,
                    "x-guidance": {"whitespace_pattern": JSON_SPACE}});
                format!("call_{at}: %json {object}\n")
            };
            let strict =
                json!({"properties": {"x": {"enum": [1, "}"]}}, "required": ["x"], "type": "object"});
            let rules = rule(0, "f", strict) + &rule(1, "g", json!({"type": "object"}));
            format!("call: call_0 | call_1\n{rules}")
        };
        let tagged = json_calls("arguments").replace("\"}\"\n", "\"}\" \"\\n\" </tool_call>\n");
        let one = || json!({"parallel_tool_calls": false});
        let harmony = [harmony::CHANNEL, harmony::MESSAGE, harmony::CONSTRAIN, harmony::END, harmony::START];
        let mistral = [objects::TOOL_CALLS, objects::ARGS];
        let array = "call (\", \" call){0,63}";
        let cases = [
            (
                ToolFormat::Hermes,
                TAGS.as_slice(),
                json!({}),
                format!("begin call (\"\\n\" begin call){{0,63}}\nbegin: <tool_call> \"\\n\"\n{tagged}"),
            ),
            (ToolFormat::Hermes, &TAGS, one(), format!("begin call\nbegin: <tool_call> \"\\n\"\n{tagged}")),
            (
                ToolFormat::Llama3Json,
                &[],
                json!({}),
                format!("call (\"; \" call){{0,63}}\n{}", object_calls("parameters")),
            ),
            (ToolFormat::Llama3Json, &[], one(), format!("call\n{}", object_calls("parameters"))),
            (ToolFormat::Json, &[], json!({}), format!("call | \"[\" {array} \"]\"\n{}", object_calls("arguments"))),
            (ToolFormat::Gemma, &[], one(), format!("call\n{}", object_calls("parameters"))),
            (
                ToolFormat::Mistral,
                &mistral[..1],
                json!({}),
                format!("[TOOL_CALLS] \"[\" {array} \"]\"\n{}", json_calls("arguments")),
            ),
            (
                ToolFormat::Mistral,
                &mistral,
                json!({}),
                "call{1,64}\ncall: call_0 | call_1\ncall_0: [TOOL_CALLS] \"f\" [ARGS] %json STRICT\ncall_1: [TOOL_CALLS] \
                 \"g\" [ARGS] %json ANY\n"
                    .to_owned(),
            ),
            (
                ToolFormat::Harmony,
                &harmony,
                json!({"tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "call\ncall: call_0\ncall_0: <|channel|> \"commentary to=functions.g \" <|constrain|> \"json\" \
                 <|message|> %json ANY\n"
                    .to_owned(),
            ),
        ];
        for (format, special, patch, expected) in cases {
            let found = grammar(format, special, patch).unwrap();
            assert_eq!(found, format!("start: answer\nanswer: {expected}"), "{format:?}");
        }
    }

    #[test]
    fn references_are_moved_and_data_is_not() {
        let mut schema = json!({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#"}, {"$ref": "other.json#/x"}]}},
            "properties": {"$ref": {"const": {"$ref": "#/y"}}}});
        move_references(&mut schema, "#/properties/arguments");
        let expected = json!({"$ref": "#/properties/arguments/$defs/a",
            "$defs": {"a": {"anyOf": [{"$ref": "#/properties/arguments"}, {"$ref": "other.json#/x"}]}},
            "properties": {"$ref": {"const": {"$ref": "#/y"}}}});
        assert_eq!(schema, expected);
    }

    #[test]
    fn calls_of_choice_are_held_where_one_is_strict() {
        let auto = || json!({"tool_choice": "auto"});
        let begins = [
            (
                ToolFormat::Hermes,
                TAGS.as_slice(),
                "text (begin call text){0,64}\nbegin: <tool_call> \"\\n\"\ntext: /(.|\\n)*/\n",
            ),
            (ToolFormat::Hermes, &[], "(begin \"\\n\" call){0,64} text\nbegin[lazy]: TEXT \"<tool_call>\"\n"),
            (ToolFormat::Json, &[], "call | \"[\" call (\", \" call){0,63} \"]\" | text\ntext: /[^{"),
            (ToolFormat::Llama3Json, &[], "call (\"; \" call){0,63} | text\n"),
            (ToolFormat::Mistral, &[objects::TOOL_CALLS], "text ([TOOL_CALLS] \"[\" call"),
            (ToolFormat::Mistral, &[objects::TOOL_CALLS, objects::ARGS], "text call{0,64}\n"),
            (ToolFormat::Harmony, &[harmony::END], "before* (final | call)\n"),
        ];
        for (format, special, expected) in begins {
            let found = grammar(format, special, auto()).unwrap();
            assert!(found.starts_with(&format!("start: answer\nanswer: {expected}")), "{format:?}: {found}");
        }
        let single = json!({"tool_choice": "auto", "parallel_tool_calls": false});
        let found = grammar(ToolFormat::Hermes, &[], single).unwrap();
        assert!(found.contains("answer: begin \"\\n\" call | text\n"), "{found}");
        let lenient =
            json!({"tools": [{"type": "function", "function": {"name": "g"}}], "tool_choice": "auto"});
        assert_eq!(grammar(ToolFormat::Hermes, &TAGS, lenient.clone()), None);
        let mut single = lenient;
        single["parallel_tool_calls"] = json!(false);
        assert_eq!(grammar(ToolFormat::Json, &TAGS, single.clone()), None);
        let found = grammar(ToolFormat::Hermes, &TAGS, single).unwrap();
        assert!(found.contains("answer: text (begin call text){0,1}\n"), "{found}");
        assert_eq!(grammar(ToolFormat::Hermes, &TAGS, json!({"tool_choice": "none"})), None);
        assert_eq!(grammar(ToolFormat::None, &[], json!({})), None);
    }

    #[test]
    fn the_answer_begins_behind_the_reasoning() {
        let tokenizer = tokenizer(&[]);
        let body =
            json!({"tools": [{"type": "function", "function": {"name": "g"}}], "tool_choice": "required"});
        let tools = Tools::read(&Fields::of(body.as_object().unwrap())).unwrap();
        let format = Format { reasoning: ReasoningFormat::Think, tools: ToolFormat::Json };
        let calls = (tools.names(), CallStyle::Tools);
        let output = Output::new(format, &tokenizer, calls, ShowReasoning::Yes);
        assert_eq!(output.reasoning_end(), None);
        let open = output.after("assistant\n<think>\n");
        assert_eq!(open.reasoning_end(), Some("</think>"));
        let found = open.call_grammar(&tools, &tokenizer, Schemas::All).unwrap();
        assert!(found.starts_with("start: /\\n{0,2}/ answer\n"), "{found}");
        let schema = "\"arguments\":{\"type\":\"object\",\"properties\":{}}";
        assert!(found.contains(schema), "all schemas hold: {found}");
    }
}
