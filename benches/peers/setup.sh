#!/bin/sh
# Makes target/peers-venv with llama-cpp-python, built from its source distribution for this processor. Takes minutes of
# all cores, once; give it `nice`. With the word transformers, that peer of compare.py
# beside it (from PyPI, with torch: gigabytes).
#
# PEERS_AMX=off leaves AMX out: some virtual machines show it and end the program that uses it (SIGILL). Where it works,
# it is part of what the peer can do.
set -eu
cd "$(dirname "$0")/../.."
venv=target/peers-venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
"$venv/bin/pip" install --quiet numpy gguf
again=
case ${PEERS_AMX:-on} in
    on) ;;
    off)
        # neither what is installed nor what pip keeps may be taken
        again="--force-reinstall --no-cache-dir"
        export CFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" CXXFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        ;;
    *) echo "PEERS_AMX: expected on or off, found $PEERS_AMX" >&2 && exit 2 ;;
esac
# CMAKE_BUILD_PARALLEL_LEVEL: as many compilers as cores; without it, ninja starts two more than there are.
CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL="$(getconf _NPROCESSORS_ONLN)" \
    "$venv/bin/pip" install $again --no-binary llama-cpp-python llama-cpp-python==0.3.36
"$venv/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
for peer in "$@"; do
    case $peer in
        transformers) "$venv/bin/pip" install --quiet transformers==5.23.0 torch ;;
        *) echo "$0: expected transformers, found $peer" >&2 && exit 2 ;;
    esac
done
