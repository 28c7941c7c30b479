//! A constraint as the client states it, and as it is written into a session.

use serde_json::{Value, json};

/// A constraint, and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) constraint: Constraint,
    /// It begins after this text, before which the model may write anything (its reasoning); without it, at once.
    pub(crate) after: Option<String>,
}

/// The form that a text is held to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that the schema accepts.
    JsonSchema(Value),
    /// What the expression matches from its first to its last character, in the syntax of Rust's crate `regex`.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in the variant of Lark's syntax that the crate `llguidance` reads.
    Lark(String),
}

impl From<Constraint> for Wanted {
    fn from(constraint: Constraint) -> Self {
        Self { constraint, after: None }
    }
}

impl Wanted {
    /// As it stands in a session.
    pub(crate) fn to_json(&self) -> Value {
        let (kind, value) = match &self.constraint {
            Constraint::JsonObject => ("json_object", Value::Null),
            Constraint::JsonSchema(schema) => ("json_schema", schema.clone()),
            Constraint::Regex(regex) => ("regex", json!(regex)),
            Constraint::Choice(choices) => ("choice", json!(choices)),
            Constraint::Lark(grammar) => ("lark", json!(grammar)),
        };
        json!({"kind": kind, "value": value, "after": self.after})
    }

    /// `None` where it is not what [`Wanted::to_json`] writes.
    pub(crate) fn of_json(value: &Value) -> Option<Self> {
        let text = || value["value"].as_str().map(str::to_owned);
        let constraint = match value["kind"].as_str()? {
            "json_object" => Constraint::JsonObject,
            "json_schema" => Constraint::JsonSchema(value["value"].clone()),
            "regex" => Constraint::Regex(text()?),
            "choice" => Constraint::Choice(serde_json::from_value(value["value"].clone()).ok()?),
            "lark" => Constraint::Lark(text()?),
            _ => return None,
        };
        Some(Self { constraint, after: value["after"].as_str().map(str::to_owned) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for constraint in [
            Constraint::JsonObject,
            Constraint::JsonSchema(json!({"type": "array", "items": {"enum": [1, "b", null]}})),
            Constraint::Regex("a/b+".to_owned()),
            Constraint::Choice(vec!["yes".to_owned(), "no \"never\"".to_owned()]),
            Constraint::Lark("start: \"a\"".to_owned()),
        ] {
            for after in [None, Some("</think>".to_owned())] {
                let wanted = Wanted { constraint: constraint.clone(), after };
                assert_eq!(Wanted::of_json(&wanted.to_json()), Some(wanted));
            }
        }
        assert_eq!(Wanted::of_json(&json!({"kind": "regex", "value": 3})), None);
    }
}
