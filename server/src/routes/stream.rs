//! GET /v1/sessions/{id}/stream: a session's answer as events, from the token on that the reader does not have.

use axum::Extension;
use axum::extract::{Path, RawQuery, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::Value;

use super::Shared;
use crate::auth::Tenant;
use crate::error::ApiError;
use crate::openai::fields::unexpected;
use crate::openai::session_fields::header_text;
use crate::sessions::resume::Reader;

const LAST_EVENT_ID: &str = "last-event-id";

pub(super) async fn get(
    State(app): Shared,
    Extension(tenant): Extension<Tenant>,
    Path(session): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let sessions = app.sessions()?.clone();
    let after = after(query.as_deref().unwrap_or_default(), &headers)?;
    let (registry, interval) = (app.registry.clone(), app.options.journal_interval);
    let reader = Reader { sessions, registry, tenant: tenant.0, interval, time: app.time(), after };
    reader.stream(session).await
}

/// How many tokens the reader has: `after` of the query, or the header that browsers send by themselves.
fn after(query: &str, headers: &HeaderMap) -> Result<usize, ApiError> {
    let expected = "a number of tokens";
    let number = |name: &str, text: &str| {
        text.parse::<usize>().map_err(|_| unexpected(name, expected, &Value::from(text)))
    };
    let asked = query.split('&').find_map(|pair| pair.strip_prefix("after=")).filter(|text| !text.is_empty());
    match asked {
        Some(text) => number("after", text),
        None => match header_text(headers, LAST_EVENT_ID, "Last-Event-ID", expected)? {
            Some(text) => number("Last-Event-ID", &text),
            None => Ok(0),
        },
    }
}
