#!/usr/bin/env bash
# The first hour on a machine with a GPU: everything that is to be measured there, one JSON file a step.
#
#   benchmarks/gpu.sh [STEP ...]        steps: setup attention conv layers matmul bench long savings
#                                       (default: all of them)
#
# Needs Python 3.11 or later with a JAX that finds the GPU. What the benchmarks import beside it (flax, einops,
# jaxtyping) is installed by `setup` where a package index can be reached. Weights are random: nothing is downloaded.
# Results go to $OUT if it is set, else to benchmarks/results. A step that fails does not stop the others.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
PRESET=${PRESET:-1.3b}
SMALL=${SMALL:-}                # SMALL=--small PRESET=tiny: only to see that it runs
LIMIT=${LIMIT:-580}             # seconds a step
export PYTHONPATH=.
export PYTHONUNBUFFERED=1
# What was compiled stays for the next step and the next call.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/streamt1-xla}
# The whole device: nothing else runs on it, and the largest race wants it.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
mkdir -p "$OUT"
failed=()

NAME=$("$PYTHON" -c 'import jax; print(jax.devices()[0].device_kind.lower().replace(" ", "-"))' 2>/dev/null)
NAME=${NAME:-unknown}

run() { # run NAME COMMAND...: one step, its output kept beside its JSON
    local step=$1
    shift
    echo "== $step: $*"
    timeout "$LIMIT" "$@" 2>&1 | tee "$OUT/$NAME-$step.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then failed+=("$step ($code)"); fi
}

micro() { run "$1" "$PYTHON" benchmarks/micro.py "$1" $SMALL --json "$OUT/$NAME-$1.json"; }

bench() { # bench NAME OPTION...
    local step=$1
    shift
    run "$step" "$PYTHON" -c 'import sys; from streamt1_jax.cli import main; sys.exit(main(sys.argv[1:]))' \
        bench --preset "$PRESET" --json "$OUT/$NAME-$step.json" "$@"
}

step() {
    case $1 in
    setup)
        "$PYTHON" -c 'import einops, flax, jaxtyping' || "$PYTHON" -m pip install flax einops jaxtyping
        "$PYTHON" -c 'import jax; print(jax.__version__, jax.devices())'
        nvidia-smi
        ;;
    attention | layers | matmul) micro "$1" ;;
    conv)
        micro conv
        # A flag that this XLA does not know aborts the process, so it is tried in one of its own.
        run conv-nhwc env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_force_conv_nhwc=true" \
            "$PYTHON" benchmarks/micro.py conv $SMALL --json "$OUT/$NAME-conv-nhwc.json"
        ;;
    bench) bench bench --candidates 1,4 --chunks 12 --profile "$OUT/$NAME-profile" ;;
    long) bench long --candidates 1 --chunks 40 ;; # chunk 39 over chunk 9
    savings) run savings "$PYTHON" benchmarks/savings.py --preset "$PRESET" --rounds 5 --json "$OUT/$NAME-savings.json" ;;
    *)
        echo "unknown step $1, expected: setup attention conv layers matmul bench long savings" >&2
        exit 2
        ;;
    esac
}

for name in "${@:-all}"; do
    if [ "$name" = all ]; then
        for each in setup matmul attention conv layers bench long savings; do step "$each"; done
    else
        step "$name"
    fi
done

if [ "${#failed[@]}" -ne 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "done: $OUT"
