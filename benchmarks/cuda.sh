#!/bin/sh
# Whether popc is right on a CUDA device, then the figures on it, into benchmarks/results. Run from
# the project's folder; PYTHON and POPC name others than those of .venv.
# Two instances of a model are held, one for dense runs: of the MoE shape (61 GB) as many layers as
# fit twice. `LAYERS=12 benchmarks/cuda.sh` for less than 80 GB.
# More options go to every benchmark. The least that shows something:
# `benchmarks/cuda.sh --batch 1 --context 128 --sparsity 0.4,0.5 --no-extras`.
set -eu
popc="${POPC:-.venv/bin/popc}"
results=benchmarks/results

"${PYTHON:-.venv/bin/python}" -m tests.cuda_check
"${PYTHON:-.venv/bin/python}" benchmarks/cuda_planes.py --out $results/planes-cuda.json

"$popc" bench --ffn --device cuda --hidden 4096 --channels 14336 --tokens 200 --rounds 15 \
    --out $results/ffn-cuda.json --plot $results/ffn-cuda.png "$@"
"$popc" bench llama3-8b-shape --device cuda \
    --out $results/decode-llama3-8b-cuda.json --plot $results/decode-llama3-8b-cuda.png "$@"
"$popc" bench qwen3-moe-shape --device cuda --layers "${LAYERS:-24}" \
    --out $results/decode-qwen3-moe-cuda.json --plot $results/decode-qwen3-moe-cuda.png "$@"
