//! The tokenizer of a shape: a token for each byte, and for every other row of the vocabulary a word that shows its
//! number, so that any token that is drawn is text.

use serde_json::{Map, Value, json};

/// Bytes that are tokens.
const BYTES: usize = 256;
/// The token that ends a text.
pub(super) const END: usize = BYTES;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Roles and texts between marks, as Qwen and others have them.
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// tokenizer.json of so many tokens.
pub(super) fn tokenizer(vocab: usize) -> Value {
    let mut words = Map::new();
    for byte in 0..=u8::MAX {
        words.insert(shown(byte).to_string(), json!(byte));
    }
    for (at, text) in (END..).zip(SPECIAL) {
        words.insert(text.to_owned(), json!(at));
    }
    for id in BYTES + SPECIAL.len()..vocab {
        words.insert(format!("{}{id:x}", shown(b' ')), json!(id));
    }
    let added = (END..).zip(SPECIAL).map(|(id, content)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    });
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": Value::Null, "padding": Value::Null, "normalizer": Value::Null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "post_processor": Value::Null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": Value::Null, "unk_token": Value::Null, "continuing_subword_prefix": Value::Null,
            "end_of_word_suffix": Value::Null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": words, "merges": []
        }
    })
}

/// tokenizer_config.json.
pub(super) fn config(context: usize) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
        "clean_up_tokenization_spaces": false, "eos_token": SPECIAL[0], "chat_template": TEMPLATE
    })
}

/// How byte-level vocabularies write a byte (GPT-2): itself where it is a visible character of Latin-1, else one of the
/// characters from 256 on, in order.
fn shown(byte: u8) -> char {
    let visible = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !visible(b)).count();
    char::from_u32(256 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn bytes_are_written_as_elsewhere_and_no_token_stands_twice() {
        assert_eq!((shown(b'\n'), shown(b' '), shown(b'a'), shown(0xFF)), ('Ċ', 'Ġ', 'a', 'ÿ'));
        let made = tokenizer(1000);
        let ids: HashSet<u64> =
            made["model"]["vocab"].as_object().unwrap().values().filter_map(Value::as_u64).collect();
        assert_eq!(ids.len(), 1000);
        assert_eq!((ids.iter().min(), ids.iter().max()), (Some(&0), Some(&999)));
    }
}
