#!/usr/bin/env bash
# The tests that a GPU changes and the cost of a step, on one NVIDIA card; not timed on one yet. Needs pip install -e '.[dev]'.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
$python -m pytest tests/test_device.py --device cuda
$python benchmarks/step.py --model small --model vocab50k --steps 5
# SmolLM2 comes from the package registry; a card without a network has it only where the cache was brought along
$python benchmarks/step.py --model smollm2 --model smollm2-bf16 --steps 5 || echo "smollm2: not measured"
