//! /v1/rerank: the request's fields and the answer's shape, as Jina and Cohere have them.

use serde_json::{Value, json};

use super::embeddings::{shortest, truncation, usage};
use super::fields::{Fields, unexpected};
use super::priority;
use crate::error::ApiError;
use crate::pooling::Rows;
use crate::random;
use crate::registry::Model;

/// Most documents of a request, as Cohere and Jina have it.
const DOCUMENTS_MAX: usize = 2048;

/// A request to order documents by how well they answer a query.
pub(crate) struct RerankRequest {
    pub(crate) query: String,
    pub(crate) documents: Vec<String>,
    /// How many are wanted of the best.
    top_n: Option<usize>,
    return_documents: bool,
    pub(crate) truncate: Option<usize>,
    pub(crate) priority: i32,
}

impl RerankRequest {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        model.check_scores()?;
        Ok(Self {
            query: fields.required_string("query")?.to_owned(),
            documents: documents(fields)?,
            top_n: fields.count("top_n", 1..=usize::MAX)?,
            return_documents: fields.bool("return_documents")?.unwrap_or(true),
            truncate: truncation(fields, model)?,
            priority: priority::read(fields)?,
        })
    }

    /// The answer: the best first, equals in the order they came in.
    pub(crate) fn answer(&self, model: &Model, rows: &Rows) -> Value {
        let score = |index: usize| rows.rows[index].first().copied().unwrap_or_default();
        let mut order: Vec<usize> = (0..rows.rows.len()).collect();
        order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        order.truncate(self.top_n.unwrap_or(usize::MAX));
        let result = |index: usize| {
            let mut result = json!({"index": index, "relevance_score": shortest(score(index))});
            if self.return_documents {
                result["document"] = json!({"text": self.documents[index]});
            }
            result
        };
        json!({
            "id": random::id("rerank-"),
            "model": model.id,
            "results": order.into_iter().map(result).collect::<Vec<_>>(),
            "usage": usage(rows),
        })
    }
}

/// The field `documents`: strings, or objects with a `text`.
fn documents(fields: &Fields<'_, '_>) -> Result<Vec<String>, ApiError> {
    let expected = "an array of strings or of objects with a `text`";
    let items = fields.array("documents")?.ok_or_else(|| fields.missing("documents", expected))?;
    if !(1..=DOCUMENTS_MAX).contains(&items.len()) {
        let message = format!("expected 1 to {DOCUMENTS_MAX} documents, found {}", items.len());
        return Err(ApiError::field("documents", message));
    }
    let text = |(at, item): (usize, &Value)| match item {
        Value::String(text) => Ok(text.clone()),
        Value::Object(document) => {
            Fields::at(document, &format!("documents[{at}]")).required_string("text").map(str::to_owned)
        }
        other => Err(unexpected(format!("documents[{at}]"), "a string or an object with a `text`", other)),
    };
    items.iter().enumerate().map(text).collect()
}
