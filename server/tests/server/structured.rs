//! Answers held to a form: whatever a model with random logits draws, the text fits.

use serde_json::{Value, json};

use crate::testbed::{CHAT, COMPLETIONS, EOS, Server, Setup, chat, completion, start};

/// What a request must set to be held to a schema.
fn format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}})
}

fn object(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// Every form of schema that is served, with texts that end by themselves.
fn schemas() -> Vec<Value> {
    let short = json!({"type": "string", "maxLength": 12});
    vec![
        object(json!({"ok": {"type": "boolean"}})),
        object(json!({"nothing": {"type": "null"}})),
        object(json!({"kind": {"enum": ["a", "b", 3, null, true]}})),
        object(json!({"text": short, "again": short})),
        object(json!({"n": {"type": "integer", "minimum": -20, "maximum": 300}})),
        object(json!({"x": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}})),
        object(json!({"exactly": {"type": "string", "minLength": 3, "maxLength": 3}})),
        object(json!({"list": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 5}})),
        object(json!({"pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}],
            "items": false, "minItems": 2}})),
        object(json!({"deep": object(json!({"deeper": object(json!({"deepest": {"const": "ground"}}))}))})),
        object(json!({"either": {"anyOf": [{"type": "boolean"}, {"const": "neither"}]}})),
        object(json!({"one": {"oneOf": [{"type": "null"}, {"type": "boolean"}]}})),
        object(json!({"all": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]}})),
        json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 4}),
        json!({"enum": ["naïve 日本語 🦀", "\"quoted\" \\ back"]}),
        json!({"const": {"a": [1, {"b": null}], "ü": "é"}}),
        json!({"type": ["boolean", "null"]}),
        json!({"$defs": {"flag": {"type": "boolean"}}, "type": "object", "properties": {"f": {"$ref": "#/$defs/flag"}},
            "required": ["f"], "additionalProperties": false}),
        json!({"$defs": {"list": {"anyOf": [{"type": "null"}, {"type": "object", "properties":
            {"next": {"$ref": "#/$defs/list"}}, "required": ["next"], "additionalProperties": false}]}},
            "$ref": "#/$defs/list"}),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
            "required": ["b"], "additionalProperties": false}),
        json!({"type": "object", "patternProperties": {"^[a-c]$": {"type": "boolean"}}, "maxProperties": 2,
            "additionalProperties": false, "propertyOrdering": "a keyword that nobody knows"}),
    ]
}

/// Whether a value fits a schema, for the keywords of [`schemas`].
fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    let Some(schema) = schema.as_object() else { return schema == &json!(true) };
    schema.iter().all(|(keyword, rule)| keyword_holds(root, schema, (keyword, rule), value))
}

fn keyword_holds(
    root: &Value,
    schema: &serde_json::Map<String, Value>,
    (keyword, rule): (&str, &Value),
    value: &Value,
) -> bool {
    let count = || rule.as_u64().unwrap() as usize;
    let at_most = |len: usize| len <= count();
    let number = || rule.as_f64().unwrap();
    let options = || rule.as_array().unwrap().iter().filter(|option| fits(root, option, value)).count();
    match keyword {
        "type" => match rule {
            Value::Array(names) => names.iter().any(|name| is_of(name.as_str().unwrap(), value)),
            name => is_of(name.as_str().unwrap(), value),
        },
        "enum" => rule.as_array().unwrap().contains(value),
        "const" => rule == value,
        "anyOf" => options() > 0,
        "oneOf" => options() == 1,
        "allOf" => options() == rule.as_array().unwrap().len(),
        "$ref" => {
            let pointer = rule.as_str().unwrap().trim_start_matches('#');
            fits(root, root.pointer(pointer).unwrap(), value)
        }
        "required" => rule.as_array().unwrap().iter().all(|name| value.get(name.as_str().unwrap()).is_some()),
        "properties" => {
            rule.as_object().unwrap().iter().all(|(name, s)| value.get(name).is_none_or(|v| fits(root, s, v)))
        }
        "additionalProperties" => value.as_object().unwrap().iter().all(|(name, v)| {
            let named = schema.get("properties").is_some_and(|p| p.get(name).is_some());
            named || schema.contains_key("patternProperties") || fits(root, rule, v)
        }),
        "patternProperties" => value
            .as_object()
            .unwrap()
            .iter()
            .all(|(name, v)| ["a", "b", "c"].contains(&name.as_str()) && fits(root, &rule["^[a-c]$"], v)),
        "maxProperties" => at_most(value.as_object().unwrap().len()),
        "prefixItems" => {
            value.as_array().unwrap().iter().zip(rule.as_array().unwrap()).all(|(v, s)| fits(root, s, v))
        }
        "items" => {
            let before = schema.get("prefixItems").map_or(0, |items| items.as_array().unwrap().len());
            value.as_array().unwrap().iter().skip(before).all(|v| fits(root, rule, v))
        }
        "minItems" => value.as_array().unwrap().len() >= count(),
        "maxItems" => at_most(value.as_array().unwrap().len()),
        "minLength" => value.as_str().unwrap().chars().count() >= count(),
        "maxLength" => at_most(value.as_str().unwrap().chars().count()),
        "minimum" => value.as_f64().unwrap() >= number(),
        "maximum" => value.as_f64().unwrap() <= number(),
        "multipleOf" => (value.as_f64().unwrap() / number()).fract() == 0.0,
        "$defs" | "propertyOrdering" => true,
        other => panic!("the check does not know {other}"),
    }
}

