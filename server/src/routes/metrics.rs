//! GET /metrics: Prometheus' text format, vLLM's names for what vLLM counts.

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use mainstay_engine::Stats;

use super::{App, Shared, sessions};
use crate::error::ApiError;
use crate::metrics::{ModelMetrics, Page};
use crate::registry::Shown;

/// A number that the engine keeps: name, kind, help, value.
pub(super) type Number = (&'static str, &'static str, &'static str, fn(&Stats) -> f64);

const NUMBERS: [Number; 11] = [
    ("vllm:num_requests_running", "gauge", "Sequences that have pages.", |s| s.running as f64),
    ("vllm:num_requests_waiting", "gauge", "Sequences not yet started.", |s| s.waiting as f64),
    ("vllm:kv_cache_usage_perc", "gauge", "Share of pages in use by sequences, 0 to 1.", |s| {
        if s.pages_total == 0 { 0.0 } else { s.pages_used as f64 / s.pages_total as f64 }
    }),
    ("vllm:prompt_tokens_total", "counter", "Prompt tokens, computed or found.", |s| s.prompt_tokens as f64),
    ("vllm:generation_tokens_total", "counter", "Tokens generated.", |s| s.generated_tokens as f64),
    ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in cached pages.", |s| {
        s.cached_tokens as f64
    }),
    ("vllm:num_preemptions_total", "counter", "Sequences preempted.", |s| s.preemptions as f64),
    ("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens guessed ahead.", |s| {
        s.drafted_tokens as f64
    }),
    ("vllm:spec_decode_num_accepted_tokens_total", "counter", "Of these, drawn.", |s| {
        s.draft_kept_tokens as f64
    }),
    ("mainstay_steps_total", "counter", "Steps of the engine.", |s| s.steps as f64),
    ("mainstay_pages_total", "gauge", "Pages that can be given out.", |s| s.pages_total as f64),
];

type Times = (&'static str, &'static str, fn(&ModelMetrics) -> &crate::metrics::Histogram);

const TIMES: [Times; 2] = [
    ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", |m| &m.first_token),
    ("vllm:inter_token_latency_seconds", "Between tokens of a choice.", |m| &m.between_tokens),
];

/// A number of a model, loaded or not.
type Told = fn(&Shown) -> f64;

pub(super) async fn get(State(app): Shared) -> Result<impl IntoResponse, ApiError> {
    // The store's numbers stand behind its locks.
    let page = tokio::task::spawn_blocking(move || page(&app)).await;
    let page = page.map_err(|_| ApiError::internal("the metrics could not be read"))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page))
}

/// Of every model of the list, loaded or not.
fn of_list(page: &mut Page, app: &App) {
    let numbers: [(&str, &str, &str, Told); 3] = [
        ("mainstay_model_loaded", "gauge", "1 while the model is loaded.", |model| {
            f64::from(u8::from(model.state == "loaded"))
        }),
        ("mainstay_model_loads_total", "counter", "Times that the model was loaded.", |model| {
            model.loads as f64
        }),
        ("mainstay_model_load_failures_total", "counter", "Times that it could not be.", |model| {
            model.failures as f64
        }),
    ];
    let shown = app.registry.shown();
    let shown: Vec<&Shown> = shown.iter().filter(|model| model.parent.is_none()).collect();
    for (name, kind, help, value) in numbers {
        page.family(name, kind, help);
        for model in &shown {
            page.sample(name, &[("model_name", &model.id)], value(model));
        }
    }
}

fn page(app: &App) -> String {
    let models = app.registry.list();
    let stats: Vec<Stats> = models.iter().map(|model| model.served.engine.stats()).collect();
    let named = || models.iter().map(|model| model.id.as_str());
    let mut page = Page::default();
    let of_store = app.sessions.iter().flat_map(|_| sessions::metrics::ENGINE);
    for (name, kind, help, value) in NUMBERS.into_iter().chain(of_store) {
        page.family(name, kind, help);
        for (model, stats) in named().zip(&stats) {
            page.sample(name, &[("model_name", model)], value(stats));
        }
    }
    page.family("mainstay_pages", "gauge", "Pages by state: in use, holding a known prefix, free.");
    for (model, stats) in named().zip(&stats) {
        let free = stats.pages_total.saturating_sub(stats.pages_used + stats.pages_cached);
        for (state, pages) in [("used", stats.pages_used), ("cached", stats.pages_cached), ("free", free)] {
            page.sample("mainstay_pages", &[("model_name", model), ("state", state)], pages as f64);
        }
    }
    for (name, help, times) in TIMES {
        page.family(name, "histogram", help);
        for (model, id) in models.iter().zip(named()) {
            page.histogram(name, id, times(&model.metrics));
        }
    }
    page.family("vllm:request_success_total", "counter", "Choices by how they ended.");
    for (model, id) in models.iter().zip(named()) {
        page.outcomes("vllm:request_success_total", id, &model.metrics);
    }
    page.family(
        "mainstay_kv_page_late_total",
        "counter",
        "Answers that did not wait any longer for their pages to be written.",
    );
    for (model, id) in models.iter().zip(named()) {
        page.sample("mainstay_kv_page_late_total", &[("model_name", id)], model.metrics.late_pages() as f64);
    }
    let name = "mainstay_exactness_state_total";
    page.family(name, "counter", "Prompts by what was reused of their keys and values.");
    for (model, id) in models.iter().zip(named()) {
        for (state, count) in model.metrics.kv_states() {
            page.sample(name, &[("model_name", id), ("state", state.name())], count as f64);
        }
    }
    of_list(&mut page, app);
    page.family("mainstay_requests_total", "counter", "HTTP requests answered.");
    for ((route, status), count) in app.http.snapshot() {
        let labels = [("route", route.as_str()), ("status", &status.to_string())];
        page.sample("mainstay_requests_total", &labels, count as f64);
    }
    let stats: Vec<(String, Stats)> = named().map(str::to_owned).zip(stats).collect();
    sessions::metrics::add(&mut page, app, &stats);
    page.family("mainstay_build_info", "gauge", "Always 1; the version is a label.");
    page.sample("mainstay_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    page.finish()
}
