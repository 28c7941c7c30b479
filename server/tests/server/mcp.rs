//! Responses whose model calls tools of MCP servers: lists, calls, approvals, limits, what is left of them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use mainstay_models::tokenizer::ShowSpecial;
use mainstay_server::McpServer;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::responses::{ended, events, read};
use crate::sessions::with_store;
use crate::testbed::{Directory, MODEL, Server, Setup, start};
use crate::tools::QWEN;

const RESPONSES: &str = "/v1/responses";
const ADD: &str = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\":1,\"b\":2}}\n</tool_call>";
const SLOW: &str = "<tool_call>\n{\"name\": \"slow\", \"arguments\": {}}\n</tool_call>";

/// The calls that a fake MCP server has answered.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<Value>>>);

impl Calls {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// A small MCP server: `add` adds, `slow` does not answer, `broken` says so.
async fn mcp_server() -> (SocketAddr, Calls) {
    let calls = Calls::default();
    let app = Router::new()
        .route("/mcp", post(answer))
        .route("/moved", post(async || (StatusCode::TEMPORARY_REDIRECT, [("location", "/mcp")])))
        .with_state(calls.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, calls)
}

async fn answer(State(calls): State<Calls>, Json(message): Json<Value>) -> Response {
    let result = match message["method"].as_str().unwrap() {
        "initialize" => json!({"protocolVersion": message["params"]["protocolVersion"],
                               "capabilities": {"tools": {}}, "serverInfo": {"name": "fake", "version": "1"}}),
        "tools/list" => {
            let tool = |name: &str| {
                json!({"name": name, "description": format!("It is {name}."),
                                           "inputSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}})
            };
            json!({"tools": (["add", "slow", "broken"].map(tool))})
        }
        "tools/call" => {
            calls.0.lock().unwrap().push(message["params"].clone());
            let arguments = &message["params"]["arguments"];
            match message["params"]["name"].as_str().unwrap() {
                "add" => {
                    let sum = arguments["a"].as_i64().unwrap() + arguments["b"].as_i64().unwrap();
                    json!({"content": [{"type": "text", "text": format!("the sum is {sum}")}]})
                }
                "broken" => json!({"content": [{"type": "text", "text": "it is broken"}], "isError": true}),
                _ => {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    json!({"content": []})
                }
            }
        }
        _ => return StatusCode::ACCEPTED.into_response(),
    };
    Json(json!({"jsonrpc": "2.0", "id": message["id"], "result": result})).into_response()
}

fn known(name: &str, address: SocketAddr) -> McpServer {
    let server = McpServer::new(name, &format!("http://{address}/mcp")).unwrap();
    server.allows_private(true).needs_approval(false)
}

async fn serving(directory: &Directory, servers: Vec<McpServer>) -> Server {
    let mut setup = Setup { template: Some(QWEN.to_owned()), ..with_store(directory) };
    setup.options.mcp_servers = servers;
    start(setup).await
}

fn body(patch: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": "Add one and two.", "temperature": 0, "max_output_tokens": 200,
                          "tools": [{"type": "mcp", "server_label": "docs"}]});
    body.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
    body
}

async fn create(server: &Server, patch: Value) -> Value {
    server.post(RESPONSES, &body(patch)).await.ok()
}

fn kinds(response: &Value) -> Vec<&str> {
    response["output"].as_array().unwrap().iter().map(|item| item["type"].as_str().unwrap()).collect()
}

/// The text of a response's session, turn by turn.
fn turns(server: &Server, response: &Value) -> Vec<String> {
    let turns = server.turns(response["session"]["id"].as_str().unwrap());
    turns.iter().map(|tokens| server.tokenizer.decode(tokens, ShowSpecial::Yes)).collect()
}

#[tokio::test]
async fn tools_are_listed_and_called_and_the_model_goes_on() {
    let (address, calls) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address)]).await;
    server.will_say(&format!("I add.\n{ADD}"));
    server.will_say_then("It is three.");
    let live = events(server.stream(RESPONSES, &body(json!({"stream": true}))).await).await;
    assert!(server.has_said_all());
    assert_eq!(calls.count(), 1);
    let call = calls.0.lock().unwrap()[0].clone();
    assert_eq!((&call["name"], &call["arguments"]), (&json!("add"), &json!({"a": 1, "b": 2})));
    let response = live.last().unwrap()["response"].clone();
    assert_eq!(kinds(&response), ["mcp_list_tools", "message", "mcp_call", "message"]);
    let output = &response["output"];
    assert_eq!(output[0]["tools"][0]["name"], "add");
    assert_eq!(output[2]["output"], "the sum is 3");
    assert_eq!((&output[2]["name"], &output[2]["server_label"]), (&json!("add"), &json!("docs")));
    assert_eq!(output[2]["arguments"], "{\"a\":1,\"b\":2}");
    assert_eq!((&output[2]["status"], &output[2]["error"]), (&json!("completed"), &Value::Null));
    assert_eq!(output[3]["content"][0]["text"], "It is three.");
    // Each item begins, goes on and ends at its own place.
    let of_call: Vec<&str> = live
        .iter()
        .filter(|event| event["output_index"] == 2)
        .map(|event| event["type"].as_str().unwrap())
        .filter(|kind| !kind.ends_with(".delta"))
        .collect();
    assert_eq!(
        of_call,
        [
            "response.output_item.added",
            "response.mcp_call.in_progress",
            "response.mcp_call_arguments.done",
            "response.mcp_call.completed",
            "response.output_item.done",
        ]
    );
    let of_list: Vec<&str> = live
        .iter()
        .filter(|event| event["output_index"] == 0)
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    let list =
        ["output_item.added", "mcp_list_tools.in_progress", "mcp_list_tools.completed", "output_item.done"];
    assert_eq!(of_list, list.map(|kind| format!("response.{kind}")));
    // The second answer is a turn of its own, after the first one's tokens, and usage is of both.
    let turns = turns(&server, &response);
    assert_eq!(turns.len(), 2);
    assert!(turns[1].contains("the sum is 3") && !turns[0].contains("the sum"), "{turns:?}");
    assert!(!turns[1].contains("Add one"), "{turns:?}");
    let cached = response["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached > 0, "{response}");
    // What is read again is what was heard.
    let id = response["id"].as_str().unwrap();
    assert_eq!(server.get(&format!("{RESPONSES}/{id}")).await.ok()["output"], response["output"]);
    let again = events(read(&server, &format!("{RESPONSES}/{id}?stream=true")).await).await;
    assert_eq!(again.len(), live.len());
    assert_eq!(again[2..again.len() - 1], live[2..live.len() - 1]);
    // A response after it stands on all its turns, and does not tell again what is offered.
    server.will_say("Bye.");
    let next = create(&server, json!({"previous_response_id": id, "input": "Thanks."})).await;
    assert_eq!(kinds(&next), ["message"]);
    let all: Vec<String> = self::turns(&server, &next);
    assert_eq!((all.len(), &all[..2]), (3, &turns[..]), "{all:?}");
    server.stop().await;
}

