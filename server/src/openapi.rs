//! The document at /openapi.json: what can be asked of this server, by path. Answers are described in docs/api.md.

use serde_json::{Map, Value, json};

/// A path, its methods, and what each of them takes.
struct Operation {
    path: &'static str,
    method: &'static str,
    summary: &'static str,
    /// Parameters of the query.
    query: &'static [(&'static str, Kind)],
    /// The schema of the body, by name.
    body: Option<&'static str>,
}

/// What a parameter of the query is.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Count,
    Order,
    Flag,
}

const PAGE: &[(&str, Kind)] = &[("limit", Kind::Count), ("order", Kind::Order), ("after", Kind::Text)];
const FILES: &[(&str, Kind)] =
    &[("limit", Kind::Count), ("order", Kind::Order), ("after", Kind::Text), ("purpose", Kind::Text)];
/// The body that is a form.
const FORM: &str = "FileRequest";
const NONE: &[(&str, Kind)] = &[];

const fn of(
    (method, path): (&'static str, &'static str),
    summary: &'static str,
    query: &'static [(&'static str, Kind)],
    body: Option<&'static str>,
) -> Operation {
    Operation { path, method, summary, query, body }
}

const OPERATIONS: &[Operation] = &[
    of(("get", "/v1/models"), "The models that can be used", NONE, None),
    of(("get", "/v1/models/{id}"), "One of them", NONE, None),
    of(("post", "/v1/chat/completions"), "Answers a conversation", NONE, Some("ChatRequest")),
    of(
        ("get", "/v1/chat/completions"),
        "Stored completions",
        &[("limit", Kind::Count), ("order", Kind::Order), ("after", Kind::Text), ("model", Kind::Text)],
        None,
    ),
    of(("get", "/v1/chat/completions/{id}"), "A stored completion", NONE, None),
    of(("post", "/v1/chat/completions/{id}"), "Sets its metadata", NONE, Some("MetadataRequest")),
    of(("delete", "/v1/chat/completions/{id}"), "Removes it", NONE, None),
    of(("get", "/v1/chat/completions/{id}/messages"), "Its messages", PAGE, None),
    of(("post", "/v1/completions"), "Goes on with a text", NONE, Some("CompletionRequest")),
    of(("post", "/v1/embeddings"), "Texts as vectors", NONE, Some("EmbeddingRequest")),
    of(("post", "/v1/rerank"), "Documents by their score with a query", NONE, Some("RerankRequest")),
    of(("post", "/v1/responses"), "Makes a response", NONE, Some("ResponseRequest")),
    of(
        ("post", "/v1/responses/input_tokens"),
        "Counts the tokens of its prompt",
        NONE,
        Some("ResponseRequest"),
    ),
    of(("post", "/v1/responses/compact"), "Makes a conversation short", NONE, Some("ResponseRequest")),
    of(
        ("get", "/v1/responses/{id}"),
        "A response, or its events again",
        &[("stream", Kind::Flag), ("starting_after", Kind::Count)],
        None,
    ),
    of(("delete", "/v1/responses/{id}"), "Removes it", NONE, None),
    of(("post", "/v1/responses/{id}/cancel"), "Ends one that is made in the background", NONE, None),
    of(("get", "/v1/responses/{id}/input_items"), "What was said in it", PAGE, None),
    of(("post", "/v1/conversations"), "Makes a conversation", NONE, Some("ConversationRequest")),
    of(("get", "/v1/conversations/{id}"), "A conversation", NONE, None),
    of(("post", "/v1/conversations/{id}"), "Sets its metadata", NONE, Some("MetadataRequest")),
    of(("delete", "/v1/conversations/{id}"), "Removes it", NONE, None),
    of(("get", "/v1/conversations/{id}/items"), "Its items", PAGE, None),
    of(("post", "/v1/conversations/{id}/items"), "Adds items", NONE, Some("ItemsRequest")),
    of(("get", "/v1/conversations/{id}/items/{item}"), "An item", NONE, None),
    of(("delete", "/v1/conversations/{id}/items/{item}"), "Removes it", NONE, None),
    of(
        ("post", "/v1/messages"),
        "Answers a conversation, in Anthropic's form",
        NONE,
        Some("MessagesRequest"),
    ),
    of(
        ("post", "/v1/messages/count_tokens"),
        "Counts the tokens of its prompt",
        NONE,
        Some("MessagesRequest"),
    ),
    of(("get", "/v1/sessions"), "Sessions", PAGE, None),
    of(("post", "/v1/sessions"), "Makes a session", NONE, Some("SessionRequest")),
    of(("get", "/v1/sessions/{id}"), "A session", NONE, None),
    of(("patch", "/v1/sessions/{id}"), "Changes it", NONE, Some("SessionRequest")),
    of(("delete", "/v1/sessions/{id}"), "Removes it", NONE, None),
    of(("post", "/v1/sessions/{id}/fork"), "A session that begins as this one", NONE, Some("ForkRequest")),
    of(("post", "/v1/sessions/{id}/rollback"), "Takes it back", NONE, Some("RollbackRequest")),
    of(("get", "/v1/sessions/{id}/turns"), "Its turns", PAGE, None),
    of(("get", "/v1/sessions/{id}/stream"), "The events of its answer", &[("after", Kind::Count)], None),
    of(("post", "/v1/sessions/{id}/prefetch"), "Reads its pages into memory", NONE, None),
    of(("post", "/v1/store/gc"), "Cleans the store; the operator's", NONE, None),
    of(("post", "/v1/store/verify"), "Reads the store and proves it; the operator's", NONE, None),
    of(("post", "/v1/store/snapshot"), "Copies the store; the operator's", NONE, Some("SnapshotRequest")),
    of(("get", "/v1/files"), "Files", FILES, None),
    of(("post", "/v1/files"), "Takes a file in", NONE, Some(FORM)),
    of(("get", "/v1/files/{id}"), "A file", NONE, None),
    of(("delete", "/v1/files/{id}"), "Removes it", NONE, None),
    of(("get", "/v1/files/{id}/content"), "Its bytes", NONE, None),
    of(("get", "/v1/batches"), "Batches", PAGE, None),
    of(("post", "/v1/batches"), "Has the lines of a file answered", NONE, Some("BatchRequest")),
    of(("get", "/v1/batches/{id}"), "A batch", NONE, None),
    of(("post", "/v1/batches/{id}/cancel"), "Ends it", NONE, None),
    of(("post", "/tokenize"), "Text as tokens", NONE, Some("TokenizeRequest")),
    of(("post", "/detokenize"), "Tokens as text", NONE, Some("DetokenizeRequest")),
    of(("get", "/health"), "Whether requests are served", NONE, None),
    of(("get", "/metrics"), "Counts, in the format of Prometheus", NONE, None),
];

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = operation.describe();
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Mainstay", "version": env!("CARGO_PKG_VERSION")},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(),
        },
    })
}

