//! /v1/embeddings: the request's fields and the answer's shape.

use serde_json::{Value, json};

use super::fields::{Fields, unexpected};
use super::options::{PromptInput, prompts};
use super::priority;
use crate::error::ApiError;
use crate::pooling::Rows;
use crate::registry::Model;

/// Most texts of a request, as OpenAI has it.
const INPUTS_MAX: usize = 2048;

/// How a vector is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EncodingFormat {
    /// A list of numbers.
    Float,
    /// Its f32s, little-endian, in base64.
    Base64,
}

/// A request for embeddings.
pub(crate) struct EmbeddingsRequest {
    pub(crate) inputs: Vec<PromptInput>,
    pub(crate) format: EncodingFormat,
    /// Leading numbers that are wanted of each vector.
    pub(crate) dimensions: Option<usize>,
    pub(crate) truncate: Option<usize>,
    pub(crate) priority: i32,
}

impl EmbeddingsRequest {
    pub(crate) fn read(fields: &Fields<'_, '_>, model: &Model) -> Result<Self, ApiError> {
        let width = model.embedding_width()?;
        let inputs = prompts(fields, "input", model.served.vocab)?;
        if inputs.len() > INPUTS_MAX {
            let message = format!("expected at most {INPUTS_MAX} texts, found {}", inputs.len());
            return Err(ApiError::field("input", message));
        }
        let format = match fields.string("encoding_format")? {
            None | Some("float") => EncodingFormat::Float,
            Some("base64") => EncodingFormat::Base64,
            Some(other) => {
                return Err(unexpected("encoding_format", "`float` or `base64`", &Value::from(other)));
            }
        };
        let dimensions = fields.count("dimensions", 1..=width)?;
        fields.string("user")?;
        let (truncate, priority) = (truncation(fields, model)?, priority::read(fields)?);
        Ok(Self { inputs, format, dimensions, truncate, priority })
    }

    /// The answer.
    pub(crate) fn answer(&self, model: &Model, rows: &Rows) -> Value {
        let data = rows.rows.iter().enumerate().map(|(index, row)| {
            let mut row = row.clone();
            if let Some(dimensions) = self.dimensions.filter(|dimensions| *dimensions < row.len()) {
                shorten(&mut row, dimensions);
            }
            let embedding = match self.format {
                EncodingFormat::Float => Value::from(row.iter().map(|x| shortest(*x)).collect::<Vec<_>>()),
                EncodingFormat::Base64 => Value::from(base64(row.iter().flat_map(|x| x.to_le_bytes()))),
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        });
        json!({
            "object": "list",
            "data": data.collect::<Vec<_>>(),
            "model": model.id,
            "usage": usage(rows),
        })
    }
}

/// The object `usage` of an answer without generated tokens.
pub(crate) fn usage(rows: &Rows) -> Value {
    json!({"prompt_tokens": rows.tokens, "total_tokens": rows.tokens})
}

/// The field `truncate_prompt_tokens`: tokens to which texts are cut; -1 is as many as the model takes.
pub(crate) fn truncation(fields: &Fields<'_, '_>, model: &Model) -> Result<Option<usize>, ApiError> {
    let context = model.served.context;
    let most = fields.integer("truncate_prompt_tokens", -1..=i64::try_from(context).unwrap_or(i64::MAX))?;
    match most {
        Some(0) => {
            let message = format!("expected -1 or a count from 1 to {context}, found the number 0");
            Err(ApiError::field("truncate_prompt_tokens", message))
        }
        most => Ok(most.map(|most| usize::try_from(most).unwrap_or(context))),
    }
}

/// Keeps the first numbers and makes the vector's length 1 again.
fn shorten(row: &mut Vec<f32>, dimensions: usize) {
    row.truncate(dimensions);
    let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

/// The number with the fewest digits that reads back as this f32.
pub(crate) fn shortest(x: f32) -> Value {
    let digits: f64 = x.to_string().parse().unwrap_or_else(|_| f64::from(x));
    Value::from(digits)
}

fn base64(bytes: impl Iterator<Item = u8>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = bytes.collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().zip([16, 8, 0]).map(|(byte, shift)| u32::from(*byte) << shift).sum::<u32>();
        for (place, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = ALPHABET[(bits >> shift & 63) as usize];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.bytes()), text);
        }
        assert_eq!(base64([0xfb, 0xff, 0xfe].into_iter()), "+//+");
    }

    #[test]
    fn numbers_are_written_with_their_shortest_digits() {
        for x in [0.1f32, -1.0 / 3.0, 1e-12, 0.0, 123_456.79] {
            let text = shortest(x).to_string();
            assert_eq!(text.parse::<f32>().unwrap().to_bits(), x.to_bits());
            assert!(text.len() <= 14, "{text}");
        }
    }

    #[test]
    fn a_shortened_vector_has_length_1() {
        let mut row = vec![0.6, 0.0, 0.8, 0.0];
        shorten(&mut row, 3);
        assert_eq!(row.len(), 3);
        let mut row = vec![0.3, 0.4, 0.5];
        shorten(&mut row, 2);
        assert_eq!(row, [0.6, 0.8]);
        let mut row = vec![0.0, 1.0];
        shorten(&mut row, 1);
        assert_eq!(row, [0.0]);
    }
}
