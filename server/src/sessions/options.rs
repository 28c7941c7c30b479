//! How an answer was generated, as it stands beside its tokens: enough to make the same text of them, and to go on.

use mainstay_engine::SamplingRequest;
use mainstay_models::tokenizer::ShowSpecial;
use serde_json::{Value, json};

use crate::grammar::Wanted;
use crate::job::Job;
use crate::openai::options::{GenerationOptions, ShowStop};
use crate::output::Output;

/// What of a job is recorded.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    pub(crate) options: GenerationOptions,
    pub(crate) output: Output,
    /// The most tokens of the answer; there is always a number once it has begun.
    pub(crate) max_tokens: usize,
    pub(crate) logprobs: Option<usize>,
    pub(crate) include_usage: bool,
    /// What the answer is held to.
    pub(crate) constraint: Option<Wanted>,
}

/// Resolved: the seed and the model's defaults of that time are in it.
pub(crate) fn write(job: &Job, include_usage: bool) -> Value {
    let options = &job.options;
    let sampling = &options.sampling;
    json!({
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias,
        "seed": sampling.seed,
        "stop_tokens": options.stop_tokens,
        "own_stop_tokens": options.own_stop_tokens,
        "stop_strings": options.stop_strings,
        "min_tokens": options.min_tokens,
        "show_special": options.show_special == ShowSpecial::Yes,
        "show_stop": options.show_stop == ShowStop::Yes,
        "return_token_ids": options.return_token_ids,
        "priority": options.priority,
        "max_tokens": job.most_tokens(0),
        "logprobs": job.logprobs,
        "include_usage": include_usage,
        "output": job.output.to_json(),
        "constraint": job.constraint.as_ref().map(|compiled| compiled.wanted().to_json()),
    })
}

/// `None` where it is not what [`write`] writes.
pub(crate) fn read(value: &Value) -> Option<Recorded> {
    let number = |key: &str| value[key].as_f64().map(|number| number as f32);
    let count = |key: &str| value[key].as_u64().and_then(|count| usize::try_from(count).ok());
    let ids = |key: &str| serde_json::from_value::<Vec<u32>>(value[key].clone()).ok();
    let flag = |key: &str| value[key].as_bool();
    let sampling = SamplingRequest {
        temperature: number("temperature")?,
        top_k: count("top_k")?,
        top_p: number("top_p")?,
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
        presence_penalty: number("presence_penalty")?,
        frequency_penalty: number("frequency_penalty")?,
        logit_bias: serde_json::from_value(value["logit_bias"].clone()).ok()?,
        seed: value["seed"].as_u64()?,
    };
    let options = GenerationOptions {
        choices: 1,
        sampling,
        stop_tokens: ids("stop_tokens")?,
        own_stop_tokens: ids("own_stop_tokens")?,
        stop_strings: serde_json::from_value(value["stop_strings"].clone()).ok()?,
        min_tokens: count("min_tokens")?,
        show_special: if flag("show_special")? { ShowSpecial::Yes } else { ShowSpecial::No },
        show_stop: if flag("show_stop")? { ShowStop::Yes } else { ShowStop::No },
        return_token_ids: flag("return_token_ids")?,
        // Absent where an older version wrote it.
        priority: value["priority"].as_i64().and_then(|number| i32::try_from(number).ok()).unwrap_or(0),
    };
    let constraint = match &value["constraint"] {
        Value::Null => None,
        constraint => Some(Wanted::of_json(constraint)?),
    };
    let (max_tokens, logprobs) = (count("max_tokens")?, count("logprobs"));
    let output = Output::of_json(&value["output"])?;
    let include_usage = flag("include_usage")?;
    Some(Recorded { options, output, max_tokens, logprobs, include_usage, constraint })
}