impl Operation {
    fn describe(&self) -> Value {
        let in_path = self.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let in_path = in_path
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
        let in_query = self.query.iter().map(|(name, kind)| {
            let schema = match kind {
                Kind::Text => json!({"type": "string"}),
                Kind::Count => json!({"type": "integer", "minimum": 0}),
                Kind::Order => json!({"enum": ["asc", "desc"]}),
                Kind::Flag => json!({"type": "boolean"}),
            };
            json!({"name": name, "in": "query", "schema": schema})
        });
        let error = json!({"description": "What was expected, and what was found",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}});
        let mut operation = json!({
            "summary": self.summary,
            "parameters": in_path.chain(in_query).collect::<Vec<_>>(),
            "responses": {
                "200": {"description": "The answer; with `stream`, events", "content": {
                    "application/json": {}, "application/octet-stream": {}, "text/event-stream": {},
                    "text/plain": {}}},
                "201": {"description": "What was made", "content": {"application/json": {}}},
                "default": error,
            },
        });
        if let Some(schema) = self.body {
            let media_type = if schema == FORM { "multipart/form-data" } else { "application/json" };
            let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
            operation["requestBody"] = json!({"required": true, "content": {media_type: {"schema": schema}}});
        }
        operation
    }
}

/// An object of these fields; others are ignored.
fn object(required: &[&str], properties: Value) -> Value {
    json!({"type": "object", "required": required, "properties": properties})
}

/// The same with the fields of `more`.
fn with(mut base: Value, more: Value) -> Value {
    if let (Some(properties), Value::Object(more)) = (base["properties"].as_object_mut(), more) {
        properties.extend(more);
    }
    base
}

