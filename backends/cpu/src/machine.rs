//! What this machine offers: physical cores and memory, within what the process may use.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Physical cores that the process may run on: two threads of one core share its arithmetic units, so more gain
/// nothing. Where the system does not tell cores from threads, the threads.
pub(crate) fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match cores_of(Path::new("/sys/devices/system/cpu"), allowed_cpus()) {
        Some(cores) => cores.clamp(1, allowed),
        None => allowed,
    }
}

/// Distinct (package, core) pairs of the CPUs in `allowed`, or of all.
fn cores_of(dir: &Path, allowed: Option<BTreeSet<usize>>) -> Option<usize> {
    let mut cores = BTreeSet::new();
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let name = entry.file_name();
        let Some(cpu) = name.to_str().and_then(|n| n.strip_prefix("cpu")).and_then(|n| n.parse().ok()) else {
            continue;
        };
        if allowed.as_ref().is_some_and(|a| !a.contains(&cpu)) {
            continue;
        }
        let read = |what: &str| fs::read_to_string(entry.path().join("topology").join(what)).ok();
        if let (Some(package), Some(core)) = (read("physical_package_id"), read("core_id")) {
            cores.insert((package.trim().to_owned(), core.trim().to_owned()));
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// The CPUs that the process may be scheduled on.
fn allowed_cpus() -> Option<BTreeSet<usize>> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    parse_cpu_list(status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"))?.trim())
}

/// Reads `0-3,8,10-11`.
fn parse_cpu_list(list: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        // A mask has a few thousand bits at most; more is not a list of CPUs.
        cpus.extend(first..=last.min(first + 0xffff));
    }
    Some(cpus)
}

/// Memory of the machine or of the control group, whichever is less; `None` where the system does not tell.
pub(crate) fn memory_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| parse_meminfo(&text, "MemTotal:"));
    let group =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    machine.into_iter().chain(group).min()
}

/// Bytes that can be taken without pushing anybody out, of the machine or of the control group, whichever is less;
/// `None` where the system does not tell.
pub(crate) fn available_bytes() -> Option<u64> {
    let machine = parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:");
    let group = |name: &str| {
        let text = fs::read_to_string(Path::new("/sys/fs/cgroup").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let left = || Some(group("memory.max")?.saturating_sub(group("memory.current")?));
    machine.into_iter().chain(left()).min()
}

fn parse_meminfo(text: &str, field: &str) -> Option<u64> {
    let found = text.lines().find_map(|l| l.strip_prefix(field))?;
    found.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(parse_cpu_list("0-2,5"), Some(BTreeSet::from([0, 1, 2, 5])));
        assert_eq!(parse_cpu_list("x"), None);
        let text = "MemFree: 1 kB\nMemTotal:       24 kB\nMemAvailable: 3 kB\n";
        assert_eq!(parse_meminfo(text, "MemTotal:"), Some(24 * 1024));
        assert_eq!(parse_meminfo(text, "MemAvailable:"), Some(3 * 1024));
        assert_eq!(parse_meminfo(text, "Swap:"), None);
        assert!(physical_cores() >= 1);
    }

    #[test]
    fn threads_of_a_core_count_once() {
        let dir = std::env::temp_dir().join(format!("mainstay-topology-{}", std::process::id()));
        for (cpu, core) in [(0, 0), (1, 1), (2, 0), (3, 1)] {
            let topology = dir.join(format!("cpu{cpu}/topology"));
            fs::create_dir_all(&topology).unwrap();
            fs::write(topology.join("physical_package_id"), "0\n").unwrap();
            fs::write(topology.join("core_id"), format!("{core}\n")).unwrap();
        }
        assert_eq!(cores_of(&dir, None), Some(2));
        assert_eq!(cores_of(&dir, Some(BTreeSet::from([0, 2]))), Some(1));
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(cores_of(&dir, None), None);
    }
}
