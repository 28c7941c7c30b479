//! The functions that a request offers to the model, and which of them it may or must call.

use serde_json::{Map, Value, json};

use super::fields::{Fields, found, unexpected};
use crate::error::ApiError;

/// Most functions of a request.
const FUNCTIONS_MAX: usize = 1024;
const NAME_LEN_MAX: usize = 64;
const CHOICES: &str = "none, auto, required, a function or allowed_tools";

/// A function that is offered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// The JSON schema of its arguments; without one it takes none.
    pub(crate) parameters: Option<Map<String, Value>>,
    /// Its arguments must be as the schema says.
    pub(crate) is_strict: bool,
}

/// Whether the model may or must call a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum CallMode {
    #[default]
    None,
    Auto,
    Required,
}

/// How a client writes calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum CallStyle {
    /// `tools`, `tool_calls`.
    #[default]
    Tools,
    /// `functions`, `function_call`, as before there were tools; one call at most.
    Functions,
}

/// The functions of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tools {
    pub(crate) functions: Vec<Function>,
    pub(crate) mode: CallMode,
    /// Of the functions, the names of those that may be called; all without it.
    pub(crate) allowed: Option<Vec<String>>,
    pub(crate) is_parallel: bool,
    pub(crate) style: CallStyle,
}

impl Tools {
    /// The fields `tools`, `tool_choice`, `parallel_tool_calls`, and `functions` and `function_call` in their place.
    pub(crate) fn read(fields: &Fields<'_, '_>) -> Result<Self, ApiError> {
        let is_parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let items = fields.array("tools")?.unwrap_or_default();
        let legacy = fields.array("functions")?.unwrap_or_default();
        if !items.is_empty() && !legacy.is_empty() {
            let message = "expected only one of tools and functions, found both";
            return Err(ApiError::field("functions", message));
        }
        if !legacy.is_empty() || (items.is_empty() && fields.get("function_call").is_some()) {
            let function = |(at, item)| read_function(item, &format!("functions[{at}]"));
            let functions: Vec<Function> =
                legacy.iter().enumerate().map(function).collect::<Result<_, _>>()?;
            let (mode, allowed) = legacy_choice(fields, &functions)?;
            let tools = Self { functions, mode, allowed, is_parallel: false, style: CallStyle::Functions };
            return tools.checked("functions");
        }
        let mut functions = Vec::new();
        let mut others = Vec::new();
        for (at, item) in items.iter().enumerate() {
            match read_tool(item, &format!("tools[{at}]"))? {
                Ok(function) => functions.push(function),
                Err(error) => others.push(error),
            }
        }
        let (mode, allowed) = choice(fields, &functions, items.is_empty())?;
        if mode != CallMode::None
            && let Some(error) = others.into_iter().next()
        {
            return Err(error);
        }
        Self { functions, mode, allowed, is_parallel, style: CallStyle::Tools }.checked("tools")
    }

    fn checked(self, field: &str) -> Result<Self, ApiError> {
        if self.functions.len() > FUNCTIONS_MAX {
            let message = format!("expected at most {FUNCTIONS_MAX}, found {}", self.functions.len());
            return Err(ApiError::field(field, message));
        }
        let mut names: Vec<&str> = self.functions.iter().map(|function| function.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                let message = format!("expected names that differ, found {:?} twice", pair[0]);
                Err(ApiError::field(field, message))
            }
            None => Ok(self),
        }
    }

    /// The functions that the model may call.
    pub(crate) fn callable(&self) -> impl Iterator<Item = &Function> {
        let is_allowed =
            |function: &&Function| self.allowed.as_ref().is_none_or(|names| names.contains(&function.name));
        self.functions.iter().filter(|_| self.mode != CallMode::None).filter(is_allowed)
    }

    /// Their names.
    pub(crate) fn names(&self) -> Vec<String> {
        self.callable().map(|function| function.name.clone()).collect()
    }

    /// What chat templates are given: all functions, since another choice must not change the prompt, but none where
    /// none may be called.
    pub(crate) fn shown(&self) -> Vec<Value> {
        self.functions.iter().filter(|_| self.mode != CallMode::None).map(Function::to_json).collect()
    }
}

impl Function {
    /// The function as OpenAI's chat writes it, and as templates take it.
    pub(crate) fn to_json(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = json!(description);
        }
        function["parameters"] = Value::Object(self.schema());
        json!({"type": "function", "function": function})
    }

    /// The JSON schema of the arguments.
    pub(crate) fn schema(&self) -> Map<String, Value> {
        let none = || json!({"type": "object", "properties": {}}).as_object().cloned().unwrap_or_default();
        self.parameters.clone().filter(|schema| !schema.is_empty()).unwrap_or_else(none)
    }
}

/// A tool that is no function is an error only where it could be called.
fn read_tool(tool: &Value, path: &str) -> Result<Result<Function, ApiError>, ApiError> {
    let object = tool.as_object().ok_or_else(|| unexpected(path, "an object", tool))?;
    let tool = Fields::at(object, path);
    let kind = tool.required_string("type")?;
    if kind != "function" {
        let message = format!("tools of type `{kind}` are not supported here, only `function`");
        return Ok(Err(ApiError::unsupported(tool.name("type"), message)));
    }
    let function = tool.get("function").ok_or_else(|| tool.missing("function", "an object"))?;
    read_function(function, &tool.name("function")).map(Ok)
}

