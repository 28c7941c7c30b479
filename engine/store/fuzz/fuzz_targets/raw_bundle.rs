//! Any bytes to the entrance `raw_bundle`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::raw_bundle(data);
});
