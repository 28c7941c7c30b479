//! Energy that the processors' packages used, where the system tells (Linux, Intel's and AMD's RAPL counters).

use std::fs;
use std::path::{Path, PathBuf};

/// Where Linux shows the counters.
const POWERCAP: &str = "/sys/class/powercap";

/// Counters as they were read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Energy {
    packages: Vec<Package>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    dir: PathBuf,
    microjoules: u64,
    /// The counter begins again at 0 behind it.
    most: u64,
}

impl Energy {
    /// Reads every package's counter; `None` where there is none or it may not be read.
    pub fn now() -> Option<Self> {
        Self::read(Path::new(POWERCAP))
    }

    fn read(above: &Path) -> Option<Self> {
        let mut packages = Vec::new();
        for entry in fs::read_dir(above).ok()?.flatten() {
            let dir = entry.path();
            // what is inside a package is counted in it
            let is_package = text(&dir.join("name")).is_some_and(|name| name.starts_with("package-"));
            if is_package {
                let number = |file: &str| text(&dir.join(file))?.parse::<u64>().ok();
                let (microjoules, most) = (number("energy_uj")?, number("max_energy_range_uj")?);
                packages.push(Package { dir, microjoules, most });
            }
        }
        (!packages.is_empty()).then_some(Self { packages })
    }

    /// Joules that were used since then.
    pub fn joules(&self) -> Option<f64> {
        let mut sum = 0.0;
        for package in &self.packages {
            let now: u64 = text(&package.dir.join("energy_uj"))?.parse().ok()?;
            let before = package.microjoules;
            let used = if now >= before { now - before } else { package.most.checked_sub(before)? + now };
            sum += used as f64 / 1e6;
        }
        Some(sum)
    }
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_added_up_and_counters_begin_again() {
        let above = std::env::temp_dir().join(format!("mainstay-energy-{}", std::process::id()));
        let put = |zone: &str, file: &str, text: &str| {
            fs::create_dir_all(above.join(zone)).unwrap();
            fs::write(above.join(zone).join(file), format!("{text}\n")).unwrap();
        };
        for (zone, name) in
            [("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")]
        {
            put(zone, "name", name);
            put(zone, "energy_uj", "9000000");
            put(zone, "max_energy_range_uj", "10000000");
        }
        let before = Energy::read(&above).unwrap();
        put("intel-rapl:0", "energy_uj", "9500000");
        put("intel-rapl:1", "energy_uj", "2000000");
        put("intel-rapl:0:0", "energy_uj", "9900000");
        assert_eq!(before.joules(), Some(0.5 + 3.0));
        fs::remove_file(above.join("intel-rapl:1/energy_uj")).unwrap();
        assert_eq!((before.joules(), Energy::read(&above)), (None, None));
        fs::remove_dir_all(&above).unwrap();
        assert_eq!(Energy::read(&above), None);
    }
}
