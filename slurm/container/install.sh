#!/usr/bin/env bash
# Both image recipes run this in a copy of this repository's files. It installs everything that training and vLLM on GPUs need in
# /opt/kdrl. The repository itself is not installed: the one that is mounted at run time is used.
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends build-essential git python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv /opt/kdrl
install=(/opt/kdrl/bin/pip install --no-cache-dir --constraint constraints-gpu.txt)
"${install[@]}" --upgrade pip setuptools wheel
"${install[@]}" '.[vllm]'
# Transformer Engine's part for torch is compiled here, against the torch that has just been installed.
NVTE_FRAMEWORK=pytorch "${install[@]}" --no-build-isolation 'transformer-engine[core_cu13,pytorch]'
/opt/kdrl/bin/pip uninstall --yes kdrl-mcore
/opt/kdrl/bin/pip check
