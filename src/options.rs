//! The options that choose a model, a device and the engine's limits, shared by every command that loads a model.

use anyhow::Result;
use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use mainstay_engine::{DraftPolicy, RestorePolicy};

use crate::hub::Reach;
use crate::size;
use crate::source::Source;

/// Which backend runs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendChoice {
    /// The fastest of this machine.
    Auto,
    /// Own kernels for processors.
    Cpu,
    /// The reference: slow, simple.
    Candle,
    /// NVIDIA GPUs: not in this version.
    Cuda,
    /// AWS Trainium: not in this version.
    Neuron,
}

/// What --quant makes of weights.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuantChoice {
    /// 8 bits.
    Q8,
    /// 4 bits.
    Q4,
}

impl From<QuantChoice> for mainstay_models::weights::AtLoad {
    fn from(choice: QuantChoice) -> Self {
        match choice {
            QuantChoice::Q8 => Self::Q8,
            QuantChoice::Q4 => Self::Q4,
        }
    }
}

/// Element type of stored keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvType {
    /// f32 for checkpoints in f32, bf16 otherwise.
    Auto,
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes, more digits and less range.
    F16,
    /// 1 byte, with a scale for each row of a head.
    Q8,
}

/// Whether stored keys and values are read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreChoice {
    /// Where that is faster than computing them again, by what was measured here.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl From<RestoreChoice> for RestorePolicy {
    fn from(choice: RestoreChoice) -> Self {
        match choice {
            RestoreChoice::Auto => Self::Auto,
            RestoreChoice::Always => Self::Always,
            RestoreChoice::Never => Self::Never,
        }
    }
}

/// What is asked of a hub.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Hub")]
pub(crate) struct HubArgs {
    /// Revision of the model on the hub: a branch, a tag or a commit.
    #[arg(long, env = "MAINSTAY_REVISION", value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Ask no hub: use what was fetched before. HF_HUB_OFFLINE=1 does the same.
    #[arg(long, env = "MAINSTAY_OFFLINE", value_parser = switch())]
    pub(crate) offline: bool,
}

impl HubArgs {
    /// Where files may come from. The variable is read as the hub's own clients read it.
    pub(crate) fn reach(&self) -> Reach {
        let told = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        let is_offline = self.offline || ["1", "ON", "YES", "TRUE"].contains(&told.as_str());
        if is_offline { Reach::Cache } else { Reach::Hub }
    }
}

/// Whether tokens are guessed ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DraftChoice {
    /// Where that is faster, by what was measured here.
    Auto,
    /// Never.
    Off,
}

impl From<DraftChoice> for DraftPolicy {
    fn from(choice: DraftChoice) -> Self {
        match choice {
            DraftChoice::Auto => Self::Auto,
            DraftChoice::Off => Self::Off,
        }
    }
}

/// Where the model comes from and what runs it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    /// A directory in Hugging Face layout, a .gguf file, or a hub id org/name[:FILE.gguf][@revision]; the small built-in
    /// model without it.
    #[arg(env = "MAINSTAY_MODEL")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

impl ModelArgs {
    /// Where the model comes from.
    ///
    /// # Errors
    /// [`crate::exit::Usage`] for what cannot be a model.
    pub(crate) fn source(&self) -> Result<Source> {
        Source::parse(self.model.as_deref())?.told(&self.hub)
    }
}

/// Device and limits of one engine.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// What runs the model.
    #[arg(long, env = "MAINSTAY_BACKEND", value_enum, default_value = "auto")]
    pub(crate) backend: BackendChoice,
    /// Threads of the cpu backend; one for each physical core without it.
    #[arg(long, env = "MAINSTAY_THREADS", value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Kernel path of the cpu backend (avx512vnni, avx512, avx2, neon, scalar); the best that the processor has without it.
    #[arg(long, env = "MAINSTAY_CPU", value_name = "PATH")]
    pub(crate) cpu: Option<String>,
    /// Element type of stored keys and values.
    #[arg(long, env = "MAINSTAY_KV_TYPE", value_enum, default_value = "auto")]
    pub(crate) kv_type: KvType,
    /// Quantize floating-point weights when they are loaded: q8 (Q8_0) or q4 (Q4_K, Q6_K for the vocabulary product).
    #[arg(long, env = "MAINSTAY_QUANT", value_enum)]
    pub(crate) quant: Option<QuantChoice>,
    /// Longest sequence in tokens; what the model was made for, or what memory holds, without it.
    #[arg(long, env = "MAINSTAY_CONTEXT", value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
    /// Memory for keys and values, such as 512M or 4G; what is left beside the weights without it.
    #[arg(long, env = "MAINSTAY_KV_MEMORY", value_name = "BYTES", value_parser = size::parse)]
    pub(crate) kv_memory: Option<u64>,
    /// Most tokens computed in one step, prompts and answers together.
    #[arg(long, env = "MAINSTAY_TOKENS_PER_STEP", value_name = "TOKENS", default_value_t = 256)]
    pub(crate) tokens_per_step: usize,
    /// Most sequences in one step.
    #[arg(long, env = "MAINSTAY_MAX_SEQUENCES", value_name = "N", default_value_t = 128)]
    pub(crate) max_sequences: usize,
    /// Most sequences that wait for their first step; further requests are refused with 429.
    #[arg(long, env = "MAINSTAY_MAX_WAITING", value_name = "N", default_value_t = 256)]
    pub(crate) max_waiting: usize,
    /// Whether stored keys and values are read back.
    #[arg(long, env = "MAINSTAY_RESTORE", value_enum, default_value = "auto")]
    pub(crate) restore: RestoreChoice,
    /// Whether tokens are guessed ahead, so that one step draws several. Answers are the same either way.
    #[arg(long, env = "MAINSTAY_DRAFT", value_enum, default_value = "auto")]
    pub(crate) draft: DraftChoice,
    /// A smaller model of the same vocabulary that guesses: a directory in Hugging Face layout or a GGUF file. Without it a
    /// guess is what stood behind the same words before.
    #[arg(long, env = "MAINSTAY_DRAFT_MODEL", value_name = "PATH")]
    pub(crate) draft_model: Option<std::path::PathBuf>,
    /// Read all weights again to prove which model they are, instead of trusting sizes and times of their files.
    #[arg(long, env = "MAINSTAY_VERIFY_WEIGHTS", value_parser = switch())]
    pub(crate) verify_weights: bool,
    /// Leaves room for adapters.
    #[arg(skip)]
    pub(crate) takes_adapters: bool,
}

/// What every command takes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "General")]
pub(crate) struct GeneralArgs {
    /// A TOML file with any of these options as keys.
    #[arg(long, env = "MAINSTAY_CONFIG", value_name = "FILE", global = true)]
    pub(crate) config: Option<std::path::PathBuf>,
    /// What is logged to stderr: error, warn, info, debug, trace, or filters such as mainstay_server=debug.
    #[arg(long, env = "MAINSTAY_LOG_LEVEL", value_name = "LEVEL", global = true)]
    pub(crate) log_level: Option<String>,
    /// Log more: -v debug, -vv trace.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
}

/// A switch that the environment and a file may set with true, yes, on, 1 and their opposites.
pub(crate) fn switch() -> BoolishValueParser {
    BoolishValueParser::new()
}
