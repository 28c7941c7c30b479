//! Which files of a repository are the model: safetensors with what belongs to them, or one GGUF file of several.

use std::collections::BTreeMap;

/// Quantizations in the order in which one is taken where nobody says which: small without a visible loss first.
const PREFERRED: [&str; 8] = ["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F16", "F32"];

/// The files that make a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Safetensors, configuration, tokenizer, templates.
    Safetensors,
    /// The parts of one GGUF file, in order.
    Gguf(Vec<String>),
}

impl Choice {
    /// Whether a model is opened by this file.
    pub(super) fn needs(&self, path: &str) -> bool {
        match self {
            Choice::Safetensors => belongs(path),
            Choice::Gguf(parts) => parts.iter().any(|part| part == path),
        }
    }
}

/// Chooses among the names of a repository. `wanted` is the name of a GGUF file, or the name of a quantization.
///
/// # Errors
/// What was expected, and what there is.
pub(super) fn choose<'a>(
    names: impl Iterator<Item = &'a str> + Clone,
    wanted: Option<&str>,
) -> Result<Choice, String> {
    let files = gguf_files(names.clone());
    let list = || match files.is_empty() {
        true => "no GGUF file".to_owned(),
        false => files.keys().cloned().collect::<Vec<_>>().join(", "),
    };
    let one = |fits: &dyn Fn(&str) -> bool| {
        let mut found = files.iter().filter(|(name, _)| fits(name));
        match (found.next(), found.next()) {
            (Some((_, parts)), None) => Ok(Some(Choice::Gguf(parts.clone()))),
            (Some((a, _)), Some((b, _))) => Err(format!("{a} and {b}")),
            (None, _) => Ok(None),
        }
    };
    if let Some(wanted) = wanted {
        let found = match wanted.to_ascii_lowercase().ends_with(".gguf") {
            true => one(&|name| {
                name == whole_name(wanted) || name.rsplit('/').next() == Some(&whole_name(wanted))
            }),
            false => one(&|name| is_quantized(name, wanted)),
        };
        let found = found.map_err(|two| format!("expected one file `{wanted}`, found {two}"))?;
        return found.ok_or_else(|| format!("expected a file `{wanted}`, found {}", list()));
    }
    if names.clone().any(|name| belongs(name) && name.ends_with(".safetensors")) {
        return Ok(Choice::Safetensors);
    }
    if files.len() == 1 {
        return Ok(Choice::Gguf(files.into_values().next().unwrap_or_default()));
    }
    let preferred = PREFERRED.iter().find_map(|tag| one(&|name| is_quantized(name, tag)).ok().flatten());
    preferred.ok_or_else(|| match files.is_empty() {
        true => "expected model*.safetensors or a GGUF file, found neither".to_owned(),
        false => format!("expected the name of one GGUF file after `:`, found none; there are {}", list()),
    })
}

/// GGUF files by the name that they have, or would have in one part. Projectors of images are no models.
fn gguf_files<'a>(names: impl Iterator<Item = &'a str>) -> BTreeMap<String, Vec<String>> {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let is_model = |name: &&str| {
        let last = name.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
        last.ends_with(".gguf") && !last.contains("mmproj") && is_plain(name)
    };
    for name in names.filter(is_model) {
        files.entry(whole_name(name)).or_default().push(name.to_owned());
    }
    files.values_mut().for_each(|parts| parts.sort());
    files
}

/// `x.gguf` for `x-00002-of-00003.gguf`.
fn whole_name(name: &str) -> String {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let split = name.strip_suffix(".gguf").and_then(|stem| {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (rest, part) = rest.rsplit_once('-')?;
        (is_number(count) && is_number(part)).then(|| format!("{rest}.gguf"))
    });
    split.unwrap_or_else(|| name.to_owned())
}

