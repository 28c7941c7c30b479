//! One checkpoint, opened: everything that is known of a model before a device sees it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::LoadError;
use crate::config::Config;
use crate::families;
use crate::file;
use crate::gguf;
use crate::graph::Graph;
use crate::sentence;
use crate::template::{ChatTemplate, Sources};
use crate::tokenizer::Tokenizer;
use crate::weights::{AtLoad, Weights};

/// Sampling defaults of `generation_config.json`; `None` where the file is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// Tokens that end a text (of generation_config.json, else of config.json, else the tokenizer's).
    pub eos: Vec<u32>,
    /// 0 where the file says `do_sample: false`.
    pub temperature: Option<f32>,
    /// Most probable tokens kept.
    pub top_k: Option<usize>,
    /// Probability mass kept.
    pub top_p: Option<f32>,
    /// Least relative probability kept.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// A checkpoint in the Hugging Face layout.
pub struct Model {
    /// Last part of the directory's path, or `mainstay-default`.
    pub name: String,
    /// The program.
    pub graph: Graph,
    /// Its weights, checked against the graph.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Its defaults.
    pub generation: Generation,
    /// What its small files say, as hashes.
    pub hashes: Hashes,
}

/// Hashes (BLAKE3) of what makes a model besides its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashes {
    /// The graph that the configuration makes, whole: what no op sees does not count.
    pub config: [u8; 32],
    /// tokenizer.json.
    pub tokenizer: [u8; 32],
    /// The chat templates and the configuration of the tokenizer, which names the tokens in them.
    pub template: [u8; 32],
}

impl Hashes {
    fn of(files: &Files, graph: &Graph) -> Self {
        let mut template = blake3::Hasher::new();
        for file in [&files.tokenizer_config, &files.template, &files.tool_template] {
            let bytes = file.as_deref().unwrap_or_default();
            template.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        }
        Self {
            // Numbers are shown with all their digits, so that graphs of equal text are equal.
            config: *blake3::hash(format!("{graph:?}").as_bytes()).as_bytes(),
            tokenizer: *blake3::hash(&files.tokenizer).as_bytes(),
            template: *template.finalize().as_bytes(),
        }
    }
}

impl Model {
    /// Opens a directory with config.json, safetensors, tokenizer.json and, where present, tokenizer_config.json,
    /// chat_template.jinja, generation_config.json and the files of sentence-transformers; or a `.gguf` file, or the
    /// first of several.
    ///
    /// # Errors
    /// [`LoadError`], naming the file and what in it is at fault.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            true => Self::from_gguf(path, gguf::open(path)?),
            false => Self::open_dir(path),
        }
    }

    /// A `.gguf` file that lies in memory; `origin` stands for its path in messages.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_gguf_bytes(origin: &Path, bytes: Vec<u8>) -> Result<Self, LoadError> {
        Self::from_gguf(origin, gguf::from_bytes(origin, bytes)?)
    }

    fn from_gguf(path: &Path, found: gguf::Checkpoint) -> Result<Self, LoadError> {
        let files = Files {
            dir: path.to_owned(),
            config: found.config,
            tokenizer: found.tokenizer,
            tokenizer_config: Some(found.tokenizer_config),
            generation: Some(found.generation),
            template: None,
            tool_template: None,
        };
        let config = Config::from_bytes(&files.path("config.json"), &files.config)?;
        let mut graph = families::graph(&config)?;
        if let (Some(kind), Some(pooled)) = (found.pooling, &mut graph.pooled) {
            sentence::pool_by(pooled, kind);
        }
        let name = path.file_stem().map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned());
        Self::assemble(name, files, config, graph, found.weights)
    }

    fn open_dir(dir: &Path) -> Result<Self, LoadError> {
        let files = Files::read(dir)?;
        // The configuration first: its errors are cheaper to find than those of gigabytes of weights.
        let config = Config::from_bytes(&files.path("config.json"), &files.config)?;
        let mut graph = families::graph(&config)?;
        sentence::apply(dir, &mut graph)?;
        let mut weights = Weights::open_dir(dir)?;
        weights.define_quantized(&config)?;
        Self::assemble(name(dir), files, config, graph, weights)
    }

    /// The small model that is part of the binary (`models/default/`).
    ///
    /// # Errors
    /// None, unless the binary was built with a broken one.
    pub fn embedded() -> Result<Self, LoadError> {
        let files = Files {
            dir: PathBuf::from("models/default"),
            config: include_bytes!("../default/config.json").to_vec(),
            tokenizer: include_bytes!("../default/tokenizer.json").to_vec(),
            tokenizer_config: Some(include_bytes!("../default/tokenizer_config.json").to_vec()),
            generation: Some(include_bytes!("../default/generation_config.json").to_vec()),
            template: None,
            tool_template: None,
        };
        let config = Config::from_bytes(&files.path("config.json"), &files.config)?;
        let graph = families::graph(&config)?;
        let weights: &'static [u8] = include_bytes!("../default/model.safetensors");
        let weights = Weights::from_bytes(&files.path("model.safetensors"), weights)?;
        Self::assemble("mainstay-default".to_owned(), files, config, graph, weights)
    }

    /// Says that weights were quantized at load: keys and values are others than those of the stored weights.
    pub fn quantized_at_load(&mut self, quant: AtLoad) {
        let mut config = blake3::Hasher::new();
        config.update(&self.hashes.config).update(quant.name().as_bytes());
        self.hashes.config = *config.finalize().as_bytes();
    }

    fn assemble(
        name: String,
        files: Files,
        config: Config,
        graph: Graph,
        weights: Weights,
    ) -> Result<Self, LoadError> {
        graph.check(&weights)?;
        let path = files.path("tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(&path, &files.tokenizer)?;
        let (vocab, found) = (graph.vocab, tokenizer.vocab_len());
        if found > vocab {
            let what =
                format!("expected token ids below the model's vocab_size {vocab}, found {}", found - 1);
            return Err(LoadError::format(&path, what));
        }
        let tokens = files.tokenizer_config()?;
        let generation = generation(&files, &config, &tokens, &tokenizer, vocab)?;
        let template = ChatTemplate::find(files.sources(&tokens)?)?;
        let hashes = Hashes::of(&files, &graph);
        Ok(Self { name, graph, weights, tokenizer, template, generation, hashes })
    }
}

