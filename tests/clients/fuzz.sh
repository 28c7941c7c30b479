#!/usr/bin/env bash
# Malformed requests made from the server's own document: no 5xx, no panic, and every page is free at the end.
# usage: fuzz.sh BINARY [EXAMPLES a path]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
binary=$1
examples=${2:-40}
venv=target/fuzz-venv
if ! $venv/bin/python -c 'import schemathesis, httpx' 2>/dev/null; then
    rm -rf $venv
    python3 -m venv $venv
    $venv/bin/pip install -q --disable-pip-version-check schemathesis==4.32.0 httpx
fi
rm -rf target/fuzz-data
"$binary" serve --port 0 --data-dir target/fuzz-data >target/fuzz.out 2>target/fuzz.log &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 600); do
    url=$(sed -n 's|.*ready on \(http://[^ ]*\).*|\1|p' target/fuzz.out)
    [ -n "$url" ] && break
    sleep 0.05
done
# It leaves a cache where it runs.
(cd target && ../$venv/bin/st run "$url/openapi.json" --checks not_a_server_error --mode negative --max-examples "$examples" \
    --phases fuzzing --workers 4 --request-timeout 20 --seed 7 --suppress-health-check all)
$venv/bin/python tests/clients/streams.py "$url/v1" none mainstay-default
kill -0 $server
# What was asked for has ended: nothing runs, and no page is held.
for _ in $(seq 100); do
    held=$(curl -s "$url/metrics" | awk '/^vllm:num_requests_(running|waiting)/ {n += $2} /^mainstay_pages{.*state="used"/ {n += $2} END {print n + 0}')
    [ "$held" = 0 ] && break
    sleep 0.1
done
[ "$held" = 0 ] || { echo "fuzz: $held requests or pages are held at the end" >&2; exit 1; }
if grep -i panic target/fuzz.log; then exit 1; fi
echo "fuzz: nothing is held"
