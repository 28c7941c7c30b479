#!/usr/bin/env python3
"""`mainstay bench latency` and a peer on the same cells of the same files, in turn, with ratios.

A model of random weights in a real one's shape is written once as a directory in Hugging Face layout (`mainstay bench
shape`) and once for each type as a GGUF file (`mainstay quantize`). Both programs load the same file and stay loaded; for
each cell in each round one runs, then the other, and the order changes from round to round. What counts is the median
of the rounds' ratios. A round before them decides what a peer does best for each cell (llama.cpp: flash attention on or
off), and warms up. Tokens are numbers: there is no tokenizer. The peers draw no tokens from their logits; Mainstay does.

    benches/peers/setup.sh
    target/peers-venv/bin/python benches/peers/compare.py --types q4_k_m --cells decode@0x1 --rounds 5

Cells: prefill@DEPTH, decode@DEPTHxSEQUENCES. A prefill computes 512 tokens (--prompt), a decode 32 steps (--gen).
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CELLS = "prefill@0,decode@0x1,decode@4096x1,prefill@4096,decode@0x8,decode@0x32"
TYPES = "q4_k_m,q8_0,bf16"
# Of each peer: how it is started, and which models it reads.
PEERS = {
    "llama.cpp": ([sys.executable, str(HERE / "llama_cpp_cells.py")], "gguf"),
    "transformers": ([sys.executable, str(HERE / "transformers_cells.py")], "directory"),
}


def tell(what):
    print(what, file=sys.stderr, flush=True)


def ticks(pids):
    """Processor ticks of the machine (all, busy) and of these processes; children that ended count too."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    own = 0
    for pid in pids:
        rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        own += int(rest[11]) + int(rest[12])
    return sum(fields), sum(fields) - fields[3] - fields[4], own


class Program:
    """A program that says in one line what it is, and answers each line that names a cell with one of JSON."""

    def __init__(self, name, command):
        self.name, self.command = name, command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            hint = " (an instruction that is not there: PEERS_AMX=off benches/peers/setup.sh may help)" if status == -4 else ""
            sys.exit(f"{self.name}: expected a line of JSON, found its end with status {status}{hint}: "
                     f"{' '.join(self.command)}")
        return json.loads(line)

    def run(self, cell):
        """Tokens per second, and the part of all processor time that others took meanwhile."""
        pids = [os.getpid(), self.process.pid]
        before = ticks(pids)
        self.process.stdin.write(cell + "\n")
        self.process.stdin.flush()
        answer = self.read()
        after = ticks(pids)
        if "error" in answer:
            return answer
        speed = answer["tokens_per_s"]
        answer["tokens_per_s"] = speed[0] if isinstance(speed, list) else speed
        all_ticks = after[0] - before[0]
        others = after[1] - before[1] - (after[2] - before[2])
        # Ticks are coarse: a span of fewer says nothing about shares.
        answer["foreign_cpu_share"] = max(0, others) / all_ticks if all_ticks >= 40 else None
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def files(args, kinds):
    """The checkpoint, and a GGUF file of each type."""
    directory = args.models / f"{args.shape}-random"
    if not (directory / "config.json").exists():
        tell(f"writing {directory}")
        subprocess.run([args.mainstay, "bench", "shape", args.shape, directory], check=True, stdout=subprocess.DEVNULL)
    made = {}
    for kind in kinds:
        made[kind] = args.models / f"{args.shape}-random-{kind}.gguf"
        if not made[kind].exists():
            tell(f"writing {made[kind]}")
            subprocess.run([args.mainstay, "quantize", directory, made[kind], "--type", kind], check=True,
                           stdout=subprocess.DEVNULL)
    return directory, made


def sizes(args):
    return ["--prompt", str(args.prompt), "--gen", str(args.gen), "--threads", str(args.threads)]


def ours(args, model):
    command = [args.mainstay, "bench", "latency", str(model), "--cases", args.cells, "--turns", *sizes(args)]
    return Program("mainstay", command + args.mainstay_option)


def peer(args, gguf, directory):
    command, reads = PEERS[args.peer]
    model = gguf if reads == "gguf" else directory
    return Program(args.peer, [*command, str(model), "--cells", args.cells, *sizes(args)])