fn sampling() -> Value {
    let number = |from: f64, to: f64| json!({"type": ["number", "null"], "minimum": from, "maximum": to});
    json!({
        "temperature": number(0.0, 2.0),
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": -1},
        "min_p": number(0.0, 1.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "seed": {"type": ["integer", "null"]},
        "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
        "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
        "stream": {"type": ["boolean", "null"]},
        "user": {"type": ["string", "null"]},
        "cache_salt": {"type": ["string", "null"]},
        "durability": {"enum": ["ephemeral", "async", "turn", "full", null]},
    })
}

fn schemas() -> Value {
    let text = || json!({"type": "string"});
    let count = || json!({"type": ["integer", "null"], "minimum": 1});
    let metadata = || json!({"type": ["object", "null"], "additionalProperties": {"type": "string"}});
    let list = |items: Value| json!({"type": "array", "items": items});
    let message = object(&["role"], json!({"role": text(), "content": {}}));
    let chat = json!({
        "model": text(),
        "messages": list(message.clone()),
        "max_tokens": count(),
        "max_completion_tokens": count(),
        "tools": list(json!({"type": "object"})),
        "tool_choice": {"type": ["string", "object", "null"]},
        "parallel_tool_calls": {"type": ["boolean", "null"]},
        "response_format": {"type": ["object", "null"]},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "store": {"type": ["boolean", "null"]},
        "metadata": metadata(),
        "session_id": {"type": ["string", "null"]},
        "session_mode": {"enum": ["full", "append", null]},
    });
    let input = json!({"anyOf": [text(), list(json!({"type": "object"}))]});
    let response = json!({
        "model": text(),
        "input": input,
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": count(),
        "previous_response_id": {"type": ["string", "null"]},
        "conversation": {"type": ["string", "object", "null"]},
        "store": {"type": ["boolean", "null"]},
        "background": {"type": ["boolean", "null"]},
        "truncation": {"enum": ["auto", "disabled", null]},
        "text": {"type": ["object", "null"]},
        "tools": list(json!({"type": "object"})),
        "tool_choice": {"type": ["string", "object", "null"]},
        "metadata": metadata(),
        "include": list(text()),
    });
    let tokens = || list(json!({"type": "integer", "minimum": 0}));
    let prompt = json!({"anyOf": [text(), list(text()), tokens(), list(tokens())]});
    json!({
        "ChatRequest": with(object(&["model", "messages"], sampling()), chat),
        "CompletionRequest": with(object(&["model", "prompt"], sampling()), json!({
            "model": text(), "prompt": prompt, "max_tokens": {"type": ["integer", "null"], "minimum": 0},
            "echo": {"type": ["boolean", "null"]},
            "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20}})),
        "EmbeddingRequest": object(&["model", "input"], json!({
            "model": text(), "input": prompt, "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": count()})),
        "RerankRequest": object(&["model", "query", "documents"], json!({
            "model": text(), "query": text(), "documents": list(text()), "top_n": count()})),
        "ResponseRequest": with(object(&["model", "input"], sampling()), response),
        "ConversationRequest": object(&[], json!({"metadata": metadata(), "items": list(json!({"type": "object"}))})),
        "ItemsRequest": object(&["items"], json!({"items": list(json!({"type": "object"}))})),
        "MetadataRequest": object(&["metadata"], json!({"metadata": metadata()})),
        "MessagesRequest": object(&["model", "messages", "max_tokens"], json!({
            "model": text(), "messages": list(message), "max_tokens": count(), "system": {"type": ["string", "array"]},
            "stop_sequences": list(text()), "stream": {"type": "boolean"}, "tools": list(json!({"type": "object"}))})),
        "SessionRequest": object(&[], json!({
            "name": {"type": ["string", "null"]}, "ttl": {"type": ["integer", "null"], "minimum": 1},
            "pinned": {"type": ["boolean", "null"]}, "priority": {"type": ["integer", "null"]},
            "metadata": metadata()})),
        "FileRequest": object(&["file", "purpose"], json!({
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "purpose": {"enum": ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"]}})),
        "BatchRequest": object(&["input_file_id", "endpoint", "completion_window"], json!({
            "input_file_id": text(), "completion_window": text(), "metadata": metadata(),
            "endpoint": {"enum": [
                "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]},
            "output_expires_after": object(&["anchor", "seconds"], json!({
                "anchor": {"enum": ["created_at"]},
                "seconds": {"type": "integer", "minimum": 3600, "maximum": 2_592_000}}))})),
        "ForkRequest": object(&[], json!({"at_turn": {"type": "integer"}, "at_token": {"type": "integer"},
            "name": {"type": ["string", "null"]}})),
        "RollbackRequest": object(&[], json!({"to_turn": {"type": "integer"}, "to_token": {"type": "integer"},
            "expected_turn": {"type": ["integer", "null"]}})),
        "SnapshotRequest": object(&["dir"], json!({"dir": text()})),
        "TokenizeRequest": object(&["model"], json!({"model": text(), "prompt": text(), "messages": list(json!({}))})),
        "DetokenizeRequest": object(&["model", "tokens"], json!({"model": text(), "tokens": tokens()})),
        "Error": object(&["error"], json!({"error": object(&["message", "type", "param", "code"], json!({
            "message": text(), "type": text(), "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]}}))})),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_is_there() {
        let document = document();
        for operation in OPERATIONS {
            let schema = operation.body.map(|name| &document["components"]["schemas"][name]);
            assert!(schema.is_none_or(Value::is_object), "{}", operation.path);
            assert!(document["paths"][operation.path][operation.method]["responses"]["default"].is_object());
        }
    }
}
