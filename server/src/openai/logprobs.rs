//! Log-probabilities in the two shapes of the API: chat's list of tokens and the older parallel lists.

use mainstay_engine::Score;
use mainstay_models::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use crate::detokenize::token_text;
use crate::generate::TokenOut;

/// Stands for minus infinity, which JSON cannot say.
const LOWEST: f32 = -9999.0;

fn number(logprob: f32) -> Value {
    // NaN compares false and becomes the lowest as well.
    json!(f64::from(if logprob > LOWEST { logprob } else { LOWEST }))
}

/// Chat: `{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`.
pub(crate) fn chat(tokenizer: &Tokenizer, tokens: &[TokenOut]) -> Value {
    let entry = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        json!({"token": token_text(tokenizer, id), "logprob": number(logprob), "bytes": bytes})
    };
    let token = |score: &Score| {
        let mut token = entry(score.token, score.logprob);
        let top: Vec<Value> = score.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
        token["top_logprobs"] = Value::from(top);
        token
    };
    let content: Vec<Value> = tokens.iter().filter_map(|out| out.score.as_ref()).map(token).collect();
    json!({"content": content, "refusal": null})
}

/// Completions: `{tokens, token_logprobs, top_logprobs, text_offset}`, one entry per token. The first token of an
/// echoed prompt has no log-probability.
pub(crate) fn completions(tokenizer: &Tokenizer, tokens: &[TokenOut]) -> Value {
    let texts: Vec<String> = tokens.iter().map(|out| token_text(tokenizer, out.id)).collect();
    let logprob = |out: &TokenOut| out.score.as_ref().map_or(Value::Null, |score| number(score.logprob));
    let top = |out: &TokenOut| out.score.as_ref().map_or(Value::Null, |score| top_by_text(tokenizer, score));
    json!({
        "tokens": texts,
        "token_logprobs": tokens.iter().map(logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|out| out.offset).collect::<Vec<_>>(),
    })
}

/// The alternatives by their text, the token itself always among them with the very number of `token_logprobs`.
fn top_by_text(tokenizer: &Tokenizer, score: &Score) -> Value {
    let mut top = Map::new();
    top.insert(token_text(tokenizer, score.token), number(score.logprob));
    for (id, logprob) in score.top.iter().filter(|(id, _)| *id != score.token) {
        let mut text = token_text(tokenizer, *id);
        if top.contains_key(&text) {
            // Two tokens of equal text: the name keeps both numbers in the object.
            text = format!("token_id:{id}");
        }
        top.insert(text, number(*logprob));
    }
    Value::Object(top)
}
