#!/usr/bin/env bash
# Clients as they are published, from PyPI and npm, against `mainstay serve` with the built-in model.
#
#   tests/clients/sdks.sh BINARY [words for pytest]
#
# Installs them into target/ci-sdks (once for each list of versions), starts the server on a free port, and runs
# tests/clients/sdks and tests/clients/node. Fails, not skips, when a package cannot be installed. Needs python3; node
# comes from PyPI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "sdks: $*" >&2
    exit 1
}

[ $# -ge 1 ] || fail "usage: tests/clients/sdks.sh BINARY [words for pytest]"
binary=$1
shift
dir=$PWD/target/ci-sdks
here=tests/clients

versions=$(cat $here/sdks/requirements.txt $here/node/package-lock.json | sha256sum)
if [ "$versions" != "$(cat "$dir/versions" 2>/dev/null)" ]; then
    rm -rf "$dir"
    mkdir -p "$dir/node"
    python3 -m venv "$dir/venv" || fail "python3 -m venv failed: is python3-venv installed?"
    "$dir/venv/bin/pip" install -q --disable-pip-version-check -r $here/sdks/requirements.txt ||
        fail "the packages of PyPI cannot be installed"
    cp $here/node/package.json $here/node/package-lock.json "$dir/node"
    (cd "$dir/node" && PATH=$dir/venv/bin:$PATH npm ci --silent --ignore-scripts --no-audit --no-fund) ||
        fail "the packages of npm cannot be installed"
    echo "$versions" >"$dir/versions"
fi

export MAINSTAY_KEY=sdk-key
servers=()
stop_servers() {
    kill "${servers[@]}" 2>/dev/null || true
    wait "${servers[@]}" 2>/dev/null || true
}
trap stop_servers EXIT

# Starts a server under this name with these words, and leaves its address in $url.
serve() {
    local name=$1 out=$dir/$1.out
    shift
    rm -rf "$dir/$name.data"
    : >"$out"
    "$binary" serve "$@" --port 0 --api-key "$MAINSTAY_KEY" --data-dir "$dir/$name.data" >"$out" 2>"$dir/$name.log" &
    servers+=($!)
    for _ in $(seq 600); do
        url=$(sed -n 's|.*ready on \(http://[^ ]*\).*|\1|p' "$out")
        [ -n "$url" ] && return 0
        kill -0 $! 2>/dev/null || break
        sleep 0.05
    done
    cat "$dir/$name.log" >&2
    fail "the server did not start: $name"
}

serve built-in
export MAINSTAY_URL=$url
python3 $here/sdks/scripted.py "$dir/scripted"
serve scripted "$dir/scripted"
export MAINSTAY_SCRIPTED_URL=$url

# The clients read addresses, keys and proxies from the environment; they get those of this script.
for name in $(compgen -e | grep -E '^(OPENAI|ANTHROPIC|LITELLM|LANGCHAIN|LANGSMITH)_' || true); do unset "$name"; done
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
export LANGSMITH_TRACING=false OPENAI_AGENTS_DISABLE_TRACING=1 LITELLM_LOCAL_MODEL_COST_MAP=True PYTHONDONTWRITEBYTECODE=1
"$dir/venv/bin/python" -m pytest -q -p no:cacheprovider --disable-warnings --timeout 120 $here/sdks "$@" ||
    fail "a client written in Python failed"
cp $here/node/openai.test.mjs "$dir/node"
(cd "$dir/node" && "$dir/venv/bin/node" --test openai.test.mjs) || fail "the client of npm failed"
kill -0 "${servers[@]}" 2>/dev/null || fail "a server is gone"
if grep panicked "$dir"/*.log >&2; then fail "a server panicked"; fi
echo "sdks: passed"
