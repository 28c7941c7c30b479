//! Tools of type `mcp` in a response: which servers it reaches, what their tools are to the model, and their calls.

use serde_json::{Map, Value, json};

use super::items;
use super::past::Past;
use super::request::ResponseRequest;
use crate::error::ApiError;
use crate::mcp::{Connection, Credentials, McpServers, Tool};
use crate::openai::fields::{Fields, unexpected};

/// Longest name of a function.
const NAME_LEN_MAX: usize = 64;

/// A list of names, or every tool that only reads.
#[derive(Clone, Debug, Default, PartialEq)]
struct Filter {
    names: Option<Vec<String>>,
    reads_only: bool,
}

/// Which calls of a server's tools wait for the client's word.
#[derive(Clone, Debug, PartialEq)]
enum Approval {
    /// As the operator has set it.
    Default,
    All(bool),
    /// Those of the first are made at once, those of the second are not, nor are others.
    Some {
        never: Filter,
    },
}

/// A tool of type `mcp`, as a request has it.
struct Wanted {
    label: String,
    allowed: Filter,
    approval: Approval,
    connection: Connection,
}

/// A tool that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Offered {
    /// What the model calls it.
    pub(crate) function: String,
    pub(crate) label: String,
    pub(crate) name: String,
    pub(crate) needs_approval: bool,
}

impl Offered {
    fn to_json(&self) -> Value {
        json!({"function": self.function, "server_label": self.label, "name": self.name,
               "needs_approval": self.needs_approval})
    }

    /// What [`Offer::to_json`] wrote.
    pub(crate) fn read_all(value: &Value) -> Vec<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let one = |value: &Value| {
            Some(Self {
                function: text(&value["function"])?,
                label: text(&value["server_label"])?,
                name: text(&value["name"])?,
                needs_approval: value["needs_approval"].as_bool()?,
            })
        };
        value.as_array().into_iter().flatten().filter_map(one).collect()
    }
}

/// What the servers of one response offer.
pub(crate) struct Offer {
    servers: Vec<Wanted>,
    tools: Vec<Offered>,
    /// Items of the response that stand before its first answer: lists, and calls that were approved.
    pub(crate) opened: Vec<Value>,
    /// How many of them are calls.
    pub(crate) calls: usize,
}

impl Offer {
    /// Asks the servers of a request what they offer, and lets the model see it. `None` where the request has none.
    ///
    /// # Errors
    /// 400, where a server is not one of the operator's, or an approval is of no request for one.
    pub(crate) async fn of(
        known: &McpServers,
        asked: &mut ResponseRequest,
        past: Option<&Past>,
    ) -> Result<Option<Self>, ApiError> {
        let wanted =
            |(at, tool): &(usize, Map<String, Value>)| Wanted::read(known, tool, &format!("tools[{at}]"));
        let servers = asked.mcp.iter().map(wanted).collect::<Result<Vec<_>, _>>()?;
        for (at, server) in servers.iter().enumerate() {
            if servers[..at].iter().any(|other| other.label == server.label) {
                let message = format!("expected labels that differ, found {:?} twice", server.label);
                return Err(ApiError::field(format!("tools[{}].server_label", asked.mcp[at].0), message));
            }
        }
        if servers.is_empty() {
            return Ok(None);
        }
        let shown = past.map_or_else(Vec::new, |past| past.items(past.shown()));
        let before = [shown.as_slice(), asked.input.as_slice()].concat();
        let mut offer = Self { servers, tools: Vec::new(), opened: Vec::new(), calls: 0 };
        let mut functions = asked.functions();
        for at in 0..offer.servers.len() {
            let server = &offer.servers[at];
            let listed = known.list(&server.connection).await;
            let tools: Vec<&Tool> = listed.iter().flat_map(|list| list.iter()).collect();
            let tools: Vec<&Tool> = tools.into_iter().filter(|tool| server.allowed.takes(tool)).collect();
            let item = list_item(&server.label, &tools, listed.as_ref().err());
            for tool in tools {
                let function = function_name(&functions, &server.label, &tool.name);
                functions.push(function.clone());
                asked.add_function(function_object(&function, tool));
                let needs_approval = server.needs_approval(tool);
                let (label, name) = (server.label.clone(), tool.name.clone());
                offer.tools.push(Offered { function, label, name, needs_approval });
            }
            // A list that stands in the conversation as it is need not be told again.
            let is_same = |old: &Value| {
                old["type"] == "mcp_list_tools"
                    && old["server_label"] == item["server_label"]
                    && old["tools"] == item["tools"]
                    && old["error"].is_null()
            };
            if !item["error"].is_null() || !before.iter().any(is_same) {
                offer.opened.push(item);
            }
        }
        asked.set_mcp(&offer.tools);
        Ok(Some(offer))
    }

