//! What this machine has: memory that may be used and processor cores.

use std::fs;
use std::thread::available_parallelism;

/// Memory of the machine, narrowed to the container's limit where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All of it, bytes.
    pub(crate) total_bytes: u64,
    /// What can be taken without pushing anybody out, bytes.
    pub(crate) available_bytes: u64,
}

/// `None` where the system does not tell (other systems than Linux).
pub(crate) fn memory() -> Option<Memory> {
    let memory = parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    match (read("memory.max"), read("memory.current")) {
        (Some(max), Some(current)) => Some(narrow(memory, &max, &current)),
        _ => Some(memory),
    }
}

/// Threads that can run at the same time.
pub(crate) fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// The processor's name; `None` where the system does not tell.
pub(crate) fn cpu_name() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The processor's extensions that kernels use or may come to use.
pub(crate) fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! ask {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        ask!("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl");
        ask!("avx512vnni", "avx512bf16", "avx512fp16", "avxvnni");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! ask {
            ($($name:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })* };
        }
        ask!("neon", "fp16", "bf16", "dotprod", "i8mm", "sve", "sve2");
    }
    found
}

/// proc_meminfo(5): lines `Name:   number kB`.
fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Memory { total_bytes: field("MemTotal")?, available_bytes: field("MemAvailable")? })
}

/// cgroup v2: `memory.max` is a number of bytes or the word `max`.
fn narrow(memory: Memory, max: &str, current: &str) -> Memory {
    let (Ok(max), Ok(current)) = (max.trim().parse::<u64>(), current.trim().parse::<u64>()) else {
        return memory;
    };
    Memory {
        total_bytes: memory.total_bytes.min(max),
        available_bytes: memory.available_bytes.min(max.saturating_sub(current)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       24650000 kB\nMemFree:  100 kB\nMemAvailable:   20000000 kB\n";

    #[test]
    fn meminfo_is_read_in_bytes() {
        let memory = parse_meminfo(MEMINFO).unwrap();
        assert_eq!(memory, Memory { total_bytes: 24_650_000 * 1024, available_bytes: 20_000_000 * 1024 });
        assert_eq!(parse_meminfo("MemTotal: 12 kB\n"), None);
    }

    #[test]
    fn a_container_limit_narrows() {
        let memory = parse_meminfo(MEMINFO).unwrap();
        assert_eq!(narrow(memory, "max\n", "5\n"), memory);
        let narrowed = narrow(memory, "1000\n", "400\n");
        assert_eq!(narrowed, Memory { total_bytes: 1000, available_bytes: 600 });
        assert_eq!(narrow(memory, "1000\n", "4000\n").available_bytes, 0);
    }
}
