//! Reads the query of an address, as strictly as a body.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use axum::extract::Query;
use axum::http::Uri;
use mainstay_engine::store::SessionId;
use serde_json::json;

use crate::error::ApiError;
use crate::openai::fields::unexpected;
use crate::sessions::id_or_name;

/// In which order a list comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Oldest first.
    Ascending,
    Descending,
}

/// The parameters of an address; an empty one is an absent one.
pub(super) struct Params(HashMap<String, String>);

impl Params {
    pub(super) fn of(uri: &Uri) -> Result<Self, ApiError> {
        let Query(mut params) = Query::<HashMap<String, String>>::try_from_uri(uri)
            .map_err(|error| ApiError::bad_request(format!("the query of the address: {error}")))?;
        params.retain(|_, value| !value.is_empty());
        Ok(Self(params))
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// What stands as `name[key]=value`.
    pub(super) fn indexed(&self, name: &str) -> Vec<(String, String)> {
        let key = |(param, value): (&String, &String)| {
            let key = param.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
            Some((key.to_owned(), value.clone()))
        };
        self.0.iter().filter_map(key).collect()
    }

    /// For lists that begin with the oldest where nothing is said.
    pub(super) fn ascending_by_default(mut self) -> Self {
        self.0.entry("order".to_owned()).or_insert_with(|| "asc".to_owned());
        self
    }

    pub(super) fn count(&self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let count = text.parse().ok().filter(|count| range.contains(count));
        let expected = || format!("an integer from {} to {}", range.start(), range.end());
        count.map(Some).ok_or_else(|| unexpected(name, &expected(), &json!(text)))
    }

    pub(super) fn session(&self, name: &str) -> Result<Option<SessionId>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let id = id_or_name(text).parse().ok();
        id.map(Some).ok_or_else(|| unexpected(name, "the id of a session", &json!(text)))
    }

    /// One of a few words, by its place among them.
    pub(super) fn choice(&self, name: &str, words: &[&str]) -> Result<Option<usize>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let at = words.iter().position(|word| *word == text);
        at.map(Some).ok_or_else(|| unexpected(name, &words.join(" or "), &json!(text)))
    }

    pub(super) fn order(&self) -> Result<Order, ApiError> {
        let choice = self.choice("order", &["asc", "desc"])?;
        Ok(if choice == Some(1) { Order::Descending } else { Order::Ascending })
    }

    /// Items of one page of a list.
    pub(super) fn limit(&self) -> Result<usize, ApiError> {
        Ok(self.count("limit", 1..=100)?.unwrap_or(20) as usize)
    }
}