    /// Makes the calls that the client has approved, one after the other.
    ///
    /// # Errors
    /// 400, where an approval is of no request for one.
    pub(crate) async fn call_approved(
        &mut self,
        asked: &ResponseRequest,
        past: Option<&Past>,
    ) -> Result<(), ApiError> {
        let shown = past.map_or_else(Vec::new, |past| past.items(past.shown()));
        let before = [shown.as_slice(), asked.input.as_slice()].concat();
        let approved = approvals(asked, &before)?;
        for request in &approved {
            let (label, name) = (&request["server_label"], &request["name"]);
            if !self.tools.iter().any(|tool| *label == tool.label && *name == tool.name) {
                return Err(not_offered(request));
            }
        }
        for request in approved {
            let is_spent = asked.max_tool_calls.is_some_and(|most| self.calls >= most);
            self.calls += usize::from(!is_spent);
            let result = match is_spent {
                true => Err(super::rounds::SPENT.to_owned()),
                false => self.call(&request).await,
            };
            let mut item = json!({
                "id": crate::random::id("mcp_"), "type": "mcp_call", "status": "in_progress",
                "approval_request_id": request["id"], "server_label": request["server_label"],
                "name": request["name"], "arguments": request["arguments"], "output": null, "error": null,
            });
            finish(&mut item, result);
            self.opened.push(item);
        }
        Ok(())
    }

    /// Makes the call that an item is.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub(crate) async fn call(&self, item: &Value) -> Result<String, String> {
        let server = self.servers.iter().find(|server| item["server_label"] == server.label);
        let (server, name) = server.zip(item["name"].as_str()).ok_or("there is no such tool")?;
        let arguments = item["arguments"].as_str().filter(|text| !text.trim().is_empty()).unwrap_or("{}");
        let Ok(Value::Object(arguments)) = serde_json::from_str(arguments) else {
            return Err("the arguments are not a JSON object".to_owned());
        };
        server.connection.call(name, arguments).await
    }

    /// For the record of the response.
    pub(crate) fn to_json(&self) -> Value {
        self.tools.iter().map(Offered::to_json).collect()
    }
}

/// Writes the result of a call into its item.
pub(crate) fn finish(item: &mut Value, result: Result<String, String>) {
    match result {
        Ok(output) => {
            item["output"] = json!(output);
            item["status"] = json!("completed");
        }
        Err(error) => {
            item["error"] = json!(error);
            item["status"] = json!("failed");
        }
    }
}

impl Wanted {
    fn read(known: &McpServers, tool: &Map<String, Value>, path: &str) -> Result<Self, ApiError> {
        let fields = Fields::at(tool, path);
        let label = fields.required_string("server_label")?;
        if fields.get("connector_id").is_some() {
            let message = "connectors are not supported; name a configured MCP server";
            return Err(ApiError::unsupported(fields.name("connector_id"), message));
        }
        let server = known.find((label, fields.string("server_url")?), path)?;
        let mut credentials = Credentials::new(fields.string("authorization")?);
        for (name, value) in fields.object("headers")?.into_iter().flatten() {
            let field = fields.name(&format!("headers.{name}"));
            let text = value.as_str().ok_or_else(|| unexpected(&field, "a string", value))?;
            credentials.add(name, text).map_err(|error| ApiError::field(field, error.to_string()))?;
        }
        let allowed = match fields.get("allowed_tools") {
            None => Filter::default(),
            Some(Value::Array(_)) => Filter { names: names(&fields, "allowed_tools")?, reads_only: false },
            Some(Value::Object(filter)) => Filter::read(filter, &fields.name("allowed_tools"))?,
            Some(other) => {
                let expected = "an array of names, or an object with tool_names";
                return Err(unexpected(fields.name("allowed_tools"), expected, other));
            }
        };
        let approval = Approval::read(&fields)?;
        let connection = Connection::new(server, credentials);
        Ok(Self { label: label.to_owned(), allowed, approval, connection })
    }

