"""What `mainstay serve` answers for an encoder and for a cross-encoder, against vectors and scores of transformers.

    python3 tests/clients/minilm.py BINARY MODEL_DIRECTORY
"""
import base64
import json
import math
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
WITHIN = 1e-4


class Server:
    """A server on a port of its own, with its model's name."""

    def __init__(self, binary, model):
        self.data = tempfile.TemporaryDirectory()
        words = [binary, "serve", str(model), "--port", "0", "--served-model-name", "m", "--data-dir", self.data.name]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"ready on (http://\S+)", line)[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0
        self.data.cleanup()

    def post(self, path, status=200, **body):
        data = json.dumps({"model": "m", **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                found, answer = response.status, json.load(response)
        except urllib.error.HTTPError as error:
            found, answer = error.code, json.load(error)
        assert found == status, (path, found, answer)
        return answer


def vectors(server, **body):
    return [entry["embedding"] for entry in server.post("/v1/embeddings", **body)["data"]]


def reference():
    """The texts and their vectors; a safetensors file is a length, a header and floats."""
    texts = json.loads((FIXTURES / "minilm/reference.json").read_text())["texts"]
    raw = (FIXTURES / "minilm/reference.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    width = json.loads(raw[8:start])["embeddings"]["shape"][1]
    floats = [list(row) for row in struct.iter_unpack(f"<{width}f", raw[start:])]
    return [text["text"] for text in texts], floats


def check_embeddings(server):
    texts, expected = reference()
    together = vectors(server, input=texts, truncate_prompt_tokens=-1, encoding_format="base64")
    worst = 0.0
    for text, packed, wanted in zip(texts, together, expected, strict=True):
        [alone] = vectors(server, input=text, truncate_prompt_tokens=-1, encoding_format="base64")
        assert alone == packed, f"in a batch the vector of {text[:30]!r} has other bits"
        raw = base64.b64decode(packed)
        found = struct.unpack(f"<{len(raw) // 4}f", raw)
        worst = max(worst, max(abs(f - w) for f, w in zip(found, wanted, strict=True)))
    assert worst < WITHIN, worst
    longest = max(texts, key=len)
    error = server.post("/v1/embeddings", 400, input=longest)["error"]
    assert error["code"] == "context_length_exceeded" and "256" in error["message"], error
    [short] = vectors(server, input=texts[0], dimensions=64)
    assert len(short) == 64 and abs(math.hypot(*short) - 1) < 1e-5
    error = server.post("/v1/chat/completions", 400, messages=[{"role": "user", "content": "Hi"}])["error"]
    assert error["param"] == "model" and "/v1/embeddings" in error["message"], error
    error = server.post("/v1/completions", 400, prompt="Hi")["error"]
    assert error["param"] == "model", error
    error = server.post("/v1/rerank", 400, query="a", documents=["b"])["error"]
    assert error["param"] == "model", error
    print(f"minilm: {len(texts)} vectors within {worst:.1e}, each the same bits alone and in a batch")


def check_scores(server):
    expected = json.loads((FIXTURES / "bert_cross/expected.json").read_text())
    worst = 0.0
    for query in dict.fromkeys(entry["query"] for entry in expected):
        entries = [entry for entry in expected if entry["query"] == query]
        documents = [entry["document"] for entry in entries]
        answer = server.post("/v1/rerank", query=query, documents=documents)
        order = sorted(range(len(entries)), key=lambda i: -entries[i]["score"])
        assert [result["index"] for result in answer["results"]] == order, (query, answer)
        for result in answer["results"]:
            entry = entries[result["index"]]
            assert result["document"]["text"] == entry["document"]
            worst = max(worst, abs(result["relevance_score"] - entry["score"]))
        assert answer["usage"]["prompt_tokens"] == sum(len(entry["ids"]) for entry in entries)
    assert worst < WITHIN, worst
    print(f"minilm: {len(expected)} scores within {worst:.1e}")


def main():
    binary, model = sys.argv[1:]
    with Server(binary, model) as server:
        check_embeddings(server)
    with Server(binary, FIXTURES / "bert_cross") as server:
        check_scores(server)


main()
