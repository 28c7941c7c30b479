"""Greedy tokens of GGUF files in llama.cpp and in `mainstay serve`: gguf_peer.py BINARY (see gguf.sh)."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

import numpy as np
import xllamacpp
from gguf import GGUFReader
from safetensors.numpy import save_file

PROMPTS, TOKENS = 20, 24
# A type of tokens in GGUF.
CONTROL = 3
# Where the best two log-probabilities are nearer than this, tokens may part: llama.cpp rounds the other factor of a
# product to the weights' type (8 bits for quantized ones), this project to 8 bits for quantized ones only and in its own
# way. For those it is 0.3 of the logits' standard deviation, which is about 2 for the seeded model and 5 for fixtures.
MARGIN = {"f32": 0.01, "f16": 0.05, "bf16": 0.5}
MARGIN_QUANTIZED = 0.6
FIXTURES = pathlib.Path("tests/fixtures")


def checkpoint(out):
    """A seeded Llama whose rows are whole blocks of 256, with the tokenizer of a fixture."""
    random = np.random.default_rng(256)
    hidden, inner, layers, heads, kv_heads, vocab = 256, 512, 4, 4, 2, 512
    source = FIXTURES / "llama"
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    config |= {"rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
    normal = lambda rows, cols: random.standard_normal((rows, cols)).astype(np.float32) / np.float32(cols**0.5)  # noqa: E731
    tensors = {
        "model.embed_tokens.weight": normal(vocab, hidden) * 16,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(vocab, hidden) * 2,
    }
    for i in range(layers):
        for name, rows, cols in [
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", 128, hidden), ("self_attn.v_proj", 128, hidden),
            ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ]:  # fmt: skip
            tensors[f"model.layers.{i}.{name}.weight"] = normal(rows, cols)
        for name in ["input_layernorm", "post_attention_layernorm"]:
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(hidden, np.float32)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]:
        (out / name).write_bytes((source / name).read_bytes())
    save_file(tensors, out / "model.safetensors")


def prompts(vocab):
    random = np.random.default_rng(20)
    return [[int(n) for n in random.integers(3, vocab - 12, random.integers(2, 40))] for _ in range(PROMPTS)]


def by_llama_cpp(path, texts):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    request = {"n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    # of its lists only this one has tokens that are parts of characters
    request |= {"verbose": True, "return_tokens": True}
    return [server.handle_completions(request | {"prompt": prompt})["__verbose"]["tokens"] for prompt in texts]


class Mainstay:
    def __init__(self, binary, path):
        data = tempfile.mkdtemp()
        command = [binary, "serve", str(path), "--port", "0", "--data-dir", data, "--kv-type", "f32"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in self.process.stdout:
            if found := re.search(r"ready on (http://\S+)", line):
                self.url = found[1]
                return
        raise SystemExit(f"gguf: {binary} serve {path} ended")

    def greedy(self, prompt):
        """The tokens, and by how much each is likelier than the next best."""
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 2,
                "return_token_ids": True}  # fmt: skip
        with urllib.request.urlopen(self.url + "/v1/models") as answer:
            body["model"] = json.load(answer)["data"][0]["id"]
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            choice = json.load(answer)["choices"][0]
        best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        # tokens of one spelling are one entry: how near they are does not show
        margins = [top[0] - top[1] if len(top) > 1 else 0.0 for top in best]
        return list(zip(choice["token_ids"], margins))

    def stop(self):
        self.process.terminate()
        self.process.wait()


def compare(binary, path, kind):
    reader = GGUFReader(path)
    texts = prompts(int(next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]))
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    theirs = by_llama_cpp(path, texts)
    server = Mainstay(binary, path)
    equal = parted = ended = 0
    try:
        for prompt, expected in zip(texts, theirs):
            for at, (token, margin) in enumerate(server.greedy(prompt)):
                if at < len(expected) and expected[at] == token:
                    equal += 1
                    continue
                # what ends a text is not drawn there, and drawn like any other here
                if types[token] == CONTROL:
                    ended += 1
                elif margin > MARGIN.get(kind, MARGIN_QUANTIZED):
                    found = f"{token} by {margin:.3f}, not {expected[at : at + 1]}"
                    raise SystemExit(f"gguf: {path.name}: token {at} after {prompt}: {found}")
                else:
                    parted += 1
                break
    finally:
        server.stop()
    print(f"gguf: {path.name}: {equal} tokens equal; of {PROMPTS} answers {ended} end and {parted} part at a near tie")
    if kind == "f32" and parted > 2 or equal < PROMPTS * TOKENS // 8:
        raise SystemExit(f"gguf: {path.name}: too few tokens are equal")


def main():
    binary = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        checkpoint(scratch / "seeded")
        for kind in ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k"]:
            path = scratch / f"seeded-{kind}.gguf"
            subprocess.run([binary, "quantize", scratch / "seeded", path, "--type", kind], check=True)
            compare(binary, path, kind)
        for number, family in enumerate(["qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma3_text"]):
            # named by its directory, and llama.cpp takes some names for models whose vocabulary it knows
            shutil.copytree(FIXTURES / family, scratch / f"fixture {number}")
            path = scratch / f"{family}.gguf"
            subprocess.run([binary, "quantize", scratch / f"fixture {number}", path, "--type", "f32"], check=True)
            compare(binary, path, "f32")
        for path in sorted((FIXTURES / "formats").glob("*-converted*.gguf")):
            if "-00001-of-" in path.name or "-of-" not in path.name:
                compare(binary, path, "bf16")


main()