    fn needs_approval(&self, tool: &Tool) -> bool {
        match &self.approval {
            Approval::Default => self.connection.server.needs_approval,
            Approval::All(needs) => *needs,
            Approval::Some { never } => !never.takes(tool),
        }
    }
}

impl Filter {
    fn read(filter: &Map<String, Value>, path: &str) -> Result<Self, ApiError> {
        let fields = Fields::at(filter, path);
        let reads_only = fields.bool("read_only")?.unwrap_or(false);
        Ok(Self { names: names(&fields, "tool_names")?, reads_only })
    }

    fn takes(&self, tool: &Tool) -> bool {
        self.names.as_ref().is_none_or(|names| names.contains(&tool.name))
            && (!self.reads_only || tool.annotations["readOnlyHint"] == true)
    }
}

impl Approval {
    fn read(fields: &Fields<'_, '_>) -> Result<Self, ApiError> {
        let field = fields.name("require_approval");
        let expected = "always, never, or an object with `always` or `never`";
        match fields.get("require_approval") {
            None => Ok(Self::Default),
            Some(Value::String(word)) if word == "always" => Ok(Self::All(true)),
            Some(Value::String(word)) if word == "never" => Ok(Self::All(false)),
            Some(Value::Object(object)) => {
                let own = Fields::at(object, &field);
                let filter = |name: &str| {
                    own.object(name)?.map(|filter| Filter::read(filter, &own.name(name))).transpose()
                };
                filter("always")?;
                // What is in neither needs approval, as does what is only in `always`.
                Ok(filter("never")?.map_or(Self::All(true), |never| Self::Some { never }))
            }
            Some(other) => Err(unexpected(field.as_str(), expected, other)),
        }
    }
}

fn names(fields: &Fields<'_, '_>, field: &str) -> Result<Option<Vec<String>>, ApiError> {
    let Some(items) = fields.array(field)? else { return Ok(None) };
    let name = |item: &Value| {
        let name = item.as_str().map(str::to_owned);
        name.ok_or_else(|| unexpected(fields.name(field), "an array of names", item))
    };
    items.iter().map(name).collect::<Result<_, _>>().map(Some)
}

/// The item that tells what a server offers.
fn list_item(label: &str, tools: &[&Tool], error: Option<&String>) -> Value {
    let tool = |tool: &&Tool| {
        json!({"name": tool.name, "description": tool.description, "input_schema": tool.input_schema,
               "annotations": tool.annotations})
    };
    json!({
        "id": crate::random::id("mcpl_"),
        "type": "mcp_list_tools",
        "server_label": label,
        "tools": tools.iter().map(tool).collect::<Vec<_>>(),
        "error": error,
    })
}

/// A name that no other function has, of the characters that names of functions are made of.
fn function_name(taken: &[String], label: &str, name: &str) -> String {
    let written = |text: &str| -> String {
        let written = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' });
        written.take(NAME_LEN_MAX).collect()
    };
    let is_free = |name: &String| !name.is_empty() && !taken.contains(name);
    let numbered = |number: usize| {
        let end = format!("_{number}");
        let name = written(&format!("{label}_{name}"));
        name[..name.len().min(NAME_LEN_MAX - end.len())].to_owned() + &end
    };
    let plain = [written(name), written(&format!("{label}_{name}"))].into_iter().find(is_free);
    plain.unwrap_or_else(|| (2..).map(numbered).find(is_free).expect("names do not run out"))
}

