//! The body of POST /v1/responses: its own fields, and the chat request that the rest of it is.

use serde_json::{Map, Value, json};

use super::items;
use super::mcp::Offered;
use super::tools;
use crate::error::ApiError;
use crate::openai::fields::{Fields, unexpected};
use crate::openai::session;
use crate::openai::session_fields::Truncation;
use crate::registry::Model;

/// Fields that have another name, another form or no meaning in a chat request.
const OWN: [&str; 19] = [
    "background",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "messages",
    "metadata",
    "previous_response_id",
    "prompt",
    "reasoning",
    "response_format",
    "store",
    "stream_options",
    "text",
    "tool_choice",
    "tools",
    "truncation",
];

/// Where the conversation before a response stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    Nothing,
    Response(String),
    Conversation(String),
}

/// How a response is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    Stream,
}

/// A request for a response.
#[derive(Clone, Debug)]
pub(crate) struct ResponseRequest {
    pub(crate) model: String,
    pub(crate) before: Before,
    /// Whether it can be fetched and gone on from. `None` where the client did not say.
    pub(crate) store: Option<bool>,
    pub(crate) background: bool,
    pub(crate) delivery: Delivery,
    pub(crate) truncation: Truncation,
    pub(crate) max_tool_calls: Option<usize>,
    pub(crate) instructions: Vec<Value>,
    pub(crate) input: Vec<Value>,
    /// The tools of type `mcp`, each with its place in `tools`.
    pub(crate) mcp: Vec<(usize, Map<String, Value>)>,
    /// Tools of MCP servers that the model may call.
    offered: Vec<Offered>,
    /// Items of the response that stand before its first answer.
    pub(crate) opened: Vec<Value>,
    /// What the object `response` repeats of the request.
    pub(crate) echo: Map<String, Value>,
    /// The chat request, but for its messages.
    chat: Map<String, Value>,
}

impl ResponseRequest {
    /// # Errors
    /// 400, naming the field.
    pub(crate) fn read(body: &Map<String, Value>) -> Result<Self, ApiError> {
        let fields = Fields::of(body);
        let model = fields.required_string("model")?.to_owned();
        let before = before(&fields)?;
        let store = fields.bool("store")?;
        let background = fields.bool("background")?.unwrap_or(false);
        if background && store == Some(false) {
            return Err(ApiError::field("background", "expected `store`: true beside it, found false"));
        }
        let input = items::read(&fields, "input")?;
        if input.is_empty() && before == Before::Nothing && fields.get("input").is_none() {
            return Err(fields.missing("input", "a string or an array of items"));
        }
        let truncation = match fields.string("truncation")? {
            None | Some("disabled") => Truncation::Disabled,
            Some("auto") => Truncation::Auto,
            Some(other) => return Err(unexpected("truncation", "auto or disabled", &json!(other))),
        };
        if fields.get("prompt").is_some() {
            return Err(ApiError::unsupported("prompt", "prompt templates are not supported by this server"));
        }
        let tools = tools::read(&fields)?;
        let request = Self {
            model,
            before,
            store,
            background,
            delivery: if fields.bool("stream")? == Some(true) { Delivery::Stream } else { Delivery::Whole },
            truncation,
            max_tool_calls: fields.count("max_tool_calls", 0..=usize::MAX)?,
            instructions: instructions(&fields)?,
            input,
            echo: echo(&fields)?,
            chat: chat(body, &tools)?,
            mcp: tools.mcp,
            offered: Vec::new(),
            opened: Vec::new(),
        };
        Ok(request)
    }

    /// The chat request with these items as its conversation, the instructions before them.
    pub(crate) fn chat(&self, conversation: &[Value]) -> Map<String, Value> {
        let mut chat = self.chat.clone();
        chat.insert("messages".to_owned(), Value::from(self.messages(conversation)));
        chat
    }

    fn messages(&self, conversation: &[Value]) -> Vec<Value> {
        let mut items = [self.instructions.as_slice(), conversation].concat();
        for item in items
            .iter_mut()
            .filter(|item| item["type"] == "mcp_call" || item["type"] == items::APPROVAL_REQUEST)
        {
            let is_it = |tool: &&Offered| item["server_label"] == tool.label && item["name"] == tool.name;
            if let Some(tool) = self.offered.iter().find(is_it) {
                item["name"] = json!(tool.function);
            }
        }
        items::messages(&items)
    }