/// The last part of a directory's path, looked up on disk where the path ends in `.` or `..`.
fn name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let last = dir.file_name().or_else(|| full.file_name());
    last.map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

/// The small files of a checkpoint, whole.
struct Files {
    dir: PathBuf,
    config: Vec<u8>,
    tokenizer: Vec<u8>,
    tokenizer_config: Option<Vec<u8>>,
    generation: Option<Vec<u8>>,
    template: Option<Vec<u8>>,
    tool_template: Option<Vec<u8>>,
}

impl Files {
    fn read(dir: &Path) -> Result<Self, LoadError> {
        let small = |name: &str| file::read_optional(&dir.join(name), file::CONFIG_BYTES_MAX);
        Ok(Self {
            dir: dir.to_owned(),
            config: file::read(&dir.join("config.json"), file::CONFIG_BYTES_MAX)?,
            tokenizer: file::read(&dir.join("tokenizer.json"), file::TOKENIZER_BYTES_MAX)?,
            tokenizer_config: small("tokenizer_config.json")?,
            generation: small("generation_config.json")?,
            template: small("chat_template.jinja")?,
            tool_template: small("additional_chat_templates/tool_use.jinja")?,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `tokenizer_config.json`, empty where there is none.
    fn tokenizer_config(&self) -> Result<Config, LoadError> {
        let bytes = self.tokenizer_config.as_deref().unwrap_or(b"{}");
        Config::from_bytes(&self.path("tokenizer_config.json"), bytes)
    }

    /// The chat templates: files of their own come before those inside tokenizer_config.json.
    fn sources<'a>(&'a self, tokens: &'a Config) -> Result<Sources<'a>, LoadError> {
        let text = |name: &str, bytes: &'a Option<Vec<u8>>| match bytes.as_deref().map(str::from_utf8) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(e)) => Err(LoadError::format(&self.path(name), format!("expected UTF-8, found {e}"))),
        };
        Ok(Sources {
            path: self.path("chat_template.jinja"),
            file: text("chat_template.jinja", &self.template)?,
            tool_file: text("additional_chat_templates/tool_use.jinja", &self.tool_template)?,
            config: tokens,
        })
    }
}

/// A special token of tokenizer_config.json: a text, or an object with `content`.
pub(crate) fn special_token(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn generation(
    files: &Files,
    config: &Config,
    tokens: &Config,
    tokenizer: &Tokenizer,
    vocab: usize,
) -> Result<Generation, LoadError> {
    let bytes = files.generation.as_deref().unwrap_or(b"{}");
    let defaults = Config::from_bytes(&files.path("generation_config.json"), bytes)?;
    let mut eos = defaults.token_ids("eos_token_id", vocab)?;
    if eos.is_empty() {
        eos = config.token_ids("eos_token_id", vocab)?;
    }
    if eos.is_empty() {
        eos.extend(tokens.get("eos_token").and_then(special_token).and_then(|t| tokenizer.id(t)));
    }
    let number = |key: &str, range| Ok::<_, LoadError>(defaults.number(key, range)?.map(|n: f64| n as f32));
    let temperature = match defaults.flag("do_sample", true)? {
        true => number("temperature", 0.0..=1e3)?,
        false => Some(0.0),
    };
    Ok(Generation {
        eos,
        temperature,
        top_k: defaults.count("top_k", 0..=usize::MAX)?,
        top_p: number("top_p", 0.0..=1.0)?,
        min_p: number("min_p", 0.0..=1.0)?,
        repetition_penalty: number("repetition_penalty", 1e-3..=1e3)?,
    })
}

/// The tokens that templates know by name: every string or `{"content": ...}` of tokenizer_config.json whose key
/// ends in `_token`, and the lists of further ones.
pub(crate) fn special_tokens(config: &Config) -> Map<String, Value> {
    let named = |key: &str| key.ends_with("_token");
    let entries = config.entries().filter(|(key, _)| named(key));
    entries.filter_map(|(key, v)| Some((key.clone(), special_token(v)?.into()))).collect()
}
