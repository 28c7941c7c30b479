//! Whose turn it is, as clients say it: OpenAI's `service_tier`, vLLM's `priority`.

use super::fields::Fields;
use crate::error::ApiError;

/// How far a tier is from those who say nothing.
const TIER: i32 = 1000;
/// Clients' numbers count up to here, either way.
const OWN_MAX: i32 = 1_000_000;
/// The priority of what nobody waits for: nothing is behind it.
pub(crate) const LAST: i32 = OWN_MAX;

/// The fields `priority`, where it is given, and `service_tier`: lower numbers go first. Tiers that are not known here
/// are as none.
///
/// # Errors
/// 400, naming the field.
pub(crate) fn read(fields: &Fields<'_, '_>) -> Result<i32, ApiError> {
    let tier = match fields.string("service_tier")? {
        Some("priority") => -TIER,
        Some("flex") => TIER,
        _ => 0,
    };
    let own = fields.integer("priority", i64::MIN..=i64::MAX)?;
    let clamped = |own: i64| own.clamp(i64::from(-OWN_MAX), i64::from(OWN_MAX)) as i32;
    Ok(own.map_or(tier, clamped))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_number_counts_before_a_tier() {
        let cases = [
            (json!({}), 0),
            (json!({"service_tier": "auto"}), 0),
            (json!({"service_tier": "flex"}), 1000),
            (json!({"service_tier": "priority", "priority": null}), -1000),
            (json!({"service_tier": "priority", "priority": 7}), 7),
            (json!({"priority": i64::MIN}), -1_000_000),
            (json!({"priority": i64::MAX}), LAST),
        ];
        for (body, expected) in cases {
            assert_eq!(read(&Fields::of(body.as_object().unwrap())), Ok(expected), "{body}");
        }
        for (body, param) in
            [(json!({"service_tier": 1}), "service_tier"), (json!({"priority": "x"}), "priority")]
        {
            let error = read(&Fields::of(body.as_object().unwrap())).unwrap_err();
            assert_eq!(error.body()["error"]["param"], param);
        }
    }
}