    /// The same up to the last answer: what tools gave after it is not in its tokens.
    pub(crate) fn answered_len(&self, conversation: &[Value]) -> usize {
        let messages = self.messages(conversation);
        let results = messages.iter().rev().take_while(|message| message["role"] == "tool").count();
        messages.len() - results
    }

    /// The names of the functions that the model may call.
    pub(crate) fn functions(&self) -> Vec<String> {
        let tools = self.chat.get("tools").and_then(Value::as_array);
        let name = |tool: &Value| tool["function"]["name"].as_str().map(str::to_owned);
        tools.into_iter().flatten().filter_map(name).collect()
    }

    pub(crate) fn add_function(&mut self, function: Value) {
        let tools = self.chat.entry("tools").or_insert_with(|| json!([]));
        tools.as_array_mut().expect("it was made here").push(function);
    }

    /// Tells which functions are tools of MCP servers.
    pub(crate) fn set_mcp(&mut self, offered: &[Offered]) {
        self.offered = offered.to_vec();
        let chosen = &self.echo["tool_choice"];
        if chosen["type"] == "mcp" {
            let is_chosen = |tool: &&Offered| {
                chosen["server_label"] == tool.label
                    && (chosen["name"].is_null() || chosen["name"] == tool.name)
            };
            let named = |tool: &Offered| json!({"type": "function", "function": {"name": tool.function}});
            let tools: Vec<Value> = offered.iter().filter(is_chosen).map(named).collect();
            if !tools.is_empty() {
                let allowed = json!({"mode": "required", "tools": tools});
                self.set_tool_choice(json!({"type": "allowed_tools", "allowed_tools": allowed}));
            }
        }
        if !self.chat.contains_key("tools") {
            // Nothing is left to choose from.
            self.chat.remove("tool_choice");
        }
    }

    /// How the model chooses tools from now on: a call that had to be made was made.
    pub(crate) fn choose_freely(&mut self, may_call: bool) {
        let is_forced = self.chat.get("tool_choice").is_some_and(|choice| {
            choice == "required"
                || choice["type"] == "function"
                || choice["allowed_tools"]["mode"] == "required"
        });
        match (may_call, is_forced) {
            (false, _) => self.set_tool_choice(json!("none")),
            (true, true) => self.set_tool_choice(json!("auto")),
            (true, false) => {}
        }
    }

    fn set_tool_choice(&mut self, choice: Value) {
        self.chat.insert("tool_choice".to_owned(), choice);
    }

    /// Most tokens that the model may still answer with.
    pub(crate) fn limit_tokens(&mut self, left: usize) {
        self.chat.insert("max_completion_tokens".to_owned(), json!(left));
    }

    pub(crate) fn max_output_tokens(&self) -> Option<usize> {
        let max = |name: &str| self.chat.get(name).and_then(Value::as_u64);
        max("max_completion_tokens").or_else(|| max("max_tokens")).map(|max| max as usize)
    }

    /// How many messages of [`ResponseRequest::chat`] the instructions and these items are.
    pub(crate) fn messages_len(&self, conversation: &[Value]) -> usize {
        self.messages(conversation).len()
    }

    /// The chat request's sampling defaults belong to the model; the object names them.
    pub(crate) fn complete_echo(&mut self, model: &Model, (temperature, top_p): (f32, f32)) {
        self.echo.insert("model".to_owned(), json!(model.id));
        for (name, value) in [("temperature", temperature), ("top_p", top_p)] {
            // Through text, so that 0.9 stays 0.9.
            let number = value.to_string().parse::<f64>().unwrap_or_else(|_| f64::from(value));
            let entry = self.echo.entry(name).or_insert(Value::Null);
            if entry.is_null() {
                *entry = json!(number);
            }
        }
    }
}

/// An error about a field of the chat request, said of the field of this one.
pub(crate) fn renamed(error: ApiError) -> ApiError {
    error.rename(&[
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
    ])
}

