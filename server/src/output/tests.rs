//! The formats, whole and cut at every place.

use super::*;

fn output(reasoning: ReasoningFormat, tools: ToolFormat) -> Output {
    Output {
        format: Format { reasoning, tools },
        names: ["get_weather", "now"].map(str::to_owned).into(),
        seed: "seed".into(),
        ..Output::plain()
    }
}

/// The parts of a text that comes in pieces, neighbours of one kind joined.
fn parts(output: &Output, pieces: &[&str]) -> Vec<Part> {
    let mut parser = Parser::new(output, 0);
    let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    parts.extend(parser.finish());
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Part::Text(text)), Part::Text(more)) => *text += &more,
            (Some(Part::Reasoning(text)), Part::Reasoning(more)) => *text += &more,
            (Some(Part::CallArguments { text, index }), Part::CallArguments { text: more, index: other }) => {
                assert_eq!(*index, other);
                *text += &more;
            }
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// The message of a text, which must be the same however it is cut.
#[track_caller]
fn message(output: &Output, text: &str) -> Message {
    let whole = parts(output, &[text]);
    let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let letters: Vec<&str> = borders.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
    assert_eq!(parts(output, &letters), whole, "letter by letter: {text:?}");
    for (at, &i) in borders.iter().enumerate() {
        assert_eq!(parts(output, &[&text[..i], &text[i..]]), whole, "cut at {i}: {text:?}");
        for &j in borders[at..].iter().step_by(3) {
            let pieces = [&text[..i], &text[i..j], &text[j..]];
            assert_eq!(parts(output, &pieces), whole, "cut at {i}, {j}: {text:?}");
        }
    }
    let mut message = Message::default();
    message.extend(&whole);
    message
}

/// What is expected of a text: its content, its reasoning, its calls.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, &'a str)]);

