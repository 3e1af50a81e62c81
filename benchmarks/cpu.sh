#!/bin/sh
# The figures on a CPU, into benchmarks/results. Run from the project's folder on a machine that
# does nothing else; on two cores it takes hours, most of them compiling.
# More options go to every benchmark: `benchmarks/cpu.sh --rounds 9`.
set -eu
popc="${POPC:-.venv/bin/popc}"
results=benchmarks/results

"$popc" bench --ffn --tokens 50 --rounds 15 \
    --out $results/ffn-cpu.json --plot $results/ffn-cpu.png "$@"
"$popc" bench smollm2 --policies threshold --no-extras \
    --out $results/grid-smollm2-cpu.json --plot $results/grid-smollm2-cpu.png "$@"
"$popc" bench smollm2 --batch 1 --context 128 --sparsity 0,0.01,0.25,0.37,0.5 \
    --out $results/decode-smollm2-cpu.json --plot $results/decode-smollm2-cpu.png "$@"
"$popc" bench smollm2 --batch 1 --context 128 --sparsity 0.25,0.37,0.5 --policies threshold \
    --guards prompt --no-extras \
    --out $results/guards-smollm2-cpu.json --plot $results/guards-smollm2-cpu.png "$@"
"$popc" bench tinyllama-shape \
    --out $results/decode-tinyllama-cpu.json --plot $results/decode-tinyllama-cpu.png "$@"
