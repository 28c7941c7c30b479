#!/usr/bin/env python3
"""Counts the instructions of fixed pieces of work and compares them with a baseline: more than 3 % up fails.

Counts do not depend on what else runs. They are those of one thread on AVX2, since valgrind knows no AVX-512, and
depend on the compiler and the C library, which stand in the baseline's name; where there is none for this machine's, or
no valgrind, or no AVX2, it says so and passes.

    benches/instructions/check.py              # compares
    benches/instructions/check.py --accept     # makes what is counted now the baseline
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ISA = "avx2"
# A count may rise by this part.
LIMIT = 0.03
# What the program ends with where the processor lacks the instruction set.
UNSUPPORTED = 3


def skip(why):
    print(f"instructions: not counted: {why}")
    sys.exit(0)


def build():
    """The program, built as the gate builds: without incremental compilation, which inlines otherwise."""
    command = ["cargo", "build", "--release", "--workspace", "--example", "instructions",
               "--message-format=json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CARGO_INCREMENTAL": "0"}, stdout=subprocess.PIPE,
                          text=True, check=True)
    built = [json.loads(line) for line in done.stdout.splitlines()]
    return next(m["executable"] for m in reversed(built) if m.get("executable"))


def versions():
    text = subprocess.run(["rustc", "--version"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return f"rustc-{text.split()[1]}-{'-'.join(part or 'libc' for part in platform.libc_ver())}"


def count(program, name):
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no",
               "--toggle-collect=*measured*", program, name]
    done = subprocess.run(command, env={**os.environ, "MAINSTAY_CPU": ISA}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    found = re.search(r"Collected\s*:\s*(\d+)", done.stderr)
    if done.returncode == UNSUPPORTED:
        skip(f"{ISA}: {done.stderr.splitlines()[-1] if done.stderr else 'not on this processor'}")
    if done.returncode != 0 or not found or int(found[1]) == 0:
        sys.exit(f"instructions: {name}: expected a count, found status {done.returncode}:\n{done.stderr}")
    return int(found[1])


def judged(now, before):
    """A line for each name, and those that are more than the limit above the baseline."""
    worse = []
    for name in list(now) + [name for name in before if name not in now]:
        if name not in now or name not in before:
            change, mark = "new" if name in now else "gone", "differs"
        else:
            part = now[name] / before[name] - 1
            change, mark = f"{100 * part:+.2f} %", "more" if part > LIMIT else ""
        if mark:
            worse.append(name)
        print(f"{name:<32} {before.get(name, '-'):>12} {now.get(name, '-'):>12} {change:>10} {mark}".rstrip())
    return worse


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="write the baseline")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        skip("there is no valgrind (apt-get install valgrind)")
    if platform.machine() != "x86_64":
        skip(f"the baseline is one of x86_64, and this is {platform.machine()}")
    name = versions()
    path = ROOT / "benches/instructions" / f"{name}.json"
    if not args.accept and not path.exists():
        skip(f"there is no baseline for {name} (--accept makes one)")
    program = build()
    names = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    now = {name: count(program, name) for name in names}
    if args.accept:
        path.write_text(json.dumps(now, indent=2) + "\n")
        print(f"instructions: {path.relative_to(ROOT)} has {len(now)} counts")
        return
    worse = judged(now, json.loads(path.read_text()))
    if worse:
        sys.exit(f"instructions: {len(worse)} above the baseline by more than {100 * LIMIT:.0f} %, or not in it: "
                 f"{'; '.join(worse)}\naccept with: benches/instructions/check.py --accept")
    print(f"instructions: {len(now)} counts within {100 * LIMIT:.0f} % of {path.name}")


if __name__ == "__main__":
    main()
