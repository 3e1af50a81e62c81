#!/bin/sh
# Quality of every policy in real compiled decode, into benchmarks/results; hours on two cores.
# benchmarks/quality.sh [MODEL [NAME [more options of popc eval]]]
set -eu
popc="${POPC:-.venv/bin/popc}"
model="${1:-smollm2}"
name="${2:-smollm2}"
if [ $# -gt 2 ]; then shift 2; else set --; fi

measure() { # POLICY SPARSITY [CANDIDATE]
    out="benchmarks/results/quality-$name-$1-r$2${3:+-g$3}.json"
    "$popc" eval "$model" --windows "${WINDOWS:-48}" --policy "$1" --sparsity "$2" \
        --candidate "${3:-0.1}" --out "$out" $more
}

more="$*"
for r in 0.25 0.37 0.5; do measure threshold $r; done
for r in 0.4 0.6; do measure staged $r; done
measure staged_pruned 0.6
measure pop 0.4 0.1
measure pop 0.4 0.4
measure pop 0.4 0   # the paper's ablations: fixed by the prompt,
measure pop 0.4 1   # and every unit re-scored
for policy in griffin wanda_sp flap; do measure $policy 0.4; done
"$popc" report "benchmarks/results/report-$name.html" "$model" \
    $(for file in benchmarks/results/quality-"$name"-*.json; do echo "--figures $file"; done)
