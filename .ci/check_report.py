"""Reads reports of the conformance kit, one of each run: no case may have failed, and each has to have passed in at least
one run. A case is skipped where the server has no key, and where the model's own text decides nothing."""
import json
import sys

runs = [{case["id"]: case for case in json.load(open(path))["cases"]} for path in sys.argv[1:]]
ids = sorted(set().union(*runs))
wrong = []
for name in ids:
    cases = [run[name] for run in runs if name in run]
    outcomes = [case["outcome"] for case in cases]
    if "passed" not in outcomes or "failed" in outcomes or len(cases) < len(runs):
        wrong.append(name)
        print(f"{name}: {', '.join(outcomes)}: {' | '.join(case['message'] for case in cases if case['message'])}")
print(f"{len(ids) - len(wrong)} of {len(ids)} cases passed")
sys.exit(1 if wrong or not ids else 0)
