//! Chat templates: the text that a conversation becomes, equal to transformers' `apply_chat_template`.

mod functions;
mod generation_tag;
mod methods;
mod python;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde_json::{Map, Value};

use crate::LoadError;
use crate::config::Config;
use crate::model::special_tokens;

/// What one rendering may cost, in instructions or units of 64 bytes: about 0.2 s and 256 MB at most, yet thousands
/// of messages through elaborate templates. It keeps a careless template from hanging a request; it is no sandbox
/// (nesting and joining are not metered), so a template is trusted as far as the checkpoint that it came with.
const FUEL: u64 = 4_000_000;

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A compiled chat template with the special tokens that it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct Conversation<'a> {
    /// Message objects, at least one. As in transformers 5, keys that are `null` count as absent, and reasoning
    /// stands under `reasoning_content` and `thinking` whichever name it came by. Arguments of tool calls stay text
    /// if they are: most templates want objects, and it is the caller who parses them.
    pub messages: &'a [Value],
    /// Tool objects, `None` if the request has none.
    pub tools: Option<&'a [Value]>,
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables (`chat_template_kwargs`): `enable_thinking`, `date_string` ...
    pub kwargs: Option<&'a Map<String, Value>>,
}

/// The template refused the conversation (`raise_exception`) or could not be evaluated with it: the client's doing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("the chat template refused the messages: {0}")]
pub struct TemplateError(pub String);

/// Where the chat templates of a checkpoint may stand; files of their own leave those inside the configuration unread.
pub(crate) struct Sources<'a> {
    /// For messages.
    pub(crate) path: PathBuf,
    /// chat_template.jinja.
    pub(crate) file: Option<&'a str>,
    /// additional_chat_templates/tool_use.jinja.
    pub(crate) tool_file: Option<&'a str>,
    /// tokenizer_config.json: `chat_template` is a text, or a list of `{name, template}`.
    pub(crate) config: &'a Config,
}

impl ChatTemplate {
    /// Compiles a template's source; `special_tokens` become variables (`bos_token`, `eos_token` ...).
    ///
    /// # Errors
    /// [`LoadError::Format`] where the source is no valid template.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, LoadError> {
        let mut template = Self { environment: environment(), special_tokens };
        template.add(DEFAULT, source, Path::new("chat template"))?;
        Ok(template)
    }

    /// The template of a checkpoint, `None` if it has none.
    pub(crate) fn find(sources: Sources<'_>) -> Result<Option<Self>, LoadError> {
        let mut named: Vec<(&str, &str, &Path)> = Vec::new();
        let config = sources.config;
        named.extend(sources.file.map(|text| (DEFAULT, text, sources.path.as_path())));
        named.extend(sources.tool_file.map(|text| (TOOL_USE, text, sources.path.as_path())));
        match config.get("chat_template") {
            _ if !named.is_empty() => {}
            None => {}
            Some(Value::String(text)) => named.push((DEFAULT, text, config.path())),
            Some(Value::Array(list)) => {
                for entry in list {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    let (Some(name), Some(template)) = (text("name"), text("template")) else {
                        return Err(config.wrong("chat_template", "entries of {name, template}"));
                    };
                    named.push((name, template, config.path()));
                }
            }
            Some(_) => return Err(config.wrong("chat_template", "a text or a list")),
        }
        let mut template = Self { environment: environment(), special_tokens: special_tokens(config) };
        for (name, text, path) in named.into_iter().filter(|(name, ..)| [DEFAULT, TOOL_USE].contains(name)) {
            template.add(name, text, path)?;
        }
        let known = template.environment.get_template(DEFAULT).is_ok() || template.has_tool_use();
        Ok(known.then_some(template))
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`TemplateError`] with the template's own words, or with what could not be evaluated.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        if conversation.messages.is_empty() {
            return Err(TemplateError("the conversation is empty".to_owned()));
        }
        let tools = conversation.tools;
        let name = if tools.is_some() && self.has_tool_use() { TOOL_USE } else { DEFAULT };
        let template = self.environment.get_template(name);
        let template = template
            .map_err(|_| TemplateError("there is no default template, only one for tools".to_owned()))?;
        let messages: Vec<Cow<'_, Value>> = conversation.messages.iter().map(shown).collect();
        let mut variables: Vec<(&str, minijinja::Value)> = Vec::new();
        let own = self.special_tokens.iter();
        for (key, value) in own.chain(conversation.kwargs.into_iter().flatten()) {
            variables.push((key, Serde(value).into()));
        }
        // Last, so that no variable of the request replaces them.
        variables.push(("documents", ().into()));
        variables.push(("messages", Serde(messages).into()));
        variables.push(("tools", Serde(tools).into()));
        variables.push(("add_generation_prompt", conversation.add_generation_prompt.into()));
        let variables = minijinja::Value::from_pairs(variables);
        template.render(variables).map_err(|e| refusal(&e))
    }

    /// Whether a word stands in the template's source, such as the name of a role that not all templates know.
    pub fn mentions(&self, word: &str) -> bool {
        let named =
            |name| self.environment.get_template(name).is_ok_and(|template| template.source().contains(word));
        named(DEFAULT) || named(TOOL_USE)
    }

    fn has_tool_use(&self) -> bool {
        self.environment.get_template(TOOL_USE).is_ok()
    }

    fn add(&mut self, name: &str, source: &str, path: &Path) -> Result<(), LoadError> {
        // Jinja reads every line ending as one newline, in text and in strings.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = generation_tag::replaced(&source).into_owned();
        self.environment.add_template_owned(name.to_owned(), source).map_err(|e| {
            LoadError::format(
                path,
                format!("expected a chat template, found an error in it: {}", described(&e)),
            )
        })
    }
}

/// Set up as transformers sets up jinja2.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters do not clash"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    functions::add(&mut environment);
    environment
}

/// A message as transformers 5 shows it to templates: without keys that are `null`, and with the reasoning under
/// each name that templates look for.
fn shown(message: &Value) -> Cow<'_, Value> {
    const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let Value::Object(map) = message else { return Cow::Borrowed(message) };
    let reasoning = REASONING.iter().find_map(|key| map.get(*key).filter(|v| !v.is_null()));
    if reasoning.is_none() && !map.values().any(Value::is_null) {
        return Cow::Borrowed(message);
    }
    let kept = map.iter().filter(|(_, v)| !v.is_null());
    let mut shown: Map<String, Value> = Map::new();
    if let Some(reasoning) = reasoning {
        shown.insert("thinking".to_owned(), reasoning.clone());
    }
    shown.extend(kept.map(|(k, v)| (k.clone(), v.clone())));
    if let Some(reasoning) = reasoning {
        shown.insert("reasoning_content".to_owned(), reasoning.clone());
    }
    Cow::Owned(Value::Object(shown))
}

fn refusal(error: &minijinja::Error) -> TemplateError {
    match error.detail() {
        Some(words) if functions::is_raised(error) => TemplateError(words.to_owned()),
        _ => TemplateError(described(error)),
    }
}

/// An error with its place and without the template's name, which says nothing to anyone.
fn described(error: &minijinja::Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => "it takes too long to evaluate".to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}
