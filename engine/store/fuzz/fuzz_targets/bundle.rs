//! Any bytes to the entrance `bundle`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mainstay_store::fuzz::bundle(data);
});
