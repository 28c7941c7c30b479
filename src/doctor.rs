//! `mainstay doctor`: what this machine has, which backends it can use, and whether the built-in model answers.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use mainstay_backend_candle::CandleBackend;
use mainstay_bench::Peaks;
use serde_json::{Value, json};

use crate::bench;
use crate::client::{RemoteArgs, Route, SamplingArgs};
use crate::local::Connection;
use crate::options::{EngineArgs, HubArgs, ModelArgs, switch};
use crate::{data_dir, machine, size, start};

/// Options of `mainstay doctor`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DoctorArgs {
    /// Print JSON.
    #[arg(long, env = "MAINSTAY_JSON", value_parser = switch())]
    json: bool,
    /// The directory to look at; the user's data directory without it.
    #[arg(long, env = "MAINSTAY_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Everything that was found out.
struct Report {
    cpu: String,
    features: Vec<&'static str>,
    memory: Option<machine::Memory>,
    peaks: Peaks,
    /// Name, and what it runs on or why it cannot be used.
    backends: Vec<(&'static str, Result<String, String>)>,
    data_dir: Result<PathBuf, String>,
    model: Result<Hello, String>,
}

/// The built-in model's answer to a greeting.
struct Hello {
    device: String,
    ready_ms: u128,
    text: String,
}

/// Looks at the machine for about two seconds.
///
/// # Errors
/// After printing the report, if the built-in model does not answer.
pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let report = examine(args)?;
    if args.json {
        println!("{:#}", report.json());
    } else {
        print!("{}", report.text());
    }
    match report.model {
        Ok(_) => Ok(()),
        Err(why) => bail!("the built-in model does not answer: {why}"),
    }
}

fn examine(args: &DoctorArgs) -> Result<Report> {
    let cpu = start::backend(&args.engine).map(|b| start::device_name(&*b)).map_err(|e| format!("{e:#}"));
    let threads = start::threads(&args.engine);
    let later = || Err("not in this version".to_owned());
    let dir = data_dir::resolve(args.data_dir.as_deref()).ok_or_else(|| "no HOME is set".to_owned());
    let dir = dir.and_then(|dir| match data_dir::prepare(&dir) {
        Ok(()) => Ok(dir),
        Err(error) => Err(format!("{error:#}")),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let model = runtime.block_on(hello(&args.engine)).map_err(|e| format!("{e:#}"));
    runtime.shutdown_background();
    Ok(Report {
        cpu: machine::cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        features: machine::cpu_features(),
        memory: machine::memory(),
        peaks: bench::peaks(threads),
        backends: vec![
            ("cpu", cpu),
            ("candle", Ok(start::device_name(&CandleBackend::best()))),
            ("cuda", later()),
            ("neuron", later()),
        ],
        data_dir: dir,
        model,
    })
}

async fn hello(engine: &EngineArgs) -> Result<Hello> {
    let start = Instant::now();
    let model = ModelArgs { model: None, hub: HubArgs::default(), engine: engine.clone() };
    let remote = RemoteArgs { url: None, api_key: None };
    let connection = Connection::open(&remote, &model, None).await?;
    let ready_ms = start.elapsed().as_millis();
    let mut body = SamplingArgs::default().fields();
    body.insert("messages".into(), json!([{"role": "user", "content": "Hello!"}]));
    body.insert("max_tokens".into(), json!(32));
    let mut text = String::new();
    let take = |piece: &str| {
        text.push_str(piece);
        Ok(())
    };
    connection.client.stream(Route::Chat, body, take).await?;
    Ok(Hello { device: connection.device.clone().unwrap_or_default(), ready_ms, text })
}

impl Report {
    fn text(&self) -> String {
        let memory = self.memory.map_or_else(
            || "unknown".to_owned(),
            |m| format!("{}, {} of it free", size::show(m.total_bytes), size::show(m.available_bytes)),
        );
        let mut lines = vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
            ("processor", format!("{}, {} threads", self.cpu, machine::cores())),
            ("features", self.features.join(" ")),
            ("memory", memory),
            ("measured", bench::describe(&self.peaks)),
        ];
        for (name, state) in &self.backends {
            lines.push(("backend", state.clone().unwrap_or_else(|why| format!("{name}: {why}"))));
        }
        lines.push((
            "data dir",
            self.data_dir.as_ref().map_or_else(String::clone, |d| format!("{}, writable", d.display())),
        ));
        lines.push(("hub cache", hf_hub::resolve_cache_dir().display().to_string()));
        lines.push((
            "model",
            match &self.model {
                Ok(h) => {
                    format!("built-in, ready in {} ms on {}, says: {}", h.ready_ms, h.device, h.text.trim())
                }
                Err(why) => why.clone(),
            },
        ));
        lines.iter().map(|(name, value)| format!("{name:<10} {value}\n")).collect()
    }

    fn json(&self) -> Value {
        let backends = self.backends.iter().map(|(name, state)| match state {
            Ok(device) => json!({"name": name, "available": true, "device": device}),
            Err(why) => json!({"name": name, "available": false, "reason": why}),
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "os": std::env::consts::OS,
            "arch": std::env::consts::ARCH,
            "cpu": {"name": self.cpu, "threads": machine::cores(), "features": self.features},
            "memory": self.memory.map(|m| json!({"total_bytes": m.total_bytes, "available_bytes": m.available_bytes})),
            "read_bytes_per_s": self.peaks.read_bytes_per_s,
            "fma_flops_per_s": self.peaks.fma_flops_per_s,
            "backends": backends.collect::<Vec<_>>(),
            "data_dir": match &self.data_dir {
                Ok(dir) => json!({"path": dir, "writable": true}),
                Err(why) => json!({"writable": false, "reason": why}),
            },
            "hub_cache": hf_hub::resolve_cache_dir(),
            "model": match &self.model {
                Ok(h) => json!({"answers": true, "ready_ms": h.ready_ms, "device": h.device, "text": h.text}),
                Err(why) => json!({"answers": false, "reason": why}),
            },
        })
    }
}
