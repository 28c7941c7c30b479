//! What the answers to a chat request are held to: calls where there must be some, else the form that was asked for, or
//! either where the model may choose.

use std::sync::Arc;

use serde_json::{Value, json};

use super::chat::ChatRequest;
use super::tools::{CallMode, Tools};
use crate::error::ApiError;
use crate::grammar::{self, Compiled, Constraint, Wanted};
use crate::output::Output;
use crate::output::call_grammar::{JSON_SPACE, Schemas};
use crate::registry::Model;

impl ChatRequest {
    /// Compiles it for answers that are taken apart by `output`.
    ///
    /// # Errors
    /// 400, naming the field whose grammar or schema is at fault.
    pub(crate) async fn held(
        &self,
        model: &Arc<Model>,
        output: &Output,
    ) -> Result<Option<Arc<Compiled>>, ApiError> {
        let compile = |constraint: Constraint| {
            let after = output.reasoning_end().map(str::to_owned);
            grammar::compile(Wanted { constraint, after }, model)
        };
        let asked = self.constraint.as_ref();
        let in_asked = |error: ApiError| match asked {
            Some(field) => error.in_field(&field.param),
            None => error,
        };
        if let Some(field) = asked {
            // On its own first, so that what is wrong with it is told of it.
            let alone = compile(field.wanted.constraint.clone()).await.map_err(in_asked)?;
            if self.tools.mode == CallMode::None || self.tools.callable().next().is_none() {
                return Ok(Some(alone));
            }
        }
        let mut failure = None;
        for schemas in [Schemas::All, Schemas::Strict] {
            let Some(constraint) = self.constraint_of_calls((model, output), schemas) else {
                return match asked {
                    Some(field) => compile(field.wanted.constraint.clone()).await.map(Some).map_err(in_asked),
                    None => Ok(None),
                };
            };
            match compile(constraint).await {
                Ok(compiled) => return Ok(Some(compiled)),
                Err(error) => failure = Some(error.in_field("tools")),
            }
        }
        failure.map_or(Ok(None), Err)
    }

    fn constraint_of_calls(
        &self,
        (model, output): (&Model, &Output),
        schemas: Schemas,
    ) -> Option<Constraint> {
        let tokenizer = &model.served.tokenizer;
        let schema = self.constraint.as_ref().filter(|_| self.tools.mode != CallMode::Required);
        let Some(field) = schema else {
            return output.call_grammar(&self.tools, tokenizer, schemas).map(Constraint::Lark);
        };
        let schema = match &field.wanted.constraint {
            Constraint::JsonSchema(schema) => schema.clone(),
            Constraint::JsonObject => json!({"type": "object"}),
            // Only JSON can be told from a call.
            Constraint::Regex(_) | Constraint::Choice(_) | Constraint::Lark(_) => return None,
        };
        let required = Tools { mode: CallMode::Required, ..self.tools.clone() };
        let calls = output.call_grammar(&required, tokenizer, schemas)?;
        Some(Constraint::Lark(either(&calls, schema)))
    }
}

/// A grammar of calls, or JSON in their place.
fn either(calls: &str, mut schema: Value) -> String {
    schema["x-guidance"] = json!({"whitespace_pattern": JSON_SPACE});
    let (start, rules) = calls.split_once('\n').unwrap_or((calls, ""));
    let answer = start.replacen("answer", "asked", 1);
    let answer = answer.strip_prefix("start: ").unwrap_or("asked");
    format!("{start} | {answer}\nasked: %json {schema}\n{rules}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_or_json() {
        let calls = "start: /\\n{0,2}/ answer\nanswer: call\ncall: \"f\"\n";
        let space = json!({"whitespace_pattern": JSON_SPACE});
        let schema = json!({"type": "object", "x-guidance": space});
        assert_eq!(
            either(calls, json!({"type": "object"})),
            format!(
                "start: /\\n{{0,2}}/ answer | /\\n{{0,2}}/ asked\nasked: %json {schema}\nanswer: call\ncall: \"f\"\n"
            )
        );
    }
}