fn before(fields: &Fields<'_, '_>) -> Result<Before, ApiError> {
    let conversation = match fields.get("conversation") {
        None => None,
        Some(Value::String(id)) => Some(id.clone()),
        Some(Value::Object(object)) => {
            Some(Fields::at(object, "conversation").required_string("id")?.to_owned())
        }
        Some(other) => return Err(unexpected("conversation", "an id, or an object with one", other)),
    };
    match (fields.string("previous_response_id")?, conversation) {
        (Some(_), Some(_)) => Err(ApiError::field(
            "previous_response_id",
            "expected only one of previous_response_id and conversation, found both",
        )),
        (Some(id), None) => Ok(Before::Response(id.to_owned())),
        (None, Some(id)) => Ok(Before::Conversation(id)),
        (None, None) => Ok(Before::Nothing),
    }
}

/// The field `instructions`: text, or items.
fn instructions(fields: &Fields<'_, '_>) -> Result<Vec<Value>, ApiError> {
    match fields.get("instructions") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![json!({
            "type": "message", "role": "developer", "content": [{"type": "input_text", "text": text}],
        })]),
        Some(_) => items::read(fields, "instructions"),
    }
}

/// The fields of the chat request that are not the conversation.
fn chat(body: &Map<String, Value>, tools: &tools::Tools) -> Result<Map<String, Value>, ApiError> {
    let fields = Fields::of(body);
    let mut chat: Map<String, Value> = body
        .iter()
        .filter(|(name, value)| !OWN.contains(&name.as_str()) && !value.is_null())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if let Some(max) = fields.count("max_output_tokens", 1..=usize::MAX)? {
        chat.insert("max_completion_tokens".to_owned(), json!(max));
    }
    if let Some(format) = text_format(&fields)? {
        chat.insert("response_format".to_owned(), format);
    }
    chat.extend(tools.chat.clone());
    let wants_logprobs = includes(&fields)?.iter().any(|name| name == "message.output_text.logprobs");
    if wants_logprobs || fields.count("top_logprobs", 0..=20)?.is_some_and(|top| top > 0) {
        chat.insert("logprobs".to_owned(), json!(true));
    }
    if let Some(effort) = reasoning(&fields)?.get("effort").and_then(Value::as_str) {
        chat.insert("reasoning_effort".to_owned(), json!(effort));
    }
    Ok(chat)
}

fn includes(fields: &Fields<'_, '_>) -> Result<Vec<String>, ApiError> {
    let Some(items) = fields.array("include")? else { return Ok(Vec::new()) };
    let name = |item: &Value| {
        item.as_str().map(str::to_owned).ok_or_else(|| unexpected("include", "an array of strings", item))
    };
    items.iter().map(name).collect()
}

fn reasoning(fields: &Fields<'_, '_>) -> Result<Map<String, Value>, ApiError> {
    let Some(reasoning) = fields.object("reasoning")? else { return Ok(Map::new()) };
    let own = Fields::at(reasoning, "reasoning");
    for field in ["effort", "summary", "generate_summary"] {
        own.string(field)?;
    }
    Ok(reasoning.clone())
}

/// `text.format` as chat's `response_format`.
fn text_format(fields: &Fields<'_, '_>) -> Result<Option<Value>, ApiError> {
    let Some(text) = fields.object("text")? else { return Ok(None) };
    let text = Fields::at(text, "text");
    text.string("verbosity")?;
    let Some(format) = text.object("format")? else { return Ok(None) };
    let own = Fields::at(format, "text.format");
    match own.required_string("type")? {
        "text" => Ok(None),
        "json_object" => Ok(Some(json!({"type": "json_object"}))),
        "json_schema" => {
            own.required_string("name")?;
            if own.object("schema")?.is_none() {
                return Err(own.missing("schema", "an object"));
            }
            let schema: Map<String, Value> = format
                .iter()
                .filter(|(key, _)| *key != "type")
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            Ok(Some(json!({"type": "json_schema", "json_schema": schema})))
        }
        other => Err(unexpected("text.format.type", "text, json_schema or json_object", &json!(other))),
    }
}

