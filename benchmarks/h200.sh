#!/usr/bin/env bash
# The gpu benchmarks in one go, for one H200: `bash benchmarks/h200.sh [SIZE [PART...]]`. SIZE is sd15, or tiny for the
# dry run on a CPU; without PARTs all are run. Results: $OUT. A part that fails, or takes too long, does not stop the others.
#
# What a machine lacks travels in wheels/, which git ignores: on one with a network and the same Python
#   python -m pip download --no-deps -d wheels ml_collections grain array_record tensorboardX portpicker
# and diffusers with what it requires, without which ControlNet's step is left out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
size=${1:-sd15} out=${OUT:-runs/h200} python=${PYTHON:-python3}
shift || true
parts=${*:-training peers_cost sampling_step sweep_together cache_build controlnet whole_run}
mkdir -p "$out"
if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-deps --no-index --find-links wheels wheels/*.whl || exit 1
fi
"$python" - <<'PYTHON' || exit 1
import importlib.util
needed = "jax flax optax orbax.checkpoint ml_collections grain array_record tensorboardX portpicker absl safetensors PIL tqdm"
missing = [name for name in needed.split() if importlib.util.find_spec(name.split(".")[0]) is None]
if missing:
    raise SystemExit(f"missing here: {', '.join(missing)}; put their wheels into wheels/ (see the head of this script)")
import jax
print("devices:", jax.devices())
PYTHON
# Parts compile many of the same programs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/h200/compiled}
if [ "$size" = sd15 ]; then
  limit=120
  build="--dtype=bfloat16 --examples=500 --draws=5 --batch=64 --peak_tflops=989"
  train="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=500 --draws=5 --steps=200"
  control="--dtype=bfloat16 --batch=8 --steps=20 --compile"
  whole="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=2000 --draws=5 --steps=5000"
  sweep="--sizes paper --trials 1 8 32 128 --steps=200 --log_every=50"
  sampling="--dtype=bfloat16 --mcm_dtype=bfloat16 --batch=8 --steps=20"
  peers="--dtype=bfloat16 --batch=8 --methods mcm-paper mcm-paper-paper full controlnet adapter lora"
else
  limit=600
  build="--examples=6 --draws=2 --batch=4" train="--batch=4 --examples=8 --draws=2 --steps=3"
  control="--batch=1 --steps=2" whole="--batch=4 --examples=8 --draws=2 --steps=12"
  sweep="--sizes tiny --trials 2 --steps=3 --examples=64" sampling="--mcm=tiny --steps=2 --rounds=1"
  peers="--batch=2 --rounds=1 --methods mcm-tiny full controlnet"
fi
# Some start processes of their own, or compile in PyTorch beside JAX: each takes what it needs.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
command_of() {
  case $1 in
    training) echo "benchmarks.training --size=$size $train --workdir=runs/h200/train" ;;
    peers_cost) echo "benchmarks.peers.cost --size=$size $peers" ;;
    sampling_step) echo "benchmarks.sampling_step --size=$size $sampling" ;;
    # Without the serial side, whose compiling would take most of the machine's time; from the shipped base of scenes.
    sweep_together) echo "benchmarks.sweep_together $sweep --repeats=1 --no_serial --workdir=runs/h200/sweep" ;;
    cache_build) echo "benchmarks.cache_build --size=$size $build --workdir=runs/h200/build" ;;
    controlnet) echo "benchmarks.controlnet_step --size=$size $control" ;;
    whole_run) echo "benchmarks.whole_run --size=$size $whole --workdir=runs/h200/whole" ;;
    *) return 1 ;;
  esac
}
for part in $parts; do
  command_of "$part" >/dev/null || { echo "no part '$part'" >&2; exit 2; }
done
failed=()
for part in $parts; do
  if [ "$part" = controlnet ] && ! "$python" -c "import diffusers" 2>/dev/null; then
    echo "no diffusers here: ControlNet's step in PyTorch is left out"
    continue
  fi
  echo "== $part"
  began=$SECONDS
  # shellcheck disable=SC2046
  timeout -k 20 "$limit" "$python" -m $(command_of "$part") --out="$out/${part}_$size.json" || failed+=("$part")
  echo "== $part took $((SECONDS - began)) s"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed, or took more than $limit s: ${failed[*]}" >&2
  exit 1
fi
