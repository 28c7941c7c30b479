//! The fields that hold an answer to a form: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::fields::{Fields, unexpected};
use crate::error::ApiError;
use crate::grammar::{self, Compiled, Constraint, Wanted};
use crate::registry::Model;

/// Most texts to choose from.
const CHOICES_MAX: usize = 10_000;

/// A constraint, and the field that asks for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ConstraintField {
    pub(crate) param: String,
    pub(crate) wanted: Wanted,
}

impl ConstraintField {
    /// Reads all the fields; at most one of them may ask for something.
    pub(crate) fn read(fields: &Fields<'_, '_>) -> Result<Option<Self>, ApiError> {
        let all = [response_format(fields)?, structured_outputs(fields)?].into_iter().flatten();
        let mut all = all.chain(guided(fields)?);
        let Some((param, constraint)) = all.next() else { return Ok(None) };
        if let Some((second, _)) = all.next() {
            let message = format!("expected one constraint in all, found `{param}` beside it");
            return Err(ApiError::field(second, message));
        }
        Ok(Some(Self { param, wanted: constraint.into() }))
    }

    /// Compiles it, before anything of an answer is sent.
    pub(crate) async fn compile(
        field: Option<Self>,
        model: &Arc<Model>,
    ) -> Result<Option<Arc<Compiled>>, ApiError> {
        let Some(Self { param, wanted }) = field else { return Ok(None) };
        grammar::compile(wanted, model).await.map(Some).map_err(|error| error.in_field(&param))
    }
}

/// A constraint's field, and its form.
type Found = (String, Constraint);

fn response_format(fields: &Fields<'_, '_>) -> Result<Option<Found>, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(None) };
    let format = Fields::at(format, "response_format");
    match format.required_string("type")? {
        "text" => Ok(None),
        "json_object" => Ok(Some(("response_format".to_owned(), Constraint::JsonObject))),
        "json_schema" => {
            let schema = format.object("json_schema")?;
            let schema = schema.ok_or_else(|| format.missing("json_schema", "an object"))?;
            json_schema(&Fields::at(schema, "response_format.json_schema")).map(Some)
        }
        other => Err(unexpected("response_format.type", "text, json_object or json_schema", &json!(other))),
    }
}

/// The object `{name, schema, strict, description}`, which Responses put elsewhere. The schema holds, strict or not.
pub(crate) fn json_schema(fields: &Fields<'_, '_>) -> Result<Found, ApiError> {
    fields.required_string("name")?;
    fields.string("description")?;
    fields.bool("strict")?;
    let schema = fields.object("schema")?;
    let constraint =
        schema.map_or(Constraint::JsonObject, |schema| Constraint::JsonSchema(Value::Object(schema.clone())));
    Ok((fields.name("schema"), constraint))
}

fn structured_outputs(fields: &Fields<'_, '_>) -> Result<Option<Found>, ApiError> {
    let Some(outputs) = fields.object("structured_outputs")? else { return Ok(None) };
    let outputs = Fields::at(outputs, "structured_outputs");
    if outputs.get("structural_tag").is_some() {
        return Err(ApiError::unsupported(outputs.name("structural_tag"), "not supported by this server"));
    }
    let object = outputs.bool("json_object")?.unwrap_or(false);
    let found = [
        object.then(|| (outputs.name("json_object"), Constraint::JsonObject)),
        one_of(&outputs, ["json", "regex", "choice", "grammar"])?,
    ];
    let mut found = found.into_iter().flatten();
    let first = found.next().ok_or_else(|| {
        let message = "expected one of json, json_object, regex, choice and grammar, found none";
        ApiError::field("structured_outputs", message)
    })?;
    match found.next() {
        Some(_) => Err(ApiError::field("structured_outputs", "expected one constraint, found two")),
        None => Ok(Some(first)),
    }
}

fn guided(fields: &Fields<'_, '_>) -> Result<Option<Found>, ApiError> {
    one_of(fields, ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
}

/// The one of four fields that is there.
fn one_of(
    fields: &Fields<'_, '_>,
    [json, regex, choice, grammar]: [&str; 4],
) -> Result<Option<Found>, ApiError> {
    let found = [
        schema(fields, json)?.map(|schema| (fields.name(json), Constraint::JsonSchema(schema))),
        fields.string(regex)?.map(|text| (fields.name(regex), Constraint::Regex(text.to_owned()))),
        choices(fields, choice)?.map(|texts| (fields.name(choice), Constraint::Choice(texts))),
        fields.string(grammar)?.map(|text| (fields.name(grammar), Constraint::Lark(text.to_owned()))),
    ];
    let mut found = found.into_iter().flatten();
    let first = found.next();
    match (&first, found.next()) {
        (Some((first, _)), Some((second, _))) => {
            Err(ApiError::field(second, format!("expected one constraint in all, found `{first}` beside it")))
        }
        _ => Ok(first),
    }
}

/// A schema, or one written out as a string.
fn schema(fields: &Fields<'_, '_>, field: &str) -> Result<Option<Value>, ApiError> {
    let wrong = |value: &Value| unexpected(fields.name(field), "a JSON schema", value);
    match fields.get(field) {
        None => Ok(None),
        Some(value @ Value::Object(_)) => Ok(Some(value.clone())),
        Some(value @ Value::String(text)) => match serde_json::from_str(text) {
            Ok(schema @ Value::Object(_)) => Ok(Some(schema)),
            _ => Err(wrong(value)),
        },
        Some(value) => Err(wrong(value)),
    }
}

fn choices(fields: &Fields<'_, '_>, field: &str) -> Result<Option<Vec<String>>, ApiError> {
    let Some(items) = fields.array(field)? else { return Ok(None) };
    if items.is_empty() || items.len() > CHOICES_MAX {
        let message = format!("expected 1 to {CHOICES_MAX} strings, found {}", items.len());
        return Err(ApiError::field(fields.name(field), message));
    }
    let text = |(at, item): (usize, &Value)| match item {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => {
            Err(unexpected(format!("{}[{at}]", fields.name(field)), "a string that is not empty", other))
        }
    };
    items.iter().enumerate().map(text).collect::<Result<_, _>>().map(Some)
}