fn is_of(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|x| x.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("the check does not know {other}"),
    }
}

async fn content(server: &Server, patch: Value) -> (String, String) {
    let answer = server.post(CHAT, &chat(patch)).await.ok();
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap().to_owned();
    (text, choice["finish_reason"].as_str().unwrap().to_owned())
}

#[test]
fn the_check_finds_what_does_not_fit() {
    for (schema, wrong) in [
        (object(json!({"ok": {"type": "boolean"}})), json!({"ok": 1})),
        (object(json!({"ok": {"type": "boolean"}})), json!({})),
        (object(json!({"ok": {"type": "boolean"}})), json!({"ok": true, "more": 1})),
        (json!({"oneOf": [{"type": "integer"}, {"type": "number"}]}), json!(1)),
        (json!({"type": "array", "maxItems": 1}), json!([1, 2])),
        (json!({"type": "string", "maxLength": 1}), json!("éé")),
    ] {
        assert!(!fits(&schema, &schema, &wrong), "{wrong} fits {schema}");
    }
}

#[tokio::test]
async fn every_answer_fits_its_schema() {
    let server = start(Setup::default()).await;
    for schema in schemas() {
        for seed in 0..4 {
            let wanted = json!({"response_format": format(&schema), "temperature": 1, "seed": seed, "max_tokens": 600});
            let (text, reason) = content(&server, wanted).await;
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?} of {schema}"));
            assert!(fits(&schema, &schema, &value), "{text} does not fit {schema}");
            assert_eq!(reason, "stop", "{text} of {schema}");
        }
    }
    server.idle().await;
}

#[tokio::test]
async fn json_objects_are_objects_and_spaces_are_few() {
    let server = start(Setup::default()).await;
    let mut ended = 0;
    for seed in 0..12 {
        let wanted = json!({"response_format": {"type": "json_object"}, "temperature": 1, "seed": seed,
            "max_tokens": 800});
        let (text, reason) = content(&server, wanted).await;
        assert!(text.starts_with('{'), "{text}");
        assert!(!text.contains("\n\n") && !text.contains("                  "), "{text}");
        if reason == "stop" {
            assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
            ended += 1;
        }
    }
    assert!(ended > 0, "no object ended");
}

#[tokio::test]
async fn expressions_choices_and_grammars() {
    let server = start(Setup::default()).await;
    let is_date = |text: &str| text.len() == 10 && text.split('-').all(|part| part.parse::<u32>().is_ok());
    for seed in 0..4 {
        for (field, prefix) in [("structured_outputs", ""), ("guided_", "guided_")] {
            let constraint = |name: &str, value: Value| {
                let mut patch = json!({"temperature": 1, "seed": seed, "max_tokens": 60});
                if prefix.is_empty() {
                    patch[field] = json!({ name: value });
                } else {
                    patch[format!("{prefix}{name}")] = value;
                }
                patch
            };
            let regex = constraint("regex", json!(r"^\d{4}-\d\d-\d\d$"));
            let (date, reason) = content(&server, regex).await;
            assert!(is_date(&date) && reason == "stop", "{date}");
            let choices = ["yes", "no / \"never\"", "日本", "yes, but"];
            let (choice, reason) = content(&server, constraint("choice", json!(choices))).await;
            assert!(choices.contains(&choice.as_str()) && reason == "stop", "{choice}");
            let lark = "start: A B?\nA: /[ab]{2}/\nB: \"!\"\n";
            let (text, reason) = content(&server, constraint("grammar", json!(lark))).await;
            let body = text.strip_suffix('!').unwrap_or(&text);
            assert!(body.len() == 2 && body.chars().all(|c| "ab".contains(c)) && reason == "stop", "{text}");
        }
    }
    let answer =
        server.post(COMPLETIONS, &completion(json!({"guided_choice": ["left", "right"], "n": 4}))).await.ok();
    for choice in answer["choices"].as_array().unwrap() {
        assert!(["left", "right"].contains(&choice["text"].as_str().unwrap()), "{answer}");
    }
}

