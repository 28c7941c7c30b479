//! Any bytes to the entrance `small_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::small_file(data);
});