fn function_object(function: &str, tool: &Tool) -> Value {
    let mut object = json!({"name": function, "parameters": tool.input_schema});
    if let Some(description) = &tool.description {
        object["description"] = json!(description);
    }
    json!({"type": "function", "function": object})
}

/// Where a request has no MCP servers, it can approve no call.
///
/// # Errors
/// 400, where it does.
pub(crate) fn check_no_approvals(asked: &ResponseRequest, past: Option<&Past>) -> Result<(), ApiError> {
    let shown = past.map_or_else(Vec::new, |past| past.items(past.shown()));
    let before = [shown.as_slice(), asked.input.as_slice()].concat();
    match approvals(asked, &before)?.first() {
        Some(request) => Err(not_offered(request)),
        None => Ok(()),
    }
}

fn not_offered(request: &Value) -> ApiError {
    let (label, name) = (&request["server_label"], &request["name"]);
    let message =
        format!("expected the tool {name} of the MCP server {label} in `tools`, to make the approved call");
    ApiError::field("input", message)
}

/// The requests for approval that the input grants.
fn approvals(asked: &ResponseRequest, before: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut approved: Vec<Value> = Vec::new();
    let answers = asked.input.iter().filter(|item| item["type"] == items::APPROVAL_RESPONSE);
    for answer in answers {
        let id = &answer["approval_request_id"];
        let is_done = |item: &&Value| item["type"] == "mcp_call" && item["approval_request_id"] == *id;
        if asked.input.iter().any(|item| is_done(&item)) {
            // A conversation that the client keeps: the call was made then.
            continue;
        }
        let request = before.iter().find(|item| item["type"] == items::APPROVAL_REQUEST && item["id"] == *id);
        let Some(request) = request else {
            let message = format!("expected the id of an mcp_approval_request before, found {id}");
            return Err(ApiError::field("input", message));
        };
        if before.iter().any(|item| is_done(&item)) {
            let message = format!("expected a request that was not answered before, found {id}");
            return Err(ApiError::field("input", message));
        }
        if answer["approve"] == true && !approved.contains(request) {
            approved.push(request.clone());
        }
    }
    Ok(approved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_functions_differ_and_are_names() {
        let mut taken = vec!["search".to_owned()];
        for (name, expected) in
            [("search", "docs_search"), ("search", "docs_search_2"), ("a.b/c", "a_b_c"), ("find", "find")]
        {
            let found = function_name(&taken, "docs", name);
            assert_eq!(found, expected);
            taken.push(found);
        }
        assert_eq!(function_name(&[], "d", &"é".repeat(100)).len(), NAME_LEN_MAX);
        let long = "x".repeat(90);
        let taken = [function_name(&[], "d", &long), function_name(&["x".repeat(64)], "d", &long)];
        assert_eq!(function_name(&taken, "d", &long).len(), NAME_LEN_MAX);
    }

    #[test]
    fn approval_is_read_in_all_its_forms() {
        let read = |value: Value| {
            Approval::read(&Fields::of(json!({"require_approval": value}).as_object().unwrap()))
        };
        assert_eq!(read(Value::Null).unwrap(), Approval::Default);
        assert_eq!(read(json!("never")).unwrap(), Approval::All(false));
        assert_eq!(read(json!({"always": {"tool_names": ["a"]}})).unwrap(), Approval::All(true));
        let never = Filter { names: Some(vec!["a".to_owned()]), reads_only: false };
        assert_eq!(read(json!({"never": {"tool_names": ["a"]}})).unwrap(), Approval::Some { never });
        for (value, param) in [
            (json!("maybe"), "require_approval"),
            (json!(3), "require_approval"),
            (json!({"never": {"tool_names": [3]}}), "require_approval.never.tool_names"),
        ] {
            assert_eq!(read(value).unwrap_err().body()["error"]["param"], param);
        }
    }
}