fn read_function(function: &Value, path: &str) -> Result<Function, ApiError> {
    let object = function.as_object().ok_or_else(|| unexpected(path, "an object", function))?;
    let fields = Fields::at(object, path);
    let name = fields.required_string("name")?;
    let is_letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !(1..=NAME_LEN_MAX).contains(&name.len()) || !name.chars().all(is_letter) {
        let expected = "1 to 64 letters, digits, underscores, dots and dashes";
        return Err(unexpected(fields.name("name"), expected, &Value::from(name)));
    }
    Ok(Function {
        name: name.to_owned(),
        description: fields.string("description")?.map(str::to_owned),
        parameters: fields.object("parameters")?.cloned(),
        is_strict: fields.bool("strict")?.unwrap_or(false),
    })
}

type Choice = (CallMode, Option<Vec<String>>);

fn choice(fields: &Fields<'_, '_>, functions: &[Function], is_empty: bool) -> Result<Choice, ApiError> {
    let Some(value) = fields.get("tool_choice") else {
        return Ok((if is_empty { CallMode::None } else { CallMode::Auto }, None));
    };
    match value {
        Value::String(choice) => match choice.as_str() {
            "none" => Ok((CallMode::None, None)),
            "auto" if is_empty => Ok((CallMode::None, None)),
            "auto" => Ok((CallMode::Auto, None)),
            "required" if is_empty => {
                Err(ApiError::field("tool_choice", "expected `tools` beside \"required\", found none"))
            }
            "required" => Ok((CallMode::Required, None)),
            _ => Err(unexpected("tool_choice", CHOICES, value)),
        },
        Value::Object(object) => {
            let fields = Fields::at(object, "tool_choice");
            match fields.required_string("type")? {
                "function" => Ok((CallMode::Required, Some(vec![named(object, "tool_choice", functions)?]))),
                "allowed_tools" => allowed_tools(object, functions),
                other => Err(unexpected("tool_choice.type", "function or allowed_tools", &json!(other))),
            }
        }
        other => Err(unexpected("tool_choice", CHOICES, other)),
    }
}

/// The name in `{"type": "function", "function": {"name"}}`, or without the inner object, as Responses writes it.
fn named(object: &Map<String, Value>, path: &str, functions: &[Function]) -> Result<String, ApiError> {
    let outer = Fields::at(object, path);
    let inner_path = outer.name("function");
    let inner = match outer.object("function")? {
        Some(inner) => Fields::at(inner, &inner_path),
        None if outer.get("name").is_some() => outer,
        None => return Err(outer.missing("function", "an object with the name of a function")),
    };
    let name = inner.required_string("name")?;
    known(name, &inner.name("name"), functions)
}

fn known(name: &str, path: &str, functions: &[Function]) -> Result<String, ApiError> {
    if functions.iter().any(|function| function.name == name) {
        return Ok(name.to_owned());
    }
    let names: Vec<&str> = functions.iter().map(|function| function.name.as_str()).take(8).collect();
    let expected = match names.as_slice() {
        [] => "the name of a function of the request, which has none".to_owned(),
        names => format!("the name of a function of the request, such as {}", names.join(", ")),
    };
    Err(ApiError::field(path, format!("expected {expected}, found {}", found(&json!(name)))))
}

fn allowed_tools(object: &Map<String, Value>, functions: &[Function]) -> Result<Choice, ApiError> {
    let outer = Fields::at(object, "tool_choice");
    let inner_path = outer.name("allowed_tools");
    let inner = match outer.object("allowed_tools")? {
        Some(inner) => Fields::at(inner, &inner_path),
        None => outer,
    };
    let mode = match inner.required_string("mode")? {
        "auto" => CallMode::Auto,
        "required" => CallMode::Required,
        other => return Err(unexpected(inner.name("mode"), "auto or required", &json!(other))),
    };
    let tools = inner.array("tools")?.filter(|tools| !tools.is_empty());
    let tools = tools.ok_or_else(|| inner.missing("tools", "an array of functions"))?;
    let name = |(at, tool): (usize, &Value)| {
        let path = format!("{}[{at}]", inner.name("tools"));
        let object = tool.as_object().ok_or_else(|| unexpected(&path, "an object", tool))?;
        named(object, &path, functions)
    };
    let names = tools.iter().enumerate().map(name).collect::<Result<_, _>>()?;
    Ok((mode, Some(names)))
}