def measure(args, kind, gguf, directory):
    """All cells of one type of weights: a row for each."""
    tell(f"{kind}: loading")
    pair = [ours(args, gguf), peer(args, gguf, directory)]
    cells = args.cells.split(",")
    rows = {cell: {"cell": cell, "weights": kind, "ours": [], "peer": []} for cell in cells}
    for cell in cells:
        tell(f"{kind}: {cell}, warming up")
        pair[0].run(cell)
        rows[cell]["peer_error"] = pair[1].run(cell).get("error")
    for number in range(args.rounds):
        for cell in cells:
            tell(f"{kind}: {cell}, round {number + 1} of {args.rounds}")
            order = [("ours", pair[0]), ("peer", pair[1])]
            if number % 2 == 1:
                order.reverse()
            if rows[cell]["peer_error"]:
                order = [("ours", pair[0])]
            for _ in range(args.tries):
                runs = {side: program.run(cell) for side, program in order}
                if all((run["foreign_cpu_share"] or 0) <= args.quiet for run in runs.values()):
                    break
            for side, run in runs.items():
                rows[cell][side].append(run)
    about = {"mainstay": pair[0].about, args.peer: pair[1].about}
    for program in pair:
        program.close()
    return about, [judged(row) for row in rows.values()]


def judged(row):
    """Adds medians and the ratio's range to a row; without a ratio where the peer cannot do it."""
    if row["peer_error"]:
        row.update(ours_median=statistics.median(run["tokens_per_s"] for run in row["ours"]))
        return row
    speeds = {side: [run["tokens_per_s"] for run in row[side]] for side in ("ours", "peer")}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["peer"])]
    foreign = [run["foreign_cpu_share"] for side in ("ours", "peer") for run in row[side]]
    foreign = [share for share in foreign if share is not None]
    row.update(
        ours_median=statistics.median(speeds["ours"]), peer_median=statistics.median(speeds["peer"]),
        ratio_median=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios), ratios=ratios,
        foreign_max=max(foreign, default=None), foreign_median=statistics.median(foreign) if foreign else None,
        peer_mode=row["peer"][-1].get("mode"), bandwidth_share=row["ours"][-1].get("bandwidth_share"),
    )
    return row


def table(report):
    """Markdown."""
    lines = [f"| weights | cell | Mainstay tok/s | {report['peer']} tok/s | ratio | range | peer's mode | foreign |",
             "|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        if row["peer_error"]:
            lines.append(f"| {row['weights']} | {row['cell']} | {row['ours_median']:.1f} | - | - | - "
                         f"| {row['peer_error']} | - |")
            continue
        foreign = "-" if row["foreign_median"] is None else (
            f"{100 * row['foreign_median']:.0f} %, at most {100 * row['foreign_max']:.0f} %")
        lines.append(f"| {row['weights']} | {row['cell']} | {row['ours_median']:.1f} | {row['peer_median']:.1f} "
                     f"| {row['ratio_median']:.2f} | {row['ratio_min']:.2f} - {row['ratio_max']:.2f} "
                     f"| {row['peer_mode'] or '-'} | {foreign} |")
    return "\n".join(lines)


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, default="llama.cpp")
    parser.add_argument("--shape", default="qwen3-0.6b", help="qwen3-0.6b, llama-3.2-1b, llama-3.1-8b")
    parser.add_argument("--types", default=TYPES, help="weights, separated by commas, as `mainstay quantize` names them")
    parser.add_argument("--cells", default=CELLS, help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each cell")
    parser.add_argument("--quiet", type=float, default=1.0, metavar="SHARE",
                        help="run a pair again in which others took more than this part of the processors, such as 0.05")
    parser.add_argument("--tries", type=int, default=3, help="of such a pair; the last one counts in any case")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=32, help="steps of a decode")
    parser.add_argument("--threads", type=int, default=2, help="of both programs")
    parser.add_argument("--mainstay", default="target/release/mainstay")
    parser.add_argument("--mainstay-option", action="append", default=[], metavar="WORD",
                        help="one more word for `mainstay bench latency`, such as --kv-type=q8; may be repeated")
    parser.add_argument("--models", type=Path, default=Path("target/peers-models"), help="where files are made, and kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.rounds < 1 or args.tries < 1:
        parser.error("--rounds, --tries: expected at least 1")
    kinds = args.types.split(",")
    directory, made = files(args, kinds)
    report = {"peer": args.peer, "shape": args.shape, "prompt": args.prompt, "gen": args.gen, "threads": args.threads,
              "rounds": args.rounds, "date": datetime.date.today().isoformat(), "processor": processor(),
              "cores": os.cpu_count(), "about": {}, "rows": []}
    for kind in kinds:
        about, rows = measure(args, kind, made[kind], directory)
        report["about"][kind] = about
        report["rows"] += rows
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{args.shape}, {args.threads} threads, prompt {args.prompt}, {args.gen} decode steps, {args.rounds} pairs, "
          f"{report['processor']}, {report['date']}\n")
    print(table(report))


if __name__ == "__main__":
    main()
