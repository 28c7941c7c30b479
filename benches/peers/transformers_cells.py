#!/usr/bin/env python3
"""transformers for compare.py, in bf16: runs a cell for each line on stdin and answers with a line of JSON.

Keys and values are those of a DynamicCache that is cut back to the cell's depth after each run.
"""

import argparse
import json
import os
import sys
import time


def parse(cell):
    phase, rest = cell.split("@")
    depth, _, streams = rest.partition("x")
    return phase, int(depth), int(streams or 1)


class Peer:
    def __init__(self, args):
        import torch
        import transformers

        self.torch, self.args = torch, args
        torch.set_num_threads(args.threads)
        torch.set_grad_enabled(False)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self.cache_class = transformers.DynamicCache
        self.caches = {}

    def tokens(self, streams, count):
        return self.torch.randint(0, self.model.config.vocab_size, (streams, count))

    def cache(self, depth, streams):
        if (depth, streams) not in self.caches:
            cache = self.cache_class(config=self.model.config)
            if depth:
                self.model(self.tokens(streams, depth), past_key_values=cache, logits_to_keep=1)
            self.caches[depth, streams] = cache
        return self.caches[depth, streams]

    def run(self, cell):
        phase, depth, streams = parse(cell)
        cache = self.cache(depth, streams)
        begun = time.perf_counter()
        if phase == "prefill":
            self.model(self.tokens(1, self.args.prompt), past_key_values=cache, logits_to_keep=1)
            count = self.args.prompt
        else:
            for _ in range(self.args.gen):
                self.model(self.tokens(streams, 1), past_key_values=cache)
            count = self.args.gen * streams
        seconds = time.perf_counter() - begun
        if depth:
            # so many tokens of each stream go again
            cache.crop(-(count // streams))
        else:
            del self.caches[depth, streams]
        return {"tokens_per_s": count / seconds, "mode": "bf16, sdpa"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory in Hugging Face layout")
    parser.add_argument("--cells", required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--gen", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # What libraries print must not stand between answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = Peer(args)
    print(json.dumps({"version": peer.version, "kv_type": "bf16"}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.run(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
