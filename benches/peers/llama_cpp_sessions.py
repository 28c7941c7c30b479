#!/usr/bin/env python3
"""llama.cpp saving and restoring a sequence, beside `mainstay bench sessions --shape qwen3-0.6b`.

A model of the same shape with seeded random bf16 weights is written as a GGUF file. A process computes a history and
32 more tokens (the time to the first token without reuse), and saves the state of the history to a file. Another
process loads that file and computes the 32 tokens (the time to the first token with it). The file is dropped from the
page cache before; a second restore in the same process finds it there. Tokens go in as numbers: there is no tokenizer.

    benches/peers/setup.sh
    target/peers-venv/bin/python benches/peers/llama_cpp_sessions.py --json FILE
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128, "vocab": 151_936,
    "context": 40_960,
}


def weights(rng, rows, cols, kind):
    """Uniform in -0.035 .. 0.035, as the harness makes them; the bytes of `bf16` or `f16`."""
    import numpy as np

    values = (rng.random((rows, cols), dtype=np.float32) - 0.5) * 0.07
    if kind == "f16":
        return values.astype("<f2").view(np.uint8)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").view(np.uint8)


def write_model(path, shape, kind):
    """A GGUF file without a vocabulary."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_vocab_size(shape["vocab"])
    types = {"bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
             "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16)}
    file_type, raw_dtype = types[kind]
    writer.add_file_type(file_type)
    # No vocabulary: llama.cpp makes as many empty tokens as the model has rows.
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(1)
    hidden, ffn, dim = shape["hidden"], shape["ffn"], shape["head_dim"]
    queries, keys = shape["heads"] * dim, shape["kv_heads"] * dim

    def matrix(name, rows, cols):
        writer.add_tensor(name, weights(rng, rows, cols, kind), raw_dtype=raw_dtype)

    def norm(name, width):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    matrix("token_embd.weight", shape["vocab"], hidden)
    for i in range(shape["layers"]):
        norm(f"blk.{i}.attn_norm.weight", hidden)
        matrix(f"blk.{i}.attn_q.weight", queries, hidden)
        matrix(f"blk.{i}.attn_k.weight", keys, hidden)
        matrix(f"blk.{i}.attn_v.weight", keys, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, queries)
        norm(f"blk.{i}.attn_q_norm.weight", dim)
        norm(f"blk.{i}.attn_k_norm.weight", dim)
        norm(f"blk.{i}.ffn_norm.weight", hidden)
        matrix(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn)
    norm("output_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens(count, salt, vocab):
    """Made-up tokens, the same in every process."""
    found, state = [], salt * 0x9E3779B97F4A7C15 & (1 << 64) - 1 | 1
    for _ in range(count):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        found.append((state >> 33) % vocab)
    return found


def tell_errors(level, text, _):
    """Level 4 is an error in ggml's numbering; 5 goes on with the line before."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class Engine:
    """One model and one context, driven through the C API."""

    # Kept for as long as llama.cpp may call it.
    silent = None

    def __init__(self, args, room):
        import llama_cpp

        self.c = llama_cpp
        Engine.silent = llama_cpp.llama_log_callback(tell_errors)
        self.c.llama_log_set(Engine.silent, None)
        self.c.llama_backend_init()
        begun = time.perf_counter()
        self.model = self.c.llama_model_load_from_file(
            str(args.model).encode(), self.c.llama_model_default_params())
        if not self.model:
            sys.exit(f"{args.model}: llama.cpp did not load it")
        params = self.c.llama_context_default_params()
        # A whole number of 256 cells, as llama.cpp rounds it itself.
        params.n_ctx = (room + 255) // 256 * 256
        params.n_batch = params.n_ubatch = args.batch
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = args.threads
        params.no_perf = True
        # F16 in ggml's numbering.
        params.type_k = params.type_v = 1
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1
        else:
            params.flash_attn = True
        self.context = self.c.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit("llama.cpp made no context")
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.batch = args.batch
        self.load_ms = ms(begun)

    def compute(self, run):
        """Computes tokens after those before, in batches."""
        for at in range(0, len(run), self.batch):
            part = run[at:at + self.batch]
            array = (self.c.llama_token * len(part))(*part)
            if self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(part))) != 0:
                sys.exit(f"llama.cpp failed at token {at} of {len(run)}")

    def draw(self):
        """The most probable next token."""
        import numpy as np

        logits = self.c.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def clear(self):
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def save(self, path, history):
        array = (self.c.llama_token * len(history))(*history)
        begun = time.perf_counter()
        size = self.c.llama_state_seq_save_file(self.context, str(path).encode(), 0, array, len(history))
        if size == 0:
            sys.exit(f"{path}: llama.cpp did not save")
        return ms(begun)

    def load(self, path, room):
        array, count = (self.c.llama_token * room)(), ctypes.c_size_t(0)
        size = self.c.llama_state_seq_load_file(
            self.context, str(path).encode(), 0, array, room, ctypes.byref(count))
        if size == 0:
            sys.exit(f"{path}: llama.cpp did not load it")
        return count.value


def ms(begun):
    return (time.perf_counter() - begun) * 1e3


def drop_cached(path):
    """Writes the file out and lets the system forget it."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def foreign(before):
    """Part of all processor time that others took since `before`, as the harness counts it; and a new `before`."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    own = sum(int(f) for f in Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[11:13])
    now = (sum(fields), sum(fields) - fields[3] - fields[4], own)
    if before is None or now[0] - before[0] < 40:
        return None, now
    return max(0, now[1] - before[1] - (now[2] - before[2])) / (now[0] - before[0]), now


def phase_save(args, context):
    vocab = args.shape["vocab"]
    history, new = tokens(context, context, vocab), tokens(args.new, 1_000_003, vocab)
    engine = Engine(args, context + args.new)
    engine.compute(tokens(args.batch if args.batch < context else context, 7, vocab))
    engine.clear()
    _, before = foreign(None)
    begun = time.perf_counter()
    engine.compute(history)
    history_ms = ms(begun)
    share, _ = foreign(before)
    save_ms = engine.save(args.state, history)
    begun = time.perf_counter()
    engine.compute(new)
    token = engine.draw()
    # The save lies between and is not part of it.
    ttft_ms = history_ms + ms(begun)
    return {"context": context, "cold_ttft_ms": ttft_ms, "history_ms": history_ms, "save_ms": save_ms,
            "file_bytes": os.path.getsize(args.state), "token": token, "load_model_ms": engine.load_ms,
            "foreign_cpu_share": share}


def phase_restore(args, context):
    new = tokens(args.new, 1_000_003, args.shape["vocab"])
    engine = Engine(args, context + args.new)
    runs = {}
    # Weights are in memory before either is timed, as they are in a server that has started.
    engine.compute(new)
    for name in ("disk", "page_cache"):
        engine.clear()
        if name == "disk":
            drop_cached(args.state)
        _, before = foreign(None)
        begun = time.perf_counter()
        count = engine.load(args.state, context + args.new)
        load_ms = ms(begun)
        engine.compute(new)
        token = engine.draw()
        runs[name] = {"ttft_ms": ms(begun), "load_state_ms": load_ms, "tokens": count, "token": token,
                      "foreign_cpu_share": foreign(before)[0]}
    return {"context": context, "load_model_ms": engine.load_ms, "runs": runs}


def again(args, phase, context):
    """Runs one phase in a process of its own; what it prints last is its result."""
    command = [sys.executable, __file__, "--phase", phase, "--contexts", str(context), "--model", str(args.model),
               "--state", str(args.state), "--threads", str(args.threads), "--batch", str(args.batch),
               "--new", str(args.new)] + (["--tiny"] if args.tiny else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args, context):
    print(f"{context} tokens: computing and saving", file=sys.stderr)
    saved = again(args, "save", context)
    restores = []
    for i in range(args.repeat):
        print(f"{context} tokens: restoring, run {i + 1} of {args.repeat}", file=sys.stderr)
        restores.append(again(args, "restore", context))
    args.state.unlink()
    found = {"context": context, "saved": saved, "restores": restores}
    for name in ("disk", "page_cache"):
        runs = [r["runs"][name] for r in restores]
        ttft_ms = statistics.median(r["ttft_ms"] for r in runs)
        found[name] = {"ttft_ms_median": ttft_ms, "penalty": saved["cold_ttft_ms"] / ttft_ms,
                       "same_token": all(r["token"] == saved["token"] for r in runs)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="2048,8192", help="tokens of the history, separated by commas")
    parser.add_argument("--new", type=int, default=32, help="tokens sent after the restore")
    parser.add_argument("--repeat", type=int, default=3, help="restores of each history")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512, help="tokens of one call, logical and physical")
    parser.add_argument("--weights", choices=["bf16", "f16"], default="bf16", help="their element type")
    parser.add_argument("--model", type=Path, help="made under target/ if it is not there")
    parser.add_argument("--state", type=Path, help="the state file; removed afterwards")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers: to see that all of it works")
    parser.add_argument("--phase", choices=["save", "restore"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = dict(SHAPE)
    if args.tiny:
        args.shape.update(layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, head_dim=64, vocab=1000)
    contexts = [int(c) for c in args.contexts.split(",")]
    if args.phase:
        found = (phase_save if args.phase == "save" else phase_restore)(args, contexts[0])
        print(json.dumps(found))
        return
    if args.model is None:
        args.model = Path(f"target/peers-{'tiny' if args.tiny else 'qwen3-0.6b'}-random-{args.weights}.gguf")
    if not args.model.exists():
        print("making the model", file=sys.stderr)
        args.model.parent.mkdir(parents=True, exist_ok=True)
        staged = args.model.with_suffix(".new")
        write_model(staged, args.shape, args.weights)
        staged.rename(args.model)
    if args.state is None:
        # Beside the model, on a disk: a temporary directory may be memory.
        handle, name = tempfile.mkstemp(dir=args.model.parent, suffix=".state")
        os.close(handle)
        args.state = Path(name)
    import llama_cpp

    report = {"peer": "llama-cpp-python", "version": llama_cpp.__version__,
              "system": llama_cpp.llama_print_system_info().decode(), "shape": args.shape,
              "weights": args.weights, "threads": args.threads, "batch": args.batch, "new": args.new, "kv_type": "f16", "flash_attention": True,
              "measurements": [measure(args, context) for context in contexts]}
    print(f"{'tokens':>8} {'cold ms':>10} {'disk ms':>10} {'penalty':>8} {'cached ms':>10} {'save ms':>9} {'MB':>8}"
          "  same")
    for m in report["measurements"]:
        print(f"{m['context']:>8} {m['saved']['cold_ttft_ms']:>10.1f} {m['disk']['ttft_ms_median']:>10.1f}"
              f" {m['disk']['penalty']:>7.1f}x {m['page_cache']['ttft_ms_median']:>10.1f}"
              f" {m['saved']['save_ms']:>9.1f} {m['saved']['file_bytes'] / 1e6:>8.1f}"
              f"  {'yes' if m['disk']['same_token'] else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
