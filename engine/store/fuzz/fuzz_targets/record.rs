//! Any bytes to the entrance `record`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::record(data);
});
