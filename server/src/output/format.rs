//! How a model writes reasoning and calls: found from its template and its tokens, or named by the operator.

use std::fmt;
use std::str::FromStr;

use mainstay_models::template::ChatTemplate;
use mainstay_models::tokenizer::Tokenizer;

use super::{harmony, hermes, objects, think};

/// How a model writes what it thinks before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// It does not, or nobody is to tell it from the answer.
    None,
    /// `<think>..</think>` before the answer; the template may have written the first tag.
    Think,
    /// `[THINK]..[/THINK]` before the answer.
    Mistral,
    /// Harmony's channel `analysis`.
    Harmony,
}

/// How a model calls a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// It does not: an answer is text.
    None,
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`.
    Hermes,
    /// `{"name": .., "parameters": ..}`, after `<|python_tag|>` or alone.
    Llama3Json,
    /// `[TOOL_CALLS]` before an array of objects, or before a name, `[ARGS]` and the arguments.
    Mistral,
    /// Harmony's messages to `functions.NAME`.
    Harmony,
    /// A fenced block `tool_code` with calls in Python's notation, or JSON as in [`ToolFormat::Json`].
    Gemma,
    /// An object with `name` and `arguments` or `parameters`, or an array of them, in place of a text.
    Json,
}

/// How a model writes reasoning and calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// What it thinks.
    pub reasoning: ReasoningFormat,
    /// What it calls.
    pub tools: ToolFormat,
}

/// What the operator has decided about the format; the rest is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatChoice {
    /// What it thinks.
    pub reasoning: Option<ReasoningFormat>,
    /// What it calls.
    pub tools: Option<ToolFormat>,
}

/// A name that stands for no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found `{found}`")]
pub struct UnknownFormat {
    expected: String,
    found: String,
}

const REASONING: [(&str, ReasoningFormat); 4] = [
    ("none", ReasoningFormat::None),
    ("think", ReasoningFormat::Think),
    ("mistral", ReasoningFormat::Mistral),
    ("harmony", ReasoningFormat::Harmony),
];

const TOOLS: [(&str, ToolFormat); 7] = [
    ("none", ToolFormat::None),
    ("hermes", ToolFormat::Hermes),
    ("llama3-json", ToolFormat::Llama3Json),
    ("mistral", ToolFormat::Mistral),
    ("harmony", ToolFormat::Harmony),
    ("gemma", ToolFormat::Gemma),
    ("json", ToolFormat::Json),
];

fn named<T: Copy>(table: &[(&str, T)], text: &str) -> Result<T, UnknownFormat> {
    let found = table.iter().find(|(name, _)| *name == text).map(|(_, format)| *format);
    found.ok_or_else(|| {
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        UnknownFormat { expected: format!("one of {}", names.join(", ")), found: text.to_owned() }
    })
}

fn name<T: Copy + PartialEq>(table: &[(&'static str, T)], format: T) -> &'static str {
    table.iter().find(|(_, known)| *known == format).map_or("none", |(name, _)| name)
}

impl FromStr for ReasoningFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        named(&REASONING, text)
    }
}

impl FromStr for ToolFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        named(&TOOLS, text)
    }
}

impl fmt::Display for ReasoningFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(&REASONING, *self))
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(&TOOLS, *self))
    }
}

impl Format {
    /// The format of a model, as far as the operator has not decided.
    pub(crate) fn of(template: Option<&ChatTemplate>, tokenizer: &Tokenizer, choice: FormatChoice) -> Self {
        let mentions = |word: &str| template.is_some_and(|template| template.mentions(word));
        let knows = |word: &str| mentions(word) || tokenizer.id(word).is_some();
        Self {
            reasoning: choice.reasoning.unwrap_or_else(|| reasoning(mentions, knows)),
            tools: choice.tools.unwrap_or_else(|| tools(mentions, knows)),
        }
    }

    /// Texts that tell the parts apart; where they are special tokens they must be shown to the parser.
    pub(super) fn markers(self) -> Vec<&'static str> {
        let harmony = [
            harmony::START,
            harmony::CHANNEL,
            harmony::MESSAGE,
            harmony::CONSTRAIN,
            harmony::END,
            harmony::CALL,
            harmony::RETURN,
        ];
        if self.is_harmony() {
            return harmony.to_vec();
        }
        let mut markers = match self.reasoning {
            ReasoningFormat::Think => vec![think::THINK.open, think::THINK.close],
            ReasoningFormat::Mistral => vec![think::MISTRAL.open, think::MISTRAL.close],
            ReasoningFormat::None | ReasoningFormat::Harmony => Vec::new(),
        };
        markers.extend(match self.tools {
            ToolFormat::Hermes => [hermes::OPEN, hermes::CLOSE].as_slice(),
            ToolFormat::Llama3Json => &[objects::PYTHON_TAG],
            ToolFormat::Mistral => &[objects::TOOL_CALLS, objects::ARGS, objects::CALL_ID],
            ToolFormat::Gemma | ToolFormat::Json | ToolFormat::None | ToolFormat::Harmony => &[],
        });
        markers
    }

    pub(super) fn is_harmony(self) -> bool {
        self.reasoning == ReasoningFormat::Harmony || self.tools == ToolFormat::Harmony
    }
}

fn reasoning(mentions: impl Fn(&str) -> bool, knows: impl Fn(&str) -> bool) -> ReasoningFormat {
    if mentions(harmony::CHANNEL) {
        ReasoningFormat::Harmony
    } else if mentions(think::THINK.close) || (knows(think::THINK.open) && knows(think::THINK.close)) {
        ReasoningFormat::Think
    } else if knows(think::MISTRAL.open) {
        ReasoningFormat::Mistral
    } else {
        ReasoningFormat::None
    }
}

fn tools(mentions: impl Fn(&str) -> bool, knows: impl Fn(&str) -> bool) -> ToolFormat {
    if !mentions("tools") {
        // The model is told of functions in our words then, and of the generic form.
        return ToolFormat::Json;
    }
    if mentions(harmony::CHANNEL) {
        ToolFormat::Harmony
    } else if mentions(hermes::OPEN) {
        ToolFormat::Hermes
    } else if mentions(objects::TOOL_CALLS) {
        ToolFormat::Mistral
    } else if knows(objects::PYTHON_TAG) {
        ToolFormat::Llama3Json
    } else if mentions("tool_code") || mentions("<start_of_turn>") {
        ToolFormat::Gemma
    } else {
        ToolFormat::Json
    }
}