#[tokio::test]
async fn what_is_not_served_is_named_before_anything_is_sent() {
    let server = start(Setup::default()).await;
    let schema = |schema: Value| json!({"response_format": format(&schema)});
    let field = "response_format.json_schema.schema";
    let cases = [
        (schema(json!({"type": "object", "not": {}})), field, "`not`"),
        (schema(object(json!({"a": {"type": "array", "uniqueItems": true}}))), field, "`uniqueItems`"),
        (schema(json!({"type": "string", "format": "of my own"})), field, "of my own"),
        (schema(json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})), field, "`oneOf`"),
        (schema(json!({"type": "strange"})), field, "strange"),
        (schema(json!({"type": "string", "pattern": "("})), field, "unclosed"),
        (schema(json!({"$ref": "#/$defs/nobody"})), field, "nobody"),
        (schema(json!({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})), field, "cannot spell"),
        (schema(json!({"$ref": "https://example.com/schema"})), field, "example.com"),
        (schema(json!({"type": "integer", "minimum": 3, "maximum": 2})), field, "maximum"),
        (json!({"guided_regex": "("}), "guided_regex", "regex"),
        (json!({"guided_regex": ""}), "guided_regex", "empty"),
        (json!({"guided_grammar": "start: missing"}), "guided_grammar", "missing"),
        (json!({"guided_grammar": ""}), "guided_grammar", ""),
        (json!({"guided_grammar": "(".repeat(5000)}), "guided_grammar", "nested"),
        (json!({"guided_regex": "a".repeat(300 << 10)}), "guided_regex", "bytes"),
    ];
    for (patch, param, word) in cases {
        for stream in [false, true] {
            let mut patch = patch.clone();
            patch["stream"] = json!(stream);
            let error = server.post(CHAT, &chat(patch.clone())).await.error(400);
            assert_eq!(error["param"], param, "{error} for {patch}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(word) && message.len() < 500, "{message} lacks {word}");
        }
    }
}

#[tokio::test]
async fn a_text_ends_with_its_grammar_where_no_token_ends_it() {
    let server = start(Setup::default()).await;
    let wanted =
        json!({"guided_regex": "[ab]{5}", "ignore_eos": true, "max_tokens": 50, "return_token_ids": true});
    let answer = server.post(CHAT, &chat(wanted)).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(
        (choice["message"]["content"].as_str().unwrap().len(), &choice["finish_reason"]),
        (5, &json!("stop"))
    );
    assert!(!choice["token_ids"].as_array().unwrap().contains(&json!(EOS)));
    // With one, that token is drawn, and its place in the log-probabilities is the model's.
    let wanted =
        json!({"guided_regex": "[ab]{5}", "max_tokens": 50, "return_token_ids": true, "logprobs": true});
    let answer = server.post(CHAT, &chat(wanted)).await.ok();
    assert_eq!(answer["choices"][0]["token_ids"].as_array().unwrap().last(), Some(&json!(EOS)));
    // The tokens that must come do not wait for the grammar's end, and its end does not wait for them.
    let wanted = json!({"guided_regex": "[ab]{5}", "max_tokens": 50, "min_tokens": 40});
    assert_eq!(content(&server, wanted).await.1, "stop");
    let wanted = json!({"guided_regex": "[ab]{50}", "max_tokens": 3});
    assert_eq!(content(&server, wanted).await.1, "length");
    let wanted = json!({"guided_regex": "xxxSTOPyyy", "stop": "STOP"});
    assert_eq!(content(&server, wanted).await, ("xxx".to_owned(), "stop".to_owned()));
}

/// 32 streams at once, each under a schema of its own, beside plain ones.
#[tokio::test]
async fn streams_at_once_hear_only_their_own() {
    let server = start(Setup::default()).await;
    let plain = |seed: u64| json!({"temperature": 1, "seed": seed, "max_tokens": 40});
    let alone = content(&server, plain(7)).await;
    let marked = |i: usize| {
        let schema = object(json!({"marker": {"const": format!("stream {i} {}", "x".repeat(i))},
            "n": {"type": "integer", "minimum": 0, "maximum": 9}}));
        json!({"response_format": format(&schema), "temperature": 1, "seed": i, "max_tokens": 300, "stream": true})
    };
    let mut lone = Vec::new();
    for i in [0, 31] {
        lone.push(text_of(&server, marked(i)).await);
    }
    let all = futures_util::future::join_all((0..32).map(|i| text_of(&server, marked(i))));
    let beside = futures_util::future::join_all((0..8).map(|_| content(&server, plain(7))));
    let (texts, beside) = tokio::join!(all, beside);
    for (i, text) in texts.iter().enumerate() {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text:?}"));
        assert_eq!(value["marker"], format!("stream {i} {}", "x".repeat(i)));
    }
    assert_eq!([&texts[0], &texts[31]], [&lone[0], &lone[1]]);
    assert!(beside.iter().all(|text| *text == alone));
    server.idle().await;
}

async fn text_of(server: &Server, patch: Value) -> String {
    let events = server.stream(CHAT, &chat(patch)).await.events().await;
    let piece = |event: &Value| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
    events.iter().filter_map(piece).collect()
}
