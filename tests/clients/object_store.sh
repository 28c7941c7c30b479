#!/usr/bin/env bash
# The object tier against a server that speaks S3: moto, from PyPI, on a free port of this machine.
#
#   tests/clients/object_store.sh
#
# Installs moto into target/ci-moto (once), starts it, makes a bucket, and runs the tests of the object tier in
# engine/store with that bucket beside the stores in memory and in a directory: exclusive creates, moves, shared extents,
# fencing, races, deletion. Fails, not skips, when moto cannot be installed or was not asked. Needs python3, cargo, curl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "object_store: $*" >&2
    exit 1
}

venv=target/ci-moto
log=target/ci-moto.log
version=5.2.5
mkdir -p target
if ! "$venv/bin/python" -c "import moto, flask; assert moto.__version__ == '$version'" 2>/dev/null; then
    rm -rf "$venv"
    python3 -m venv "$venv" || fail "python3 -m venv failed: is python3-venv installed?"
    "$venv/bin/pip" install -q --disable-pip-version-check "moto[server]==$version" || fail "moto cannot be installed"
fi

"$venv/bin/moto_server" -H 127.0.0.1 -p 0 >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
url=
for _ in $(seq 300); do
    url=$(sed -n 's|.*Running on \(http://127\.0\.0\.1:[0-9]*\).*|\1|p' "$log" | head -n 1)
    [ -n "$url" ] && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
[ -n "$url" ] || { cat "$log" >&2; fail "moto did not start"; }
bucket=mainstay-tier
curl -sSf --noproxy '*' -o "$log.bucket" -X PUT "$url/$bucket" || fail "no bucket could be made"

export AWS_ENDPOINT=$url AWS_ALLOW_HTTP=true AWS_REGION=us-east-1 NO_PROXY=127.0.0.1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test MAINSTAY_TEST_BUCKET=$bucket
cargo test --release --workspace --test store object:: || fail "the tests failed"

# The tests pass without a bucket too, so the server must say that it was asked, and that it refused.
asked=$(grep -ac "PUT /$bucket/.*session/" "$log" || true)
refused=$(grep -ac "PUT /$bucket/.* 412 " "$log" || true)
counts="moto was asked for $asked manifests and refused $refused objects"
[ "$asked" -ge 50 ] && [ "$refused" -ge 5 ] || fail "$counts"
echo "object_store: passed; $counts"
