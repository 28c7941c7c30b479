//! A session's turns: listing them, branching off at one, going back to one.

use axum::Json;
use axum::extract::Request;
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use mainstay_engine::store::{At, Store};
use serde_json::Value;

use super::Target;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::session::{TurnTokens, list_object, name, position, turn_object};
use crate::openai::session_fields::expected_turn;
use crate::routes::query::{Order, Params};

pub(super) async fn fork(target: Target, request: Request) -> Result<Response, ApiError> {
    let body = target.owner.body(request).await?;
    let fields = Fields::of(&body);
    let (at, field) = position(&fields, ("at_turn", "at_token"))?.unwrap_or((At::Head, "at_turn"));
    let name = fields.string("name")?.map(|text| name("name", text)).transpose()?;
    let fork = move |store: &Store, tenant, id| store.fork(tenant, id, at, name);
    let made = target.call(fork).await.map_err(|error| error.about(field))?;
    target.owner.reply(StatusCode::CREATED, made).await
}

pub(super) async fn rollback(target: Target, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let body = target.owner.body(request).await?;
    let fields = Fields::of(&body);
    let at = position(&fields, ("to_turn", "to_token"))?;
    let (at, field) = at.ok_or_else(|| fields.missing("to_turn", "a turn, or `to_token` in its place"))?;
    let expected = expected_turn(&fields, &headers)?;
    let _claim = target.owner.sessions.claim(target.id)?;
    let back = move |store: &Store, tenant, id| store.rollback(tenant, id, at, expected);
    let info = target.call(back).await.map_err(|error| error.about(field))?;
    target.owner.reply(StatusCode::OK, info).await
}

pub(super) async fn turns(target: Target, uri: Uri) -> Result<Json<Value>, ApiError> {
    let params = Params::of(&uri)?;
    let (limit, order) = (params.limit()?, params.order()?);
    let after = params.count("after", 0..=u32::MAX)?;
    let tokens = match params.choice("include", &["tokens"])? {
        Some(_) => TurnTokens::Shown,
        None => TurnTokens::Left,
    };
    let show = move |store: &Store, tenant, id| {
        let mut turns = store.turns(tenant, id)?;
        match order {
            Order::Ascending => turns.retain(|turn| after.is_none_or(|after| turn.number > after)),
            Order::Descending => {
                turns.retain(|turn| after.is_none_or(|after| turn.number < after));
                turns.reverse();
            }
        }
        let has_more = turns.len() > limit;
        let data = turns.iter().take(limit).map(|turn| turn_object(turn, tokens)).collect();
        Ok(list_object(data, has_more, "number"))
    };
    Ok(Json(target.call(show).await?))
}
