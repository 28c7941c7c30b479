//! Answers that call functions or show what was thought.

use mainstay_engine::store::Settings;
use mainstay_models::tokenizer::ShowSpecial;
use mainstay_server::{FormatChoice, ReasoningFormat, ToolFormat};
use serde_json::{Value, json};

use crate::resume::read;
use crate::sessions::{ids, turn, user, with_store};
use crate::testbed::{CHAT, Directory, Server, Setup, chat, joined, start};

/// Tells of functions and writes calls as Qwen's template does.
pub(crate) const QWEN: &str = "{%- if tools -%}
{{ '<|im_start|>system\n# Tools\n' }}{%- for tool in tools -%}{{ tool | tojson ~ '\n' }}{%- endfor -%}{{ '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] -%}
{{ '\n<tool_call>\n{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' ~ call.function.arguments | tojson ~ '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- if thinks -%}{{ '<think>\n' }}{%- endif -%}{%- endif -%}";

const SAID: &str = "Let me see. é\n\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Zürich\",\"days\":2}}\n</tool_call>\n\
                    <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

fn tools() -> Value {
    let weather = json!({"name": "get_weather", "description": "The weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}});
    json!([{"type": "function", "function": weather}, {"type": "function", "function": {"name": "now"}}])
}

fn qwen() -> Setup {
    Setup { template: Some(QWEN.to_owned()), ..Setup::default() }
}

fn function_calls(message: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let call = |call: &Value| (text(&call["function"]["name"]), text(&call["function"]["arguments"]));
    message["tool_calls"].as_array().unwrap().iter().map(call).collect()
}

fn expected_calls() -> Vec<(String, String)> {
    let calls = [("get_weather", "{\"city\":\"Zürich\",\"days\":2}"), ("now", "{}")];
    calls.map(|(name, arguments)| (name.to_owned(), arguments.to_owned())).to_vec()
}

fn prompt(server: &Server, answer: &Value) -> String {
    server.tokenizer.decode(&ids(&answer["prompt_token_ids"]), ShowSpecial::Yes)
}

/// The calls that the events of a choice make, checked as clients read them.
fn streamed_calls(events: &[Value]) -> Vec<Value> {
    let mut calls: Vec<Value> = Vec::new();
    for delta in events.iter().flat_map(|event| event["choices"].as_array().unwrap()).map(|c| &c["delta"]) {
        let entries = delta["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        for (at, entry) in entries.iter().enumerate() {
            let index = usize::try_from(entry["index"].as_u64().unwrap()).unwrap();
            assert!(
                entries[..at].iter().all(|other| other["index"] != index),
                "one entry for a call: {delta}"
            );
            if index == calls.len() {
                assert!(entry["id"].is_string() && entry["function"]["name"].is_string(), "{entry}");
                assert_eq!(entry["type"], "function");
                calls.push(entry.clone());
                continue;
            }
            assert_eq!(index, calls.len() - 1, "calls come in order");
            let keys: Vec<&String> = entry.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["index", "function"], "id, type and name come once");
            let all = calls[index]["function"]["arguments"].as_str().unwrap().to_owned();
            calls[index]["function"]["arguments"] =
                json!(all + entry["function"]["arguments"].as_str().unwrap());
        }
    }
    calls
        .into_iter()
        .map(|mut call| {
            call.as_object_mut().unwrap().remove("index");
            call
        })
        .collect()
}

#[tokio::test]
async fn calls_are_streamed_with_their_index_and_named_once() {
    let server = start(qwen()).await;
    server.will_say(SAID);
    let asked = json!({"tools": tools(), "return_token_ids": true, "logprobs": true});
    let answer = server.post(CHAT, &chat(asked.clone())).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "Let me see. é");
    assert_eq!(function_calls(&choice["message"]), expected_calls());
    assert_eq!(
        choice["logprobs"]["content"].as_array().unwrap().len() as u64,
        answer["usage"]["completion_tokens"].as_u64().unwrap(),
        "all tokens have their log-probability"
    );
    let shown = prompt(&server, &answer);
    assert!(shown.contains("# Tools") && shown.contains("\"description\": \"The weather.\""), "{shown}");

    server.will_say(SAID);
    let streamed = json!({"stream": true, "tools": tools()});
    let events = server.stream(CHAT, &chat(streamed)).await.events().await;
    assert_eq!(joined(&events, 0), "Let me see. é");
    let calls = streamed_calls(&events);
    assert_eq!(function_calls(&json!({"tool_calls": calls})), expected_calls());
    let pieces = events.iter().filter(|event| {
        event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
            .as_str()
            .is_some_and(|s| !s.is_empty())
    });
    assert!(pieces.count() > 4, "arguments come as they are drawn");
    let last = events.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
    let reasons = events.iter().filter(|event| !event["choices"][0]["finish_reason"].is_null());
    assert_eq!(reasons.count(), 1);
    assert_ne!(calls[0]["id"], calls[1]["id"]);
}

#[tokio::test]
async fn only_calls_leave_the_content_null_and_a_cut_call_is_no_end() {
    let server = start(qwen()).await;
    let said = "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    server.will_say(said);
    let answer = server.post(CHAT, &chat(json!({"tools": tools()}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
    let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
    server.will_say(said);
    let cut = json!({"tools": tools(), "max_tokens": tokens - 5, "stream": true});
    let events = server.stream(CHAT, &chat(cut)).await.events().await;
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    let calls = streamed_calls(&events);
    assert_eq!(calls[0]["function"]["name"], "now");
    assert!("{\"a\": 1}".starts_with(calls[0]["function"]["arguments"].as_str().unwrap()));
}

#[tokio::test]
async fn what_may_not_be_called_is_text() {
    let server = start(qwen()).await;
    let said = "<tool_call>{\"name\": \"now\"}</tool_call>";
    for asked in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        server.will_say(said);
        let answer = server.post(CHAT, &chat(asked)).await.ok();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop");
        // The tags are special tokens of this model, which are no text.
        assert_eq!(choice["message"]["content"], "{\"name\": \"now\"}");
        assert!(choice["message"].get("tool_calls").is_none());
    }
    let format = FormatChoice { tools: Some(ToolFormat::None), reasoning: Some(ReasoningFormat::None) };
    let server = start(Setup { format, ..qwen() }).await;
    server.will_say("<think>a</think><tool_call>{\"name\": \"now\"}</tool_call>");
    let answer = server.post(CHAT, &chat(json!({"tools": tools()}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "a{\"name\": \"now\"}");
}

#[tokio::test]
async fn thoughts_are_told_from_the_answer() {
    let server = start(qwen()).await;
    for (said, asked, opened) in [
        ("<think>\nHm, é.\n</think>\n\nYes.", json!({}), 0),
        ("Hm, é.\n</think>\n\nYes.", json!({"chat_template_kwargs": {"thinks": true}}), 1),
    ] {
        server.will_say(said);
        let answer = server.post(CHAT, &chat(asked.clone())).await.ok();
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("Yes."), &json!("Hm, é.")));
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let tokens = |key: &str| answer["usage"][key].as_u64().unwrap();
        let thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
        let encoded =
            server.tokenizer.encode("\nHm, é.\n</think>", mainstay_models::tokenizer::AddSpecial::No);
        let expected = encoded.unwrap().len() as u64 - opened;
        assert_eq!(thought, expected, "{said}");
        assert!(thought < tokens("completion_tokens"));

        server.will_say(said);
        let mut streamed = asked.clone();
        streamed["stream"] = json!(true);
        let events = server.stream(CHAT, &chat(streamed)).await.events().await;
        let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
        let thought: String = deltas.filter_map(|delta| delta["reasoning_content"].as_str()).collect();
        assert_eq!((thought.as_str(), joined(&events, 0).as_str()), ("Hm, é.", "Yes."));

        server.will_say(said);
        let mut hidden = asked.clone();
        hidden["include_reasoning"] = json!(false);
        let answer = server.post(CHAT, &chat(hidden)).await.ok();
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["content"], message.get("reasoning_content")), (&json!("Yes."), None));
    }
}

#[tokio::test]
async fn an_answer_in_json_or_a_call_may_come_where_both_begin_alike() {
    let format = FormatChoice { tools: Some(ToolFormat::Json), reasoning: None };
    let server = start(Setup { format, ..qwen() }).await;
    let place = json!({"type": "object", "properties": {"at": {"$ref": "#/$defs/at"}}, "required": ["at"],
        "additionalProperties": false, "$defs": {"at": {"enum": ["Bern", "Rome"]}}});
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": place}}]);
    let form = json!({"type": "object", "properties": {"no": {"type": "boolean"}}, "required": ["no"],
        "additionalProperties": false});
    let form = json!({"type": "json_schema", "json_schema": {"name": "form", "schema": form}});
    let (mut calls, mut answers) = (0, 0);
    for seed in 0..24 {
        let asked = json!({"tools": tools, "response_format": form, "seed": seed, "temperature": 1, "max_tokens": 200});
        let answer = server.post(CHAT, &chat(asked)).await.ok();
        let choice = &answer["choices"][0];
        if choice["finish_reason"] == "tool_calls" {
            for (name, arguments) in function_calls(&choice["message"]) {
                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                assert!(name == "look" && ["Bern", "Rome"].contains(&arguments["at"].as_str().unwrap()));
                calls += 1;
            }
        } else if choice["finish_reason"] == "stop" {
            let content: Value =
                serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
            assert!(content["no"].is_boolean(), "{content}");
            answers += 1;
        }
    }
    assert!(calls > 0 && answers > 0, "{calls} calls, {answers} answers");
}

#[tokio::test]
async fn functions_of_old_are_answered_as_of_old() {
    let server = start(qwen()).await;
    let functions = json!([{"name": "now"}]);
    server.will_say("<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>");
    let answer = server.post(CHAT, &chat(json!({"functions": functions}))).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "function_call");
    assert_eq!(choice["message"]["function_call"], json!({"name": "now", "arguments": "{\"a\": 1}"}));
    assert!(choice["message"].get("tool_calls").is_none());
    server.will_say("<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\": 1}}\n</tool_call>");
    let streamed = chat(json!({"functions": functions, "stream": true}));
    let events = server.stream(CHAT, &streamed).await.events().await;
    let calls = events.iter().map(|event| &event["choices"][0]["delta"]["function_call"]);
    let calls: Vec<&Value> = calls.filter(|call| !call.is_null()).collect();
    assert_eq!(calls.iter().filter(|call| call["name"] == "now").count(), 1);
    let arguments: String = calls.iter().filter_map(|call| call["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"a\": 1}");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "function_call");
}

/// Knows neither functions nor calls, and wants user and assistant to take turns.
const STRICT: &str = "{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";

#[tokio::test]
async fn a_template_that_knows_no_functions_is_helped() {
    let server = start(Setup { template: Some(STRICT.to_owned()), ..Setup::default() }).await;
    let messages = json!([
        user("What time is it?"),
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{\"a\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        user("And there?"),
    ]);
    server.will_say("{\"name\": \"now\", \"arguments\": {\"zone\": \"CET\"}}");
    let asked = json!({"messages": messages, "tools": tools(), "return_token_ids": true});
    let answer = server.post(CHAT, &chat(asked)).await.ok();
    let shown = prompt(&server, &answer);
    for part in [
        "\"description\":\"The weather.\"",
        "answer with nothing but this form",
        "What time is it?",
        "assistant\n{\"name\":\"now\",\"arguments\":{\"a\":1}}<|im_end|>",
        "noon",
        "And there?",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(function_calls(&choice["message"]), [("now".to_owned(), "{\"zone\": \"CET\"}".to_owned())]);
    // JSON that calls nothing is an answer.
    server.will_say("{\"name\": \"Ann\", \"age\": 3}");
    let answer = server.post(CHAT, &chat(json!({"tools": tools()}))).await.ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "{\"name\": \"Ann\", \"age\": 3}");
}

/// Takes ids of calls and arguments as Mistral's older templates do.
const IDS: &str = "{{ 'length 9' if false }}{%- for m in messages -%}
{%- for call in m.tool_calls or [] -%}
{%- if call.id | length != 9 -%}{{ raise_exception('ids have a length of 9') }}{%- endif -%}
{{ '[' ~ call.id ~ ' ' ~ call.function.name + call.function.arguments + ']' }}
{%- endfor -%}
{%- if m.role == 'tool' -%}{{ '(' ~ m.tool_call_id ~ ')' }}{%- endif -%}
{{ m.content or '' }}
{%- endfor -%}{{ tools | length if tools }}";

#[tokio::test]
async fn ids_and_arguments_take_the_form_that_a_template_wants() {
    let server = start(Setup { template: Some(IDS.to_owned()), ..Setup::default() }).await;
    let messages = json!([
        user("a"),
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_0123456789", "type": "function", "function": {"name": "now", "arguments": "{\"a\": 1}"}},
        ]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "noon"},
    ]);
    let asked = json!({"messages": messages, "max_tokens": 1, "return_token_ids": true});
    let shown = prompt(&server, &server.post(CHAT, &chat(asked)).await.ok());
    let id = &shown[2..11];
    assert_eq!(shown, format!("a[{id} now{{\"a\":1}}]({id})noon"));
    assert!(id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
}

#[tokio::test]
async fn a_session_keeps_the_tokens_of_calls_and_tells_them_again() {
    let directory = Directory::new();
    let server = start(Setup { template: Some(QWEN.to_owned()), ..with_store(&directory) }).await;
    for thinks in [false, true] {
        let id = server.session(Settings::default());
        let asked = |patch: Value| {
            let mut body = turn(
                &id,
                json!({"max_tokens": 200, "tools": tools(), "chat_template_kwargs": {"thinks": thinks}}),
            );
            body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
            body
        };
        let said = if thinks { format!("I look.\n</think>\n\n{SAID}") } else { SAID.to_owned() };
        server.will_say(&said);
        let streamed = asked(json!({"stream": true}));
        let events = server.stream(CHAT, &streamed).await.events().await;
        let calls = streamed_calls(&events);
        assert_eq!(function_calls(&json!({"tool_calls": calls})), expected_calls());

        let turns = server.get(&format!("/v1/sessions/{id}/turns")).await.ok();
        let stored = &turns["data"][0];
        let mut message = json!({"role": "assistant", "content": "Let me see. é"});
        if thinks {
            message["reasoning_content"] = json!("I look.");
        }
        message["tool_calls"] = json!(calls);
        assert_eq!((&stored["answer"], &stored["finish_reason"]), (&message, &json!("tool_calls")));

        // Read again, the answer has the same parts and ids, also from its middle on.
        let again = read(&server, &id, 0).await.events().await;
        assert_eq!(streamed_calls(&again), calls);
        assert_eq!(joined(&again, 0), "Let me see. é");
        assert_eq!(again.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
        let rest = read(&server, &id, 12).await.events().await;
        assert!(rest.len() < again.len() && again.ends_with(&rest), "{rest:?}");

        // The client writes the arguments in its own way, and leaves out what was thought.
        let mut sent = message.clone();
        sent.as_object_mut().unwrap().remove("reasoning_content");
        sent["tool_calls"][0]["function"]["arguments"] = json!("{\"city\": \"Zürich\", \"days\": 2}");
        let result =
            |at: usize, text: &str| json!({"role": "tool", "tool_call_id": calls[at]["id"], "content": text});
        let messages = json!([user("Say something."), sent, result(0, "rain"), result(1, "noon")]);
        let first = server.turns(&id)[0].clone();
        let patch = json!({"messages": messages, "max_tokens": 3, "return_token_ids": true});
        let second = server.post(CHAT, &asked(patch.clone())).await.ok();
        assert_eq!((&second["session"]["id"], &second["session"]["turn"]), (&json!(id), &json!(2)));
        assert_eq!(second["kv"]["reason"], Value::Null, "thinks: {thinks}");
        let tokens = ids(&second["prompt_token_ids"]);
        assert!(tokens.starts_with(&first), "the drawn tokens stay");
        let rest = server.tokenizer.decode(&tokens[first.len()..], ShowSpecial::Yes);
        let think = if thinks { "<think>\n" } else { "" };
        assert_eq!(
            rest,
            format!(
                "\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n{think}"
            )
        );
        // Other arguments are another conversation.
        let mut other = patch;
        other["messages"][1]["tool_calls"][0]["function"]["arguments"] = json!("{\"city\": \"Bern\"}");
        let forked = server.post(CHAT, &asked(other)).await.ok();
        assert_ne!(forked["session"]["id"], json!(id));
    }
    server.stop().await;
}