fn legacy_choice(fields: &Fields<'_, '_>, functions: &[Function]) -> Result<Choice, ApiError> {
    let expected = "none, auto or the name of a function in an object";
    match fields.get("function_call") {
        None if functions.is_empty() => Ok((CallMode::None, None)),
        None => Ok((CallMode::Auto, None)),
        Some(Value::String(choice)) if choice == "none" => Ok((CallMode::None, None)),
        Some(Value::String(choice)) if choice == "auto" && functions.is_empty() => Ok((CallMode::None, None)),
        Some(Value::String(choice)) if choice == "auto" => Ok((CallMode::Auto, None)),
        Some(Value::Object(object)) => {
            let name = Fields::at(object, "function_call").required_string("name")?;
            let name = known(name, "function_call.name", functions)?;
            Ok((CallMode::Required, Some(vec![name])))
        }
        Some(other) => Err(unexpected("function_call", expected, other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Tools, ApiError> {
        Tools::read(&Fields::of(body.as_object().unwrap()))
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices_say_what_may_be_called() {
        let tools = || json!([tool("a"), tool("b.c-d_1"), {"type": "function", "function": {"name": "c"}}]);
        let named = json!({"type": "function", "function": {"name": "a"}});
        let allowed = |mode: &str| {
            let tools = [&named, &json!({"type": "function", "name": "c"})];
            json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}})
        };
        let cases = [
            (Value::Null, CallMode::Auto, vec!["a", "b.c-d_1", "c"]),
            (json!("auto"), CallMode::Auto, vec!["a", "b.c-d_1", "c"]),
            (json!("none"), CallMode::None, vec![]),
            (json!("required"), CallMode::Required, vec!["a", "b.c-d_1", "c"]),
            (named.clone(), CallMode::Required, vec!["a"]),
            (json!({"type": "function", "name": "c"}), CallMode::Required, vec!["c"]),
            (allowed("auto"), CallMode::Auto, vec!["a", "c"]),
            (allowed("required"), CallMode::Required, vec!["a", "c"]),
        ];
        for (choice, mode, names) in cases {
            let found = read(json!({"tools": tools(), "tool_choice": choice})).unwrap();
            assert_eq!((found.mode, found.names()), (mode, names.iter().map(|s| (*s).to_owned()).collect()));
            let shown = if mode == CallMode::None { 0 } else { 3 };
            assert_eq!(found.shown().len(), shown, "another choice leaves the prompt as it is");
        }
        let shown = &read(json!({"tools": tools()})).unwrap().shown()[2];
        let schema = json!({"type": "object", "properties": {}});
        assert_eq!(*shown, json!({"type": "function", "function": {"name": "c", "parameters": schema}}));
    }

    #[test]
    fn functions_of_old_are_tools() {
        let function = json!({"name": "f", "description": "d", "parameters": {"type": "object"}});
        let found = read(json!({"functions": [function]})).unwrap();
        assert_eq!(
            (found.mode, found.style, found.is_parallel),
            (CallMode::Auto, CallStyle::Functions, false)
        );
        let found = read(json!({"functions": [function], "function_call": {"name": "f"}})).unwrap();
        assert_eq!((found.mode, found.names()), (CallMode::Required, vec!["f".to_owned()]));
        let found = read(json!({"functions": [function], "function_call": "none"})).unwrap();
        assert_eq!(found.mode, CallMode::None);
    }

    #[test]
    fn what_cannot_be_called_is_refused_by_its_place() {
        let one = || json!([tool("a")]);
        let cases = [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [3]}), "tools[0]"),
            (json!({"tools": [{}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
            (json!({"tools": [tool("")]}), "tools[0].function.name"),
            (json!({"tools": [tool("a b")]}), "tools[0].function.name"),
            (json!({"tools": [tool(&"x".repeat(65))]}), "tools[0].function.name"),
            (json!({"tools": [tool("a"), tool("a")]}), "tools"),
            (json!({"tools": [{"type": "custom", "custom": {"name": "x"}}]}), "tools[0].type"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}),
                "tools[0].function.strict",
            ),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": one(), "tool_choice": "some"}), "tool_choice"),
            (json!({"tools": one(), "tool_choice": 3}), "tool_choice"),
            (json!({"tools": one(), "tool_choice": {"type": "tool"}}), "tool_choice.type"),
            (json!({"tools": one(), "tool_choice": {"type": "function"}}), "tool_choice.function"),
            (
                json!({"tools": one(), "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice.function.name",
            ),
            (
                json!({"tools": one(), "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}),
                "tool_choice.allowed_tools.tools",
            ),
            (
                json!({"tools": one(), "tool_choice": {"type": "allowed_tools", "mode": "never", "tools": []}}),
                "tool_choice.mode",
            ),
            (json!({"tools": one(), "parallel_tool_calls": 1}), "parallel_tool_calls"),
            (json!({"functions": [{}]}), "functions[0].name"),
            (json!({"functions": [{"name": "f"}], "tools": one()}), "functions"),
            (json!({"functions": [{"name": "f"}], "function_call": {"name": "g"}}), "function_call.name"),
            (json!({"function_call": {"name": "g"}}), "function_call.name"),
            (json!({"function_call": "maybe"}), "function_call"),
        ];
        for (body, param) in cases {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(
                (error.status.as_u16(), &error.body()["error"]["param"]),
                (400, &json!(param)),
                "{body}"
            );
        }
    }
}
