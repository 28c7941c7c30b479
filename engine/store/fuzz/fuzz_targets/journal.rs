//! Any bytes to the entrance `journal`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::journal(data);
});
