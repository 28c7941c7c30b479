//! From the raw text of an answer to its parts: text, reasoning and calls of functions.
//!
//! A [`Format`] says how a model writes them. For one request, [`Output`] says which of them are told apart and with
//! what the prompt has begun; it is recorded with a session's turn, so that the same tokens become the same parts
//! whenever they are read. A [`Parser`] takes the text of one choice as it comes and gives [`Part`]s, which are
//! collected in a [`Message`]. All shapes of answers are written from these two.
//!
//! No text is lost: what turns out not to be a call is text. Only the markers themselves and the space around them go.

pub(crate) mod call_grammar;
mod call_object;
mod format;
mod harmony;
mod hermes;
mod message;
mod objects;
mod part;
mod pythonic;
mod scan;
#[cfg(test)]
mod tests;
mod think;

use std::sync::Arc;

use mainstay_models::tokenizer::Tokenizer;
use serde_json::{Value, json};

pub use format::{Format, FormatChoice, ReasoningFormat, ToolFormat, UnknownFormat};
pub(crate) use message::Message;
pub(crate) use part::Part;

use crate::openai::tools::CallStyle;
use harmony::Harmony;
use hermes::Hermes;
use objects::Objects;
use part::{CallIds, Sink};
use think::Think;

/// Whether the reader wants to see what the model thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShowReasoning {
    Yes,
    /// It is taken out of the answer all the same.
    No,
}

/// How the answers to one request are taken apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Output {
    format: Format,
    /// The functions that may be called.
    names: Arc<[String]>,
    /// The prompt ends inside the reasoning.
    is_open: bool,
    show_reasoning: ShowReasoning,
    /// How the client writes calls.
    pub(crate) style: CallStyle,
    /// What the ids of calls follow from.
    seed: Arc<str>,
    /// Special tokens that the parser must see.
    markers: Arc<[u32]>,
}

impl Output {
    /// An answer that is nothing but text.
    pub(crate) fn plain() -> Self {
        Self {
            format: Format { reasoning: ReasoningFormat::None, tools: ToolFormat::None },
            names: Arc::default(),
            is_open: false,
            show_reasoning: ShowReasoning::Yes,
            style: CallStyle::Tools,
            seed: Arc::default(),
            markers: Arc::default(),
        }
    }

    /// The output of a model that may call the functions of these names. Without any, what looks like a call is text.
    pub(crate) fn new(
        format: Format,
        tokenizer: &Tokenizer,
        (names, style): (Vec<String>, CallStyle),
        show_reasoning: ShowReasoning,
    ) -> Self {
        let tools = if names.is_empty() { ToolFormat::None } else { format.tools };
        let format = Format { tools, ..format };
        let is_special = |id: &u32| tokenizer.is_special(*id);
        let markers = format.markers().into_iter().filter_map(|text| tokenizer.id(text)).filter(is_special);
        Self {
            format,
            names: names.into(),
            is_open: false,
            show_reasoning,
            style,
            seed: crate::random::id("").into(),
            markers: markers.collect(),
        }
    }

    /// For an answer that goes on where this prompt ends.
    pub(crate) fn after(mut self, prompt: &str) -> Self {
        self.is_open = self.tags().is_some_and(|tags| prompt.trim_end().ends_with(tags.open));
        self
    }

    /// The first tag of reasoning, where the prompt ends with it.
    pub(crate) fn opened_with(&self) -> Option<&'static str> {
        self.tags().filter(|_| self.is_open).map(|tags| tags.open)
    }

    /// Special tokens that must not be left out of the text before it is taken apart.
    pub(crate) fn markers(&self) -> &[u32] {
        &self.markers
    }

    fn tags(&self) -> Option<think::Tags> {
        match self.format.reasoning {
            ReasoningFormat::Think => Some(think::THINK),
            ReasoningFormat::Mistral => Some(think::MISTRAL),
            ReasoningFormat::None | ReasoningFormat::Harmony => None,
        }
    }

    /// For the record of a turn.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "reasoning": self.format.reasoning.to_string(),
            "tools": self.format.tools.to_string(),
            "names": *self.names,
            "is_open": self.is_open,
            "show_reasoning": self.show_reasoning == ShowReasoning::Yes,
            "functions": self.style == CallStyle::Functions,
            "seed": *self.seed,
            "markers": *self.markers,
        })
    }

    /// What [`Output::to_json`] wrote; of an older turn, which has none, all is text.
    pub(crate) fn of_json(value: &Value) -> Option<Self> {
        if value.is_null() {
            return Some(Self::plain());
        }
        let names: Vec<String> = serde_json::from_value(value["names"].clone()).ok()?;
        let markers: Vec<u32> = serde_json::from_value(value["markers"].clone()).ok()?;
        let is_shown = value["show_reasoning"].as_bool()?;
        Some(Self {
            format: Format {
                reasoning: value["reasoning"].as_str()?.parse().ok()?,
                tools: value["tools"].as_str()?.parse().ok()?,
            },
            names: names.into(),
            is_open: value["is_open"].as_bool()?,
            show_reasoning: if is_shown { ShowReasoning::Yes } else { ShowReasoning::No },
            style: if value["functions"].as_bool()? { CallStyle::Functions } else { CallStyle::Tools },
            seed: value["seed"].as_str()?.into(),
            markers: markers.into(),
        })
    }
}

