//! BERT: an encoder that turns a text into one row, or scores a pair of texts (arXiv 1810.04805, 1908.10084).

use crate::LoadError;
use crate::config::Config;
use crate::families::decoder::{self, CONTEXT_MAX, HEADS_MAX, HIDDEN_MAX, INNER_MAX, LAYERS_MAX, VOCAB_MAX};
use crate::graph::{
    Activation, Attend, Block, Graph, Ids, Layer, Mask, Matrix, Op, PoolKind, Pooled, PooledKind, RopeSwitch,
    Value, Vector,
};

/// Segments beyond this are not a model's.
const SEGMENTS_MAX: usize = 1 << 10;

/// What a checkpoint's head makes of the rows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Head {
    Embedding,
    /// One number for a pair, passed through this.
    Score(Option<Activation>),
}

struct Bert {
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    vocab: usize,
    context: usize,
    segments: usize,
    eps: f32,
    activation: Activation,
    /// Before the names of all weights but the classifier's.
    prefix: &'static str,
    head: Head,
}

pub(super) fn graph(config: &Config) -> Result<Graph, LoadError> {
    Ok(Bert::read(config)?.graph())
}

impl Bert {
    fn read(config: &Config) -> Result<Self, LoadError> {
        let (prefix, head) = match architecture(config)? {
            None | Some("BertModel") => ("", Head::Embedding),
            Some("BertForMaskedLM" | "BertForPreTraining") => ("bert.", Head::Embedding),
            Some("BertForSequenceClassification") => ("bert.", Head::Score(score_activation(config)?)),
            Some(_) => {
                let known = "BertModel, BertForMaskedLM, BertForPreTraining or BertForSequenceClassification";
                return Err(config.wrong("architectures", known));
            }
        };
        if config.text("position_embedding_type")?.is_some_and(|kind| kind != "absolute") {
            return Err(config.wrong("position_embedding_type", "absolute"));
        }
        if config.flag("is_decoder", false)? {
            return Err(config.wrong("is_decoder", "false (BERT as a decoder is not supported)"));
        }
        let hidden = config.required("hidden_size", 1..=HIDDEN_MAX)?;
        let heads = config.required("num_attention_heads", 1..=HEADS_MAX)?;
        if !hidden.is_multiple_of(heads) {
            return Err(config.wrong("num_attention_heads", &format!("a divisor of hidden_size {hidden}")));
        }
        let least_segments = if head == Head::Embedding { 1 } else { 2 };
        Ok(Self {
            hidden,
            heads,
            inner: config.required("intermediate_size", 1..=INNER_MAX)?,
            layers: config.required("num_hidden_layers", 1..=LAYERS_MAX)?,
            vocab: config.required("vocab_size", 1..=VOCAB_MAX)?,
            context: config.count("max_position_embeddings", 1..=CONTEXT_MAX)?.unwrap_or(512),
            // The second text of a pair has a segment of its own.
            segments: config.count("type_vocab_size", least_segments..=SEGMENTS_MAX)?.unwrap_or(2),
            eps: config.number("layer_norm_eps", 0.0..=1.0)?.unwrap_or(1e-12) as f32,
            activation: decoder::activation(config, "hidden_act", "gelu")?,
            prefix,
            head,
        })
    }

    fn graph(&self) -> Graph {
        let layer = |i| Layer { block: 0, prefix: format!("{}encoder.layer.{i}.", self.prefix) };
        Graph {
            family: "bert",
            prologue: self.prologue(),
            blocks: vec![self.layer()],
            layers: (0..self.layers).map(layer).collect(),
            epilogue: Block::default(),
            pooled: Some(self.pooled()),
            kv: Vec::new(),
            hidden: self.hidden,
            vocab: self.vocab,
            context: self.context,
            rope_switch: RopeSwitch::default(),
        }
    }

    fn prologue(&self) -> Block {
        let mut block = Block::default();
        let name = |table: &str| format!("{}embeddings.{table}", self.prefix);
        let mut embed = |ids, table, rows| {
            let weight = Matrix::one(name(table), rows, self.hidden);
            block.push(Op::Embed { ids, weight })
        };
        let words = embed(Ids::Token, "word_embeddings.weight", self.vocab);
        let segments = embed(Ids::Segment, "token_type_embeddings.weight", self.segments);
        let positions = embed(Ids::Position, "position_embeddings.weight", self.context);
        let rows = block.push(Op::Add { a: words, b: segments });
        let rows = block.push(Op::Add { a: rows, b: positions });
        self.norm(&mut block, rows, &name("LayerNorm"));
        block
    }