/// What the object `response` repeats; absent fields have the values that the API gives them.
fn echo(fields: &Fields<'_, '_>) -> Result<Map<String, Value>, ApiError> {
    let metadata = session::metadata(fields)?.unwrap_or_default();
    let given = |name: &str, default: Value| (name.to_owned(), fields.get(name).cloned().unwrap_or(default));
    let mut text = fields.object("text")?.cloned().unwrap_or_default();
    text.entry("format").or_insert_with(|| json!({"type": "text"}));
    let mut reasoning = reasoning(fields)?;
    for field in ["effort", "summary"] {
        reasoning.entry(field).or_insert(Value::Null);
    }
    let mut echo: Map<String, Value> = [
        given("background", json!(false)),
        given("instructions", Value::Null),
        given("max_output_tokens", Value::Null),
        given("max_tool_calls", Value::Null),
        given("parallel_tool_calls", json!(true)),
        given("previous_response_id", Value::Null),
        given("prompt_cache_key", Value::Null),
        given("safety_identifier", Value::Null),
        given("temperature", Value::Null),
        given("top_p", Value::Null),
        given("presence_penalty", json!(0.0)),
        given("frequency_penalty", json!(0.0)),
        given("tool_choice", json!("auto")),
        given("tools", json!([])),
        given("top_logprobs", json!(0)),
        given("truncation", json!("disabled")),
    ]
    .into_iter()
    .collect();
    for field in ["prompt_cache_key", "safety_identifier", "service_tier", "user"] {
        fields.string(field)?;
    }
    fields.bool("parallel_tool_calls")?;
    let tier = match fields.string("service_tier")? {
        None | Some("auto") => "default",
        Some(tier) => tier,
    };
    echo.insert("service_tier".to_owned(), json!(tier));
    echo.insert("metadata".to_owned(), Value::Object(metadata));
    echo.insert("reasoning".to_owned(), Value::Object(reasoning));
    echo.insert("text".to_owned(), Value::Object(text));
    for field in ["user", "prompt_cache_options", "prompt_cache_retention"] {
        if let Some(value) = fields.get(field) {
            echo.insert(field.to_owned(), value.clone());
        }
    }
    if let Some(tools) = echo.get_mut("tools") {
        tools::complete(tools);
    }
    Ok(echo)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: Value) -> Result<ResponseRequest, ApiError> {
        let mut all = json!({"model": "m"});
        all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        ResponseRequest::read(all.as_object().unwrap())
    }

    #[test]
    fn a_response_is_a_chat_request() {
        let asked = request(json!({
            "input": "hi", "instructions": "be brief", "max_output_tokens": 9, "temperature": 0.5, "top_k": 3,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": true}},
            "include": ["message.output_text.logprobs"], "reasoning": {"effort": "low"}, "user": null,
        }));
        let asked = asked.unwrap();
        let chat = asked.chat(&asked.input);
        assert_eq!(
            Value::Object(chat),
            json!({
                "model": "m", "temperature": 0.5, "top_k": 3, "max_completion_tokens": 9, "logprobs": true,
                "reasoning_effort": "low",
                "response_format": {"type": "json_schema", "json_schema":
                    {"name": "n", "schema": {"type": "object"}, "strict": true}},
                "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
            })
        );
        assert_eq!(asked.echo["instructions"], "be brief");
        assert_eq!(asked.echo["truncation"], "disabled");
        assert_eq!(asked.echo["reasoning"], json!({"effort": "low", "summary": null}));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": 5}), "input"),
            (json!({"input": "a", "max_output_tokens": "x"}), "max_output_tokens"),
            (json!({"input": "a", "previous_response_id": "a", "conversation": "b"}), "previous_response_id"),
            (json!({"input": "a", "background": true, "store": false}), "background"),
            (json!({"input": "a", "truncation": "some"}), "truncation"),
            (
                json!({"input": "a", "text": {"format": {"type": "json_schema", "name": "n"}}}),
                "text.format.schema",
            ),
            (json!({"input": "a", "include": [3]}), "include"),
            (json!({"input": "a", "metadata": {"a": 3}}), "metadata.a"),
            (json!({"input": "a", "tools": [{"type": "function"}]}), "tools[0].name"),
        ] {
            let error = request(body.clone()).unwrap_err();
            assert_eq!(error.body()["error"]["param"], param, "{body}");
        }
    }
}