/// What is left of a text after its reasoning.
#[derive(Clone, Debug)]
enum Rest {
    Text,
    Hermes(Hermes),
    Objects(Objects),
    Harmony(Harmony),
}

/// Takes the text of one choice apart as it comes. The parts do not depend on how the text is cut into pieces, but
/// for how they are cut themselves.
#[derive(Clone, Debug)]
pub(crate) struct Parser {
    think: Option<Think>,
    rest: Rest,
    sink: Sink,
}

impl Parser {
    /// `choice` is the number of the choice in its request.
    pub(crate) fn new(output: &Output, choice: usize) -> Self {
        let ids = CallIds::new(Arc::clone(&output.seed), choice);
        let takes_calls = output.format.tools != ToolFormat::None;
        let sink = Sink::new(ids, takes_calls, output.show_reasoning == ShowReasoning::Yes);
        let is_harmony = output.format.is_harmony();
        let tags = output.tags().filter(|_| !is_harmony);
        let objects = |rules: objects::Rules| Rest::Objects(Objects::new(rules));
        let rules = objects::Rules {
            marker: None,
            is_markless: true,
            has_named: false,
            has_python: false,
            names: Arc::clone(&output.names),
        };
        let rest = match output.format.tools {
            _ if is_harmony => Rest::Harmony(Harmony::new(harmony::Rules {
                takes_reasoning: output.format.reasoning == ReasoningFormat::Harmony,
                takes_calls: output.format.tools == ToolFormat::Harmony,
            })),
            ToolFormat::None | ToolFormat::Harmony => Rest::Text,
            ToolFormat::Hermes => Rest::Hermes(Hermes::new()),
            ToolFormat::Json => objects(rules),
            ToolFormat::Llama3Json => objects(objects::Rules { marker: Some(objects::PYTHON_TAG), ..rules }),
            ToolFormat::Mistral => objects(objects::Rules {
                marker: Some(objects::TOOL_CALLS),
                is_markless: false,
                has_named: true,
                ..rules
            }),
            ToolFormat::Gemma => {
                objects(objects::Rules { marker: Some(objects::TOOL_CODE), has_python: true, ..rules })
            }
        };
        Self { think: tags.map(|tags| Think::new(tags, output.is_open)), rest, sink }
    }

    /// Whether the text that comes next is reasoning, as far as is known.
    pub(crate) fn is_reasoning(&self) -> bool {
        match (&self.think, &self.rest) {
            (Some(think), _) => think.is_inside(),
            (None, Rest::Harmony(harmony)) => harmony.is_reasoning(),
            (None, _) => false,
        }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Part> {
        if text.is_empty() {
            return Vec::new();
        }
        match &mut self.think {
            Some(think) => {
                let rest = think.push(text, &mut self.sink);
                self.rest.push(&rest, &mut self.sink);
            }
            None => self.rest.push(text, &mut self.sink),
        }
        self.sink.take()
    }

    /// The parts still held back, when no more text will come.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        if let Some(think) = &mut self.think {
            let rest = think.finish(&mut self.sink);
            self.rest.push(&rest, &mut self.sink);
        }
        self.rest.finish(&mut self.sink);
        self.sink.finish();
        self.sink.take()
    }
}

impl Rest {
    fn push(&mut self, text: &str, sink: &mut Sink) {
        match self {
            Self::Text => sink.text(text),
            Self::Hermes(parser) => parser.push(text, sink),
            Self::Objects(parser) => parser.push(text, sink),
            Self::Harmony(parser) => parser.push(text, sink),
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        match self {
            Self::Text => {}
            Self::Hermes(parser) => parser.finish(sink),
            Self::Objects(parser) => parser.finish(sink),
            Self::Harmony(parser) => parser.finish(sink),
        }
    }
}
