#!/usr/bin/env python3
"""llama.cpp for compare.py: runs a cell for each line on stdin and answers with a line of JSON.

The first run of a cell tries flash attention on and off and keeps what was faster. Tokens that lie before are computed
once for each of both, and what a run adds is taken away after it. Keys and values are f16, batches as large as the
prompt, every stream has cells of its own (what llama.cpp calls not unified).
"""

import argparse
import json
import os
import sys
import time


def tell_errors(level, text, _):
    """Level 4 is an error in ggml's numbering."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def parse(cell):
    phase, rest = cell.split("@")
    depth, _, streams = rest.partition("x")
    return phase, int(depth), int(streams or 1)


class Tokens:
    """Made-up tokens."""

    def __init__(self, vocab):
        self.vocab, self.state = vocab, 7

    def next(self):
        self.state = self.state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        return (self.state >> 33) % self.vocab


class Bed:
    """A context with as many streams as a cell has, filled up to its depth."""

    def __init__(self, peer, flash, depth, streams):
        self.c, self.peer, self.depth, self.streams = peer.c, peer, depth, streams
        args = peer.args
        params = self.c.llama_context_default_params()
        # A whole number of 256 cells for each stream, as llama.cpp rounds it itself.
        room = depth + (max(args.prompt, args.gen) if streams == 1 else args.gen) + 1
        params.n_ctx = (room + 255) // 256 * 256 * streams
        params.n_batch = params.n_ubatch = max(args.prompt, streams)
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = args.threads
        params.no_perf = True
        # F16 in ggml's numbering.
        params.type_k = params.type_v = 1
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = int(flash)
        else:
            params.flash_attn = flash
        self.context = self.c.llama_init_from_model(peer.model, params)
        if not self.context:
            sys.exit("llama.cpp made no context")
        self.memory = self.c.llama_get_memory(self.context)
        self.batch = self.c.llama_batch_init(params.n_batch, 0, 1)
        for stream in range(streams):
            at = 0
            while at < depth:
                count = min(params.n_batch, depth - at)
                self.decode([(at + i, stream) for i in range(count)], lambda i, count=count: i == count - 1)
                at += count

    def decode(self, rows, wanted):
        """Computes one batch of (position, stream); `wanted` says which rows have logits."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (position, stream) in enumerate(rows):
            batch.token[i] = self.peer.tokens.next()
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
            batch.logits[i] = wanted(i)
        if self.c.llama_decode(self.context, batch) != 0:
            sys.exit(f"llama.cpp failed at position {rows[0][0]} of {len(rows)} rows")

    def run(self, phase):
        """Seconds and tokens of one run."""
        args = self.peer.args
        begun = time.perf_counter()
        if phase == "prefill":
            last = args.prompt - 1
            self.decode([(self.depth + i, 0) for i in range(args.prompt)], lambda i: i == last)
            count = args.prompt
        else:
            for step in range(args.gen):
                self.decode([(self.depth + step, stream) for stream in range(self.streams)], lambda i: True)
            count = args.gen * self.streams
        self.c.llama_synchronize(self.context)
        seconds = time.perf_counter() - begun
        for stream in range(self.streams):
            if not self.c.llama_memory_seq_rm(self.memory, stream, self.depth, -1):
                sys.exit("llama.cpp did not take tokens away")
        return seconds, count

    def close(self):
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.context)


class Peer:
    # Kept for as long as llama.cpp may call it.
    silent = None

    def __init__(self, args):
        import llama_cpp

        self.c, self.args = llama_cpp, args
        Peer.silent = llama_cpp.llama_log_callback(tell_errors)
        self.c.llama_log_set(Peer.silent, None)
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(args.model.encode(), self.c.llama_model_default_params())
        if not self.model:
            sys.exit(f"{args.model}: llama.cpp did not load it")
        vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.tokens = Tokens(vocab)
        # By depth and streams: a prefill and a decode of one stream share theirs.
        self.beds, self.best = {}, {}

    def bed(self, flash, cell):
        key = (flash, *parse(cell)[1:])
        if key not in self.beds:
            self.beds[key] = Bed(self, *key)
        return self.beds[key]

    def choose(self, cell):
        """What is faster for a cell, by the better of two runs each; a bed that no cell uses is closed."""
        phase = parse(cell)[0]
        fastest = {}
        for flash in (True, False):
            bed = self.bed(flash, cell)
            fastest[flash] = min(bed.run(phase)[0] for _ in range(2))
        self.best[cell] = min(fastest, key=fastest.get)
        if set(self.args.cells.split(",")) <= set(self.best):
            used = {(self.best[cell], *parse(cell)[1:]) for cell in self.best}
            for key in set(self.beds) - used:
                self.beds.pop(key).close()

    def run(self, cell):
        if cell not in self.best:
            self.choose(cell)
        flash = self.best[cell]
        seconds, count = self.bed(flash, cell).run(parse(cell)[0])
        return {"tokens_per_s": count / seconds, "mode": f"flash attention {'on' if flash else 'off'}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--cells", required=True, help="all that will be asked for, separated by commas")
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--gen", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # What libraries print must not stand between answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(args)
    about = {"version": peer.c.__version__, "system": peer.c.llama_print_system_info().decode(), "kv_type": "f16"}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.run(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