#[track_caller]
fn check(output: &Output, cases: &[Case<'_>]) {
    for (text, content, reasoning, calls) in cases {
        let found = message(output, text);
        let found_calls: Vec<(&str, &str)> =
            found.calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!((found.content.as_str(), found.reasoning.as_str()), (*content, *reasoning), "{text:?}");
        assert_eq!(found_calls, *calls, "{text:?}");
    }
}

const NO: ReasoningFormat = ReasoningFormat::None;
const PARIS: (&str, &str) = ("get_weather", r#"{"city": "Paris"}"#);

#[test]
fn without_a_format_all_is_text() {
    let plain = output(NO, ToolFormat::None);
    for text in ["", "a", " <think>x</think> ", "<tool_call>{}</tool_call>\n"] {
        check(&plain, &[(text, text, "", &[])]);
    }
}

#[test]
fn thoughts_stand_between_tags() {
    let think = output(ReasoningFormat::Think, ToolFormat::None);
    check(
        &think,
        &[
            ("<think>\nHm, 日本.\n</think>\n\nYes. </think>", "Yes. </think>", "Hm, 日本.", &[]),
            ("  <think>a</think>b", "b", "a", &[]),
            ("<think></think>b", "b", "", &[]),
            ("no <think>thought</think>", "no <think>thought</think>", "", &[]),
            (" <thin", " <thin", "", &[]),
            ("<think>cut </thi", "", "cut </thi", &[]),
            ("<think>a\n\nb", "", "a\n\nb", &[]),
            ("<think>only</think>\n", "", "only", &[]),
        ],
    );
    let open = think.clone().after("<|im_start|>assistant\n<think>\n");
    check(
        &open,
        &[
            ("Hm.\n</think>\n\nYes.", "Yes.", "Hm.", &[]),
            ("<think>\nHm.</think>Yes.", "Yes.", "Hm.", &[]),
            ("cut", "", "cut", &[]),
        ],
    );
    assert_eq!((open.opened_with(), think.after("x").opened_with()), (Some("<think>"), None));
    let brackets = output(ReasoningFormat::Mistral, ToolFormat::Mistral);
    check(
        &brackets,
        &[(r#"[THINK]a[/THINK][TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}"#, "", "a", &[PARIS])],
    );
    let hidden =
        Output { show_reasoning: ShowReasoning::No, ..output(ReasoningFormat::Think, ToolFormat::None) };
    check(&hidden, &[("<think>a</think>b", "b", "", &[])]);
}

#[test]
fn hermes_writes_tags() {
    let hermes = output(ReasoningFormat::Think, ToolFormat::Hermes);
    let nested = r#"{"a": {"b": ["}", "\"</tool_call>", {}]}, "é": "🦀"}"#;
    let deep = format!("<tool_call>{{\"arguments\": {nested}, \"name\": \"now\"}}</tool_call>");
    check(
        &hermes,
        &[
            (
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
                "",
                "",
                &[PARIS],
            ),
            (
                "<think>\nI must look.\n</think>\n\nLet me see.\n<tool_call>{\"name\":\"get_weather\",\"arguments\":{\"city\": \
                 \"Paris\"}}</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}</tool_call>\n",
                "Let me see.",
                "I must look.",
                &[PARIS, ("now", "{}")],
            ),
            // Names after their arguments, names the request has not offered, arguments inside a string, or none.
            (&deep, "", "", &[("now", nested)]),
            (r#"<tool_call>{"name": "other"}</tool_call>"#, "", "", &[("other", "{}")]),
            (
                r#"<tool_call>{"name": "now", "arguments": "{\"x\": 1}", "id": 7}</tool_call>"#,
                "",
                "",
                &[("now", r#"{"x": 1}"#)],
            ),
            (r#"<tool_call>{"name": "now", "arguments": null}</tool_call>"#, "", "", &[("now", "{}")]),
            (
                "<tool_call>{\"name\": \"now\"}\n{\"name\": \"now\"}</tool_call>",
                "",
                "",
                &[("now", "{}"), ("now", "{}")],
            ),
            // Text after a call.
            (r#"<tool_call>{"name": "now"}</tool_call> Done."#, " Done.", "", &[("now", "{}")]),
            // Cut inside the arguments: what came of them.
            (r#"<tool_call>{"name": "now", "arguments": {"x": "日"#, "", "", &[("now", r#"{"x": "日"#)]),
            // No calls.
            ("a <tool_cal", "a <tool_cal", "", &[]),
            ("<tool_call>", "<tool_call>", "", &[]),
            (r#"<tool_call>{"name": "now""#, r#"<tool_call>{"name": "now""#, "", &[]),
            ("<tool_call>soon</tool_call>", "<tool_call>soon</tool_call>", "", &[]),
            (r#"<tool_call>{"name": 3}</tool_call>"#, r#"<tool_call>{"name": 3}</tool_call>"#, "", &[]),
            (r#"<tool_call>{"x": 3}</tool_call>"#, r#"<tool_call>{"x": 3}</tool_call>"#, "", &[]),
            (
                r#"<tool_call>{"name": "now", "arguments": [1]}"#,
                r#"<tool_call>{"name": "now", "arguments": [1]}"#,
                "",
                &[],
            ),
            // A broken call before a whole one.
            (
                r#"<tool_call>{no<tool_call>{"name": "now"}</tool_call>"#,
                "<tool_call>{no",
                "",
                &[("now", "{}")],
            ),
            ("<tool_call><tool_call>{\"name\": \"now\"}", "<tool_call>", "", &[("now", "{}")]),
            ("only text \n", "only text \n", "", &[]),
        ],
    );
}

#[test]
fn llama_writes_an_object() {
    let llama = output(NO, ToolFormat::Llama3Json);
    let paris = r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#;
    let two = format!("{paris}; {paris}");
    let tagged = format!("Look: <|python_tag|>{paris}");
    let unknown = r#"{"name": "Ann", "parameters": {"age": 3}}"#;
    let marked = format!("<|python_tag|>{unknown}");
    check(
        &llama,
        &[
            (paris, "", "", &[PARIS]),
            (&two, "", "", &[PARIS, PARIS]),
            (&tagged, "Look:", "", &[PARIS]),
            (&marked, "", "", &[("Ann", r#"{"age": 3}"#)]),
            (r#"{"type": "function", "name": "now", "parameters": {}}"#, "", "", &[("now", "{}")]),
            // JSON that is an answer.
            (unknown, unknown, "", &[]),
            (r#"{"name": "now"}"#, r#"{"name": "now"}"#, "", &[]),
            (" {\"a\": [1, 2.5], \"b\": true }\n", " {\"a\": [1, 2.5], \"b\": true }\n", "", &[]),
            ("{", "{", "", &[]),
            ("<|python_tag|>print(1)", "<|python_tag|>print(1)", "", &[]),
            ("<|python", "<|python", "", &[]),
        ],
    );
}

#[test]
fn mistral_writes_a_marker() {
    let mistral = output(NO, ToolFormat::Mistral);
    let call = r#"{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}"#;
    let array = format!("[TOOL_CALLS] [{call}, {call}]");
    let named = r#"Well. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]x1[ARGS] {}"#;
    check(
        &mistral,
        &[
            (&array, "", "", &[PARIS, PARIS]),
            (named, "Well.", "", &[PARIS, ("now", "{}")]),
            (r#"[TOOL_CALLS]get_weather{"city": "Paris"}"#, "", "", &[PARIS]),
            (r#"[TOOL_CALLS]get_weather[ARGS]{"city": "Pa"#, "", "", &[("get_weather", r#"{"city": "Pa"#)]),
            ("[TOOL_CALLS]get_weather[ARGS]", "[TOOL_CALLS]get_weather[ARGS]", "", &[]),
            ("[TOOL_CALLS] not a call", "[TOOL_CALLS] not a call", "", &[]),
            ("[TOOL_CALLS] [3]", "[TOOL_CALLS] [3]", "", &[]),
            (r#"{"name": "now", "arguments": {}}"#, r#"{"name": "now", "arguments": {}}"#, "", &[]),
            ("see [TOOL", "see [TOOL", "", &[]),
        ],
    );
}

#[test]
fn json_alone_is_a_call_of_a_function_that_is_offered() {
    let json = output(NO, ToolFormat::Json);
    let call = r#"{"name": "get_weather", "arguments": {"city": "Paris"}}"#;
    let array = format!("\n[{call},\n {call}]\n");
    let fenced = format!("```json\n{call}\n```");
    let partly = format!("[{call}, {{\"x\": 1}}]");
    check(
        &json,
        &[
            (call, "", "", &[PARIS]),
            (&array, "", "", &[PARIS, PARIS]),
            (&fenced, "", "", &[PARIS]),
            (&partly, ", {\"x\": 1}]", "", &[PARIS]),
            ("[1, 2]", "[1, 2]", "", &[]),
            ("```rust\nfn main() {}\n```", "```rust\nfn main() {}\n```", "", &[]),
            ("```json\n{\"a\": 1}\n```", "```json\n{\"a\": 1}\n```", "", &[]),
            ("``", "``", "", &[]),
            ("Sure: {}", "Sure: {}", "", &[]),
        ],
    );
}

#[test]
fn gemma_writes_code_or_json() {
    let gemma = output(NO, ToolFormat::Gemma);
    check(
        &gemma,
        &[
            (
                "```tool_code\nprint(get_weather(city=\"Paris\"))\n```",
                "",
                "",
                &[("get_weather", r#"{"city":"Paris"}"#)],
            ),
            (
                "Let me see.\n```tool_code\nx = get_weather(city='Pa\\'ris', days=-2, at=[1.5, None], o={'k': True})\nnow()\n```",
                "Let me see.",
                "",
                &[
                    ("get_weather", r#"{"city":"Pa'ris","days":-2,"at":[1.5,null],"o":{"k":true}}"#),
                    ("now", "{}"),
                ],
            ),
            ("```tool_code\n[now(), now()]", "", "", &[("now", "{}"), ("now", "{}")]),
            (
                "```tool_code\n{\"name\": \"now\", \"parameters\": {\"x\": 1}}\n```",
                "",
                "",
                &[("now", r#"{"x":1}"#)],
            ),
            (r#"{"name": "get_weather", "parameters": {"city": "Paris"}}"#, "", "", &[PARIS]),
            ("```json\n{\"name\": \"now\", \"parameters\": {}}\n```\n", "", "", &[("now", "{}")]),
            // Code that is no call: operators, positions, text.
            ("```tool_code\n1 + 1\n```", "```tool_code\n1 + 1\n```", "", &[]),
            ("```tool_code\nnow(3)\n```!", "```tool_code\nnow(3)\n```!", "", &[]),
            ("```tool", "```tool", "", &[]),
            ("plain", "plain", "", &[]),
        ],
    );
}

#[test]
fn harmony_writes_messages() {
    let harmony = output(ReasoningFormat::Harmony, ToolFormat::Harmony);
    check(
        &harmony,
        &[
            (
                "<|channel|>analysis<|message|>Think é.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>",
                "Hi!",
                "Think é.",
                &[],
            ),
            (
                "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>First.<|end|>\
                 <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \
                 \"Paris\"}<|call|>",
                "First.",
                "A",
                &[PARIS],
            ),
            // The recipient before the channel, no arguments, a second call.
            (
                " to=functions.now<|channel|>commentary json<|message|><|call|><|start|>assistant to=functions.get_weather\
                 <|channel|>commentary<|message|>{\"city\": \"Paris\"}",
                "",
                "",
                &[("now", "{}"), PARIS],
            ),
            (
                "<|channel|>final<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B",
                "A\n\nB",
                "",
                &[],
            ),
            ("<|channel|>final<|mess", "", "", &[]),
            ("no channels", "no channels", "", &[]),
            ("<|chan", "<|chan", "", &[]),
            ("<|channel|>analysis<|message|>cut<|e", "", "cut<|e", &[]),
        ],
    );
    let long = format!("<|channel|>{}<|message|>x", "y".repeat(600));
    check(&harmony, &[(&long, &long, "", &[])]);
    let calls_off = output(ReasoningFormat::Harmony, ToolFormat::None);
    check(
        &calls_off,
        &[(
            "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary \
             to=functions.now<|message|>{}<|call|>",
            "{}",
            "A",
            &[],
        )],
    );
}

#[test]
fn arguments_come_as_they_are_written() {
    let mut parser = Parser::new(&output(NO, ToolFormat::Hermes), 0);
    assert_eq!(parser.push(r#"<tool_call>{"name": "now", "arg"#), []);
    let begun = parser.push(r#"uments": {"a""#);
    let id = match &begun[0] {
        Part::CallBegin { index: 0, id, name } if name == "now" => id.clone(),
        other => panic!("{other:?}"),
    };
    assert!(id.starts_with("call_") && id.len() == 29, "{id}");
    assert_eq!(begun[1..], [Part::CallArguments { index: 0, text: r#"{"a""#.to_owned() }]);
    assert_eq!(parser.push(": 1"), [Part::CallArguments { index: 0, text: ": 1".to_owned() }]);
    assert_eq!(parser.push("}}</tool"), [Part::CallArguments { index: 0, text: "}".to_owned() }]);
    assert_eq!(parser.finish(), [Part::Text("</tool".to_owned())]);
}

#[test]
fn ids_follow_from_the_seed_the_choice_and_the_place() {
    let text = r#"<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now"}</tool_call>"#;
    let ids = |output: &Output, choice: usize| {
        let mut parser = Parser::new(output, choice);
        let mut message = Message::default();
        message.extend(&parser.push(text));
        message.calls.into_iter().map(|call| call.id).collect::<Vec<_>>()
    };
    let output = output(NO, ToolFormat::Hermes);
    let again = Output::of_json(&output.to_json()).unwrap();
    assert_eq!(again, output);
    assert_eq!(ids(&output, 0), ids(&again, 0));
    let other = Output { seed: "other".into(), ..output.clone() };
    let mut all = [ids(&output, 0), ids(&output, 1), ids(&other, 0)].concat();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 6);
}

#[test]
fn random_texts_lose_nothing_and_do_not_depend_on_their_pieces() {
    const WORDS: [&str; 34] = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        "[",
        "]",
        "\"name\"",
        ":",
        "\"now\"",
        ",",
        "\"arguments\"",
        "\"",
        "\\",
        " ",
        "\n",
        "<think>",
        "</think>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "now",
        "```",
        "tool_code",
        "json\n",
        "<|channel|>",
        "analysis",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        "to=functions.now",
        "(",
        ")",
        "é🦀",
        "1",
    ];
    let formats = [
        ToolFormat::Hermes,
        ToolFormat::Llama3Json,
        ToolFormat::Mistral,
        ToolFormat::Gemma,
        ToolFormat::Json,
        ToolFormat::Harmony,
    ];
    // SplitMix64 (Steele, Lea, Flood 2014).
    let mut state = 1u64;
    let mut random = |bound: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    };
    for round in 0..3000 {
        let tools = formats[round % formats.len()];
        let reasoning =
            if tools == ToolFormat::Harmony { ReasoningFormat::Harmony } else { ReasoningFormat::Think };
        let output = output(reasoning, tools);
        let text: String = (0..1 + random(14)).map(|_| WORDS[random(WORDS.len())]).collect();
        let found = parts(&output, &[&text]);
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(parts(&output, &letters), found, "{tools:?} {text:?}");
        let mut all = Message::default();
        all.extend(&found);
        if all.calls.is_empty() && tools != ToolFormat::Harmony && !text.contains("think>") {
            assert_eq!(all.content, text, "{tools:?}");
        }
    }
}
