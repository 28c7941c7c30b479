#!/usr/bin/env bash
# GGUF against llama.cpp: files that `mainstay quantize` writes give the same greedy tokens in both, and so does one that
# llama.cpp's converter wrote; block formats read as the `gguf` package reads them.
#
#   tests/clients/gguf.sh BINARY
#
# Needs PyPI (gguf, xllamacpp, safetensors). Fails, not skips, when these cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
binary=$1
venv=target/gguf-venv
if ! $venv/bin/python -c 'import gguf, xllamacpp, safetensors' 2>/dev/null; then
    rm -rf $venv
    python3 -m venv $venv
    $venv/bin/pip install -q --disable-pip-version-check --only-binary :all: gguf==0.19.0 xllamacpp==2026.10.11549 \
        safetensors==0.8.0 numpy || { echo "gguf: the packages cannot be installed" >&2; exit 1; }
fi
# the fixture of the formats is what the package says today
cp tests/fixtures/formats/blocks.py target/blocks.py
$venv/bin/python target/blocks.py 2>/dev/null
cmp target/blocks.safetensors tests/fixtures/formats/blocks.safetensors
$venv/bin/python tests/clients/gguf_peer.py "$binary"