#[tokio::test]
async fn calls_wait_for_approval() {
    let (address, calls) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address)]).await;
    let tools = json!([{"type": "mcp", "server_label": "docs", "require_approval": "always"}]);
    for approve in [true, false] {
        server.will_say(ADD);
        let asking = create(&server, json!({"tools": tools})).await;
        assert_eq!(kinds(&asking), ["mcp_list_tools", "mcp_approval_request"]);
        assert_eq!(asking["status"], "completed");
        assert_eq!(asking["output"][1]["arguments"], "{\"a\":1,\"b\":2}");
        let before = calls.count();
        server.will_say("Well.");
        let answer = json!([{"type": "mcp_approval_response", "approve": approve, "reason": "no sums today",
                             "approval_request_id": asking["output"][1]["id"]}]);
        let patch = json!({"tools": tools, "input": answer, "previous_response_id": asking["id"]});
        let answered = create(&server, patch.clone()).await;
        assert_eq!(calls.count() - before, usize::from(approve));
        let turns = turns(&server, &answered);
        if approve {
            assert_eq!(kinds(&answered), ["mcp_call", "message"]);
            assert_eq!(answered["output"][0]["output"], "the sum is 3");
            assert_eq!(answered["output"][0]["approval_request_id"], asking["output"][1]["id"]);
            assert!(turns[1].contains("the sum is 3"), "{turns:?}");
        } else {
            assert_eq!(kinds(&answered), ["message"]);
            assert!(turns[1].contains("no sums today"), "{turns:?}");
        }
        let twice = json!({"tools": tools, "input": answer, "previous_response_id": answered["id"]});
        if approve {
            server.post(RESPONSES, &body(twice)).await.error(400);
            assert_eq!(calls.count() - before, 1);
        }
    }
    let unknown =
        json!([{"type": "mcp_approval_response", "approve": true, "approval_request_id": "mcpr_x"}]);
    let error = server.post(RESPONSES, &body(json!({"input": unknown}))).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("mcpr_x"), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn only_the_operators_servers_and_the_allowed_tools_are_reached() {
    let (address, calls) = mcp_server().await;
    let moved = McpServer::new("moved", &format!("http://{address}/moved")).unwrap().allows_private(true);
    let private = McpServer::new("private", &format!("http://{address}/mcp?private")).unwrap();
    let named = format!("http://localhost:{}/mcp", address.port());
    let named = McpServer::new("named", &named).unwrap();
    let limited = known("docs", address).allowed_tools(Some(vec!["add".to_owned(), "slow".to_owned()]));
    let directory = Directory::new();
    let server = serving(&directory, vec![limited, moved, private, named]).await;
    for (tool, param) in [
        (json!({"type": "mcp", "server_label": "other"}), "tools[0].server_label"),
        (
            json!({"type": "mcp", "server_label": "docs", "server_url": "http://10.0.0.1/"}),
            "tools[0].server_url",
        ),
        (json!({"type": "mcp", "server_label": "docs", "headers": {"host": "x"}}), "tools[0].headers.host"),
        (json!({"type": "mcp", "server_label": "docs", "allowed_tools": 3}), "tools[0].allowed_tools"),
    ] {
        let error = server.post(RESPONSES, &body(json!({"tools": [tool]}))).await.error(400);
        assert_eq!(error["param"], param);
        if param.ends_with("label") {
            assert!(error["message"].as_str().unwrap().contains("docs, moved, private"), "{error}");
        }
    }
    let list = async |tool: Value| {
        server.will_say("Hi.");
        let response = create(&server, json!({"tools": [tool]})).await;
        assert_eq!(response["status"], "completed");
        response["output"][0].clone()
    };
    let names = |item: &Value| {
        let tools = item["tools"].as_array().unwrap().iter();
        tools.map(|tool| tool["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let url = format!("http://{address}/mcp");
    let item = list(json!({"type": "mcp", "server_label": "mine", "server_url": url})).await;
    assert_eq!(
        (names(&item), &item["server_label"]),
        (vec!["add".to_owned(), "slow".to_owned()], &json!("mine"))
    );
    let allowed = json!(["slow", "broken"]);
    assert_eq!(
        names(&list(json!({"type": "mcp", "server_label": "docs", "allowed_tools": allowed})).await),
        ["slow"]
    );
    for label in ["moved", "private", "named"] {
        let item = list(json!({"type": "mcp", "server_label": label})).await;
        assert_eq!((names(&item).len(), item["error"].is_string()), (0, true), "{item}");
    }
    assert_eq!(calls.count(), 0);
    server.stop().await;
}

#[tokio::test]
async fn what_fails_is_told_and_the_model_goes_on() {
    let (address, _) = mcp_server().await;
    let directory = Directory::new();
    let known = known("docs", address).timeout(Duration::from_millis(300));
    let server = serving(&directory, vec![known]).await;
    let broken = "<tool_call>\n{\"name\": \"broken\", \"arguments\": {}}\n</tool_call>";
    server.will_say(&format!("{SLOW}\n{broken}"));
    server.will_say_then("Sorry.");
    let response = create(&server, json!({})).await;
    assert_eq!(kinds(&response), ["mcp_list_tools", "mcp_call", "mcp_call", "message"]);
    let error = response["output"][1]["error"].as_str().unwrap();
    assert!(error.contains("did not answer within 0.3 s"), "{error}");
    assert_eq!(response["output"][1]["status"], "failed");
    assert_eq!(response["output"][2]["error"], "it is broken");
    let turns = turns(&server, &response);
    assert!(turns[1].contains("did not answer") && turns[1].contains("it is broken"), "{turns:?}");
    server.stop().await;
}

#[tokio::test]
async fn calls_and_rounds_have_limits() {
    let (address, calls) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address)]).await;
    server.will_say(&format!("{ADD}\n{ADD}"));
    server.will_say_then("Enough.");
    let response = create(&server, json!({"max_tool_calls": 1})).await;
    assert_eq!(calls.count(), 1);
    assert_eq!(response["output"][1]["output"], "the sum is 3");
    assert!(response["output"][2]["error"].as_str().unwrap().contains("max_tool_calls"), "{response}");
    assert_eq!(response["output"][3]["content"][0]["text"], "Enough.");
    // The last answer has no tools: what looks like a call is text.
    for _ in 0..17 {
        server.will_say_then(ADD);
    }
    let response = create(&server, json!({"max_output_tokens": null})).await;
    assert_eq!(calls.count(), 1 + 16);
    let kinds = kinds(&response);
    assert_eq!(kinds.iter().filter(|kind| **kind == "mcp_call").count(), 16);
    assert_eq!(kinds.last(), Some(&"message"));
    assert_eq!(response["status"], "completed");
    assert!(server.has_said_all());
    let id = response["id"].as_str().unwrap();
    assert_eq!(server.get(&format!("{RESPONSES}/{id}")).await.ok()["output"], response["output"]);
    let again = events(read(&server, &format!("{RESPONSES}/{id}?stream=true")).await).await;
    assert_eq!(again.last().unwrap()["response"]["output"], response["output"]);
    server.stop().await;
}

