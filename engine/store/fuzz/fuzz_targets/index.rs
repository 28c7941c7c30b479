//! Any bytes to the entrance `index`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::index(data);
});