/// Whether the name ends in this quantization, or the file lies in a directory of its name.
fn is_quantized(name: &str, tag: &str) -> bool {
    let (name, tag) = (name.to_ascii_lowercase(), tag.to_ascii_lowercase());
    // Not the end of another's name, such as K_M.
    let numbered = |kind: &&str| {
        tag.strip_prefix(*kind).is_some_and(|bits| bits.starts_with(|c: char| c.is_ascii_digit()))
    };
    if !["q", "iq", "tq", "f", "bf", "mxfp"].iter().any(numbered) {
        return false;
    }
    let mut parts = name.rsplit('/');
    let last = parts.next().unwrap_or_default();
    let stem = last.strip_suffix(".gguf").unwrap_or(last);
    let of_stem = stem
        .strip_suffix(tag.as_str())
        .is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_']));
    of_stem || parts.any(|directory| directory == tag)
}

/// Whether a model in safetensors is opened by this file: configuration, tokenizer, template, weights. Other formats
/// of the same weights lie in directories of their own or under other names.
fn belongs(path: &str) -> bool {
    if let Some(name) = path.strip_prefix("additional_chat_templates/") {
        return super::file_name(name) && name.ends_with(".jinja");
    }
    let weights = path.starts_with("model") && path.ends_with(".safetensors");
    super::file_name(path) && (weights || path.ends_with(".json") || path.ends_with(".jinja"))
}

/// Whether a path stays below its repository.
fn is_plain(path: &str) -> bool {
    path.split('/').all(super::file_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], wanted: Option<&str>) -> Result<Vec<String>, String> {
        let choice = choose(names.iter().copied(), wanted)?;
        Ok(names.iter().filter(|name| choice.needs(name)).map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn only_files_of_the_model_are_needed() {
        let needed = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "a.json"];
        let others = [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "onnx/config.json",
            "README.md",
            "../x.json",
            ".x.json",
        ];
        assert_eq!(chosen(&[needed.as_slice(), &others].concat(), None).unwrap(), needed);
    }

    #[test]
    fn a_quantization_or_a_name_picks_a_gguf_file() {
        let names = ["m-Q4_K_M.gguf", "m-q8_0.gguf", "m.IQ4_NL.gguf", "mmproj-F16.gguf", "config.json"];
        for (wanted, name) in [
            ("Q4_K_M", names[0]),
            ("q4_k_m", names[0]),
            ("Q8_0", names[1]),
            ("iq4_nl", names[2]),
            (names[1], names[1]),
        ] {
            assert_eq!(chosen(&names, Some(wanted)).unwrap(), [name], "{wanted}");
        }
        assert_eq!(chosen(&names, None).unwrap(), ["m-Q4_K_M.gguf"]);
        for wanted in ["Q4", "K_M", "F16", "other.gguf"] {
            let told = chosen(&names, Some(wanted)).unwrap_err();
            assert!(told.contains(wanted) && told.contains("m-Q4_K_M.gguf"), "{told}");
        }
    }

    #[test]
    fn parts_go_together() {
        let names = ["Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf", "F16/m-F16.gguf"];
        for wanted in ["q8_0", "Q8_0/m-00001-of-00002.gguf", "m-00001-of-00002.gguf"] {
            assert_eq!(chosen(&names, Some(wanted)).unwrap(), names[..2], "{wanted}");
        }
    }

    #[test]
    fn what_is_not_clear_is_asked() {
        assert!(chosen(&["README.md"], None).unwrap_err().contains("found neither"));
        assert!(chosen(&["a-X.gguf", "a-Y.gguf"], None).unwrap_err().contains("a-X.gguf, a-Y.gguf"));
        assert_eq!(chosen(&["a-X.gguf"], None).unwrap(), ["a-X.gguf"]);
        let told = chosen(&["a-Q8_0.gguf", "b-Q8_0.gguf"], Some("Q8_0")).unwrap_err();
        assert!(told.contains("a-Q8_0.gguf and b-Q8_0.gguf"), "{told}");
        assert!(chosen(&["../a-Q8_0.gguf"], None).is_err());
    }
}
