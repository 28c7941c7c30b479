//! Methods of Python's strings, lists and dicts: minijinja-contrib's, and those of str that it lacks and published
//! templates call.

use minijinja::value::{Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Called where a value has no method of this name.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = of_string(text, method, args)
    {
        return result;
    }
    match (value.kind(), method) {
        (ValueKind::Seq | ValueKind::Map, "copy") => from_args(args).map(|()| value.clone()),
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `None` for a method that is not here.
fn of_string(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "removeprefix" => from_args(args).map(|(p,): (&str,)| text.strip_prefix(p).unwrap_or(text).into()),
        "removesuffix" => from_args(args).map(|(s,): (&str,)| text.strip_suffix(s).unwrap_or(text).into()),
        "casefold" => from_args(args).map(|()| text.to_lowercase().into()),
        "index" | "rindex" => from_args(args).and_then(|(part,): (&str,)| {
            let at = if method == "index" { text.find(part) } else { text.rfind(part) };
            let at = at.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            Ok(text[..at].chars().count().into())
        }),
        "partition" | "rpartition" => from_args(args).map(|(part,): (&str,)| {
            let (first, found) = (method == "partition", Value::from(part));
            let halves = if first { text.split_once(part) } else { text.rsplit_once(part) };
            let none = || Value::from("");
            let parts = match halves {
                Some((before, after)) => [before.into(), found, after.into()],
                None if first => [text.into(), none(), none()],
                None => [none(), none(), text.into()],
            };
            Tuple::from(parts.to_vec()).into()
        }),
        "rsplit" => from_args(args).map(|(part, most): (&str, Option<usize>)| {
            let mut parts: Vec<&str> =
                text.rsplitn(most.map_or(usize::MAX, |n| n.saturating_add(1)), part).collect();
            parts.reverse();
            Value::from_iter(parts.into_iter().map(Value::from))
        }),
        _ => return None,
    })
}