    /// Attention and MLP, each with its norm after the sum.
    fn layer(&self) -> Block {
        let mut block = Block::default();
        let input = block.push(Op::Input);
        let rows = self.attention(&mut block, input);
        let rows = block.push(Op::Add { a: input, b: rows });
        let input = self.norm(&mut block, rows, "attention.output.LayerNorm");
        let rows = linear(&mut block, input, "intermediate.dense", (self.inner, self.hidden));
        let rows = block.push(Op::Activate { input: rows, f: self.activation });
        let rows = linear(&mut block, rows, "output.dense", (self.hidden, self.inner));
        let rows = block.push(Op::Add { a: input, b: rows });
        self.norm(&mut block, rows, "output.LayerNorm");
        block
    }

    fn attention(&self, block: &mut Block, input: Value) -> Value {
        let names = |suffix: &str| {
            ["query", "key", "value"].map(|n| (format!("attention.self.{n}.{suffix}"), self.hidden)).to_vec()
        };
        let weight = Matrix { parts: names("weight"), cols: self.hidden };
        let bias = Some(Vector::named(names("bias")));
        let qkv = block.push(Op::Linear { input, weight, bias });
        let [q, k, v] = [0, 1, 2]
            .map(|i| block.push(Op::Slice { input: qkv, start: i * self.hidden, width: self.hidden }));
        let head_dim = self.hidden / self.heads;
        let rows = block.push(Op::Attend(Attend {
            q,
            k,
            v,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5) as f32,
            mask: Mask::Full,
            softcap: None,
            sinks: None,
        }));
        linear(block, rows, "attention.output.dense", (self.hidden, self.hidden))
    }

    fn norm(&self, block: &mut Block, input: Value, name: &str) -> Value {
        let vector = |part| Vector::one(format!("{name}.{part}"), self.hidden);
        block.push(Op::LayerNorm { input, weight: vector("weight"), bias: vector("bias"), eps: self.eps })
    }

    fn pooled(&self) -> Pooled {
        let mut block = Block::default();
        let rows = block.push(Op::Input);
        match self.head {
            Head::Embedding => {
                // As sentence-transformers pools a checkpoint that does not say how.
                let rows = block.push(Op::Pool { input: rows, kind: PoolKind::Mean });
                block.push(Op::Normalize { input: rows });
                Pooled { kind: PooledKind::Embedding, block, width: self.hidden }
            }
            Head::Score(f) => {
                let rows = block.push(Op::Pool { input: rows, kind: PoolKind::First });
                let name = format!("{}pooler.dense", self.prefix);
                let rows = linear(&mut block, rows, &name, (self.hidden, self.hidden));
                let rows = block.push(Op::Activate { input: rows, f: Activation::Tanh });
                let rows = linear(&mut block, rows, "classifier", (1, self.hidden));
                if let Some(f) = f {
                    block.push(Op::Activate { input: rows, f });
                }
                Pooled { kind: PooledKind::Score, block, width: 1 }
            }
        }
    }
}

fn linear(block: &mut Block, input: Value, name: &str, (rows, cols): (usize, usize)) -> Value {
    let weight = Matrix::one(format!("{name}.weight"), rows, cols);
    let bias = Some(Vector::one(format!("{name}.bias"), rows));
    block.push(Op::Linear { input, weight, bias })
}

/// The first of `architectures`.
fn architecture(config: &Config) -> Result<Option<&str>, LoadError> {
    let Some(names) = config.get("architectures") else { return Ok(None) };
    let first = names.as_array().and_then(|names| names.first()).and_then(|name| name.as_str());
    first.map(Some).ok_or_else(|| config.wrong("architectures", "a list of names"))
}

/// What a cross-encoder's number passes through: the sigmoid, unless the checkpoint names another.
fn score_activation(config: &Config) -> Result<Option<Activation>, LoadError> {
    let labels = match config.object("id2label")? {
        Some(labels) => labels.entries().count(),
        None => config.count("num_labels", 1..=usize::MAX)?.unwrap_or(2),
    };
    if labels != 1 {
        let key = if config.get("id2label").is_some() { "id2label" } else { "num_labels" };
        return Err(
            config.wrong(key, "one label (of classifiers only cross-encoders for reranking are supported)")
        );
    }
    let nested = config.object("sentence_transformers")?;
    let (part, key) = match &nested {
        Some(part) => (part, "activation_fn"),
        None => (config, "sbert_ce_default_activation_function"),
    };
    match part.text(key)?.map(|name| name.rsplit('.').next().unwrap_or(name)) {
        None | Some("Sigmoid") => Ok(Some(Activation::Sigmoid)),
        Some("Identity") => Ok(None),
        Some(_) => {
            Err(part.wrong(key, "torch.nn.modules.activation.Sigmoid or torch.nn.modules.linear.Identity"))
        }
    }
}
