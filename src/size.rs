//! Numbers of bytes as people write and read them.

/// Reads `1536`, `64K`, `512MiB`, `2G`, `1.5GB`: a suffix without `i` before its `B` counts in thousands only when
/// it ends in `B`; bare letters and `iB` count in 1024s.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected bytes such as 512M, 2G or 1.5GiB, found `{text}`");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let suffix = suffix.trim().to_ascii_lowercase();
    let (base, letter) = match suffix.as_str() {
        "" | "b" => (1.0, ""),
        s => match s.strip_suffix("ib") {
            Some(letter) => (1024.0, letter),
            None => s.strip_suffix('b').map_or((1024.0, s), |letter| (1000.0, letter)),
        },
    };
    let power = match letter {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(wrong()),
    };
    let bytes = number * f64::powi(base, power);
    // 2^53: the largest range in which every integer has an f64
    if bytes.is_finite() && bytes < 9_007_199_254_740_992.0 { Ok(bytes as u64) } else { Err(wrong()) }
}

/// Three significant digits in units of 1024.
pub(crate) fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 { 0 } else { 1 };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let cases = [
            ("1536", 1536),
            ("64K", 64 << 10),
            ("512MiB", 512 << 20),
            ("2g", 2 << 30),
            ("1.5GiB", 3 << 29),
            ("1.5GB", 1_500_000_000),
            ("7b", 7),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1x", "1.2.3", "9999999T", "1 2"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        assert_eq!(show(999), "999 B");
        assert_eq!(show(1536), "1.5 KiB");
        assert_eq!(show(300 << 20), "300 MiB");
        assert_eq!(show(3 << 40), "3.0 TiB");
    }
}
