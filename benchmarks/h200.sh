#!/usr/bin/env bash
# The gpu benchmarks in one go, for one H200; `bash benchmarks/h200.sh tiny` is the dry run on a CPU. Results: $OUT.
# ControlNet's step needs diffusers in the environment; without it that part is left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
size=${1:-sd15} out=${OUT:-runs/h200} python=${PYTHON:-python3}
mkdir -p "$out"
if [ "$size" = sd15 ]; then
  build="--dtype=bfloat16 --examples=2000 --draws=5 --batch=64 --peak_tflops=989"
  train="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=1000 --draws=5 --steps=200"
  control="--dtype=bfloat16 --batch=8 --steps=20 --compile"
  whole="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=10000 --draws=5 --steps=20000"
  sweep="--sizes paper --trials 1 8 32 128 --steps=200"
  sampling="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=8 --steps=20"
  peers="--dtype=bfloat16 --batch=8 --methods mcm-paper mcm-paper-paper full controlnet adapter lora"
else
  build="--examples=6 --draws=2 --batch=4" train="--batch=4 --examples=8 --draws=2 --steps=3"
  control="--batch=1 --steps=2" whole="--batch=4 --examples=8 --draws=2 --steps=12"
  sweep="--sizes tiny --trials 2 --steps=3 --examples=64" sampling="--mcm=tiny --steps=2 --rounds=1"
  peers="--batch=2 --rounds=1 --methods mcm-tiny full controlnet"
fi
# One at a time has the device's memory. The training benchmark starts processes of its own, so it takes what it needs.
"$python" -m benchmarks.cache_build --size="$size" $build --workdir=runs/h200/build --out="$out/cache_build_$size.json"
XLA_PYTHON_CLIENT_PREALLOCATE=false \
  "$python" -m benchmarks.training --size="$size" $train --workdir=runs/h200/train --out="$out/training_$size.json"
"$python" -m benchmarks.whole_run --size="$size" $whole --workdir=runs/h200/whole --out="$out/whole_run_$size.json"
# Without the serial side, whose compiling would take most of the machine's time; from the shipped base of scenes.
XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m benchmarks.sweep_together $sweep --repeats=1 --no_serial \
  --workdir=runs/h200/sweep --out="$out/sweep_together_$size.json"
"$python" -m benchmarks.sampling_step --size="$size" $sampling --out="$out/sampling_step_$size.json"
"$python" -m benchmarks.peers.cost --size="$size" $peers --out="$out/peers_cost_$size.json"
if "$python" -c "import diffusers, torch" 2>/dev/null; then
  "$python" -m benchmarks.controlnet_step --size="$size" $control --out="$out/controlnet_$size.json"
else
  echo "no diffusers here: ControlNet's step is left out"
fi