#[tokio::test]
async fn functions_of_the_client_end_the_response() {
    let (address, calls) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address), known("more", address)]).await;
    let tools = json!([{"type": "mcp", "server_label": "docs"}, {"type": "mcp", "server_label": "more"},
                       {"type": "function", "name": "slow", "parameters": {"type": "object", "properties": {}}}]);
    let more = ADD.replace("\"add\"", "\"more_add\"");
    server.will_say(&format!("{more}\n{SLOW}"));
    let response = create(&server, json!({"tools": tools})).await;
    assert_eq!(kinds(&response), ["mcp_list_tools", "mcp_list_tools", "mcp_call", "function_call"]);
    assert_eq!(calls.count(), 1);
    assert_eq!(
        (&response["output"][2]["name"], &response["output"][2]["server_label"]),
        (&json!("add"), &json!("more"))
    );
    let call = &response["output"][3];
    server.will_say("Done.");
    let output = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "slowly"}]);
    let patch = json!({"tools": tools, "input": output, "previous_response_id": response["id"]});
    let next = create(&server, patch).await;
    let turns = turns(&server, &next);
    assert!(turns[1].contains("the sum is 3") && turns[1].contains("slowly"), "{turns:?}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_stored_goes_on_too() {
    let (address, _) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address)]).await;
    server.will_say(ADD);
    server.will_say_then("It is three.");
    let response = create(&server, json!({"store": false})).await;
    assert_eq!(kinds(&response), ["mcp_list_tools", "mcp_call", "message"]);
    assert_eq!(response["output"][2]["content"][0]["text"], "It is three.");
    assert_eq!(server.get("/v1/sessions").await.ok()["data"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn a_call_is_cancelled_and_a_crash_during_one_is_told() {
    let (address, calls) = mcp_server().await;
    let directory = Directory::new();
    let server = serving(&directory, vec![known("docs", address)]).await;
    server.will_say(SLOW);
    let begun = create(&server, json!({"background": true})).await;
    let path = format!("{RESPONSES}/{}", begun["id"].as_str().unwrap());
    let reader = read(&server, &format!("{path}?stream=true")).await;
    while calls.count() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(server.get(&path).await.ok()["status"], "in_progress");
    let early = json!({"previous_response_id": begun["id"]});
    server.post(RESPONSES, &body(early)).await.error(409);
    let crashed = directory.copied();
    let cancelled = server.post(&format!("{path}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(kinds(&cancelled), ["mcp_list_tools", "mcp_call"]);
    assert_eq!(cancelled["output"][1]["status"], "incomplete");
    // Whoever read along has heard the same.
    let heard = events(reader).await;
    assert_eq!(heard.last().unwrap()["type"], "response.cancelled");
    assert_eq!(heard.last().unwrap()["response"]["output"], cancelled["output"]);
    server.stop().await;
    let server = serving(&crashed, vec![known("docs", address)]).await;
    let failed = ended(&server, begun["id"].as_str().unwrap()).await;
    assert_eq!(failed["status"], "failed");
    assert_eq!(kinds(&failed), ["mcp_list_tools", "mcp_call"]);
    server.stop().await;
}
