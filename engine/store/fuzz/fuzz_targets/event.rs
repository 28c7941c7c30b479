//! Any bytes to the entrance `event`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::event(data);
});
