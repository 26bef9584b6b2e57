#!/usr/bin/env bash
# The first hour on a machine with a GPU: everything that is to be measured there, one JSON file a step.
#
#   benchmarks/gpu.sh [STEP ...]        default: all of them, in this order
#
#   setup       what is there: versions, the device
#   matmul      matrix products of the DiT's sizes
#   attention   4680 queries on 18720 keys, 12 heads of 128, batch 1 and 4
#   conv        the convolution race of the VAE; conv-nhwc: the same under an XLA flag
#   layers      scan over the DiT's layers, unrolled 1, 3 and fully
#   plain       plain streaming, one candidate: frames/s, first frames, with a profile
#   bench1 bench4 bench8   1, 2x2 and 2x4 candidates of the search, a process each: memory is the lane's own
#   hd          plain streaming at 1280x720
#   long1 long4 chunk 39 over chunk 9, plain and 2x2, where every chunk is appended to the sinks until they are full
#   savings     each exact saving on and off
#   fidelity    what every fast setting costs against float32, 32 chunks of the embedded model
#   endless     200 chunks of the tiny model: time of a chunk and memory must not grow
#   rewards     both published reward models on random weights, and a chunk of 2x2 candidates with them; needs torch
#
# A step ends within LIMIT seconds (580), so any of them fits a call of ten minutes. Those of bench, micro and savings
# rewrite their JSON after every round, race or saving: one that runs out of time leaves what it has done.
#
# Needs Python 3.11 or later (3.12 with jax 0.11 where this was written for) with a JAX that finds the GPU. What the
# benchmarks import beside it is installed by `setup` where a package index can be reached. Weights are random: nothing
# is downloaded. Results go to $OUT if it is set, else to benchmarks/results. A step that fails does not stop the others.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
PRESET=${PRESET:-1.3b}
FIDELITY=${FIDELITY:-mini}      # PRESET=tiny FIDELITY=tiny REWARDS=tiny: only to see that it runs
REWARDS=${REWARDS:-full}
LIMIT=${LIMIT:-580}             # seconds a step
export PYTHONPATH=.
export PYTHONUNBUFFERED=1
# What was compiled stays for the next step and the next call.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/streamt1-xla}
# The whole device: nothing else runs on it, and the largest race wants it. Only rewards shares it with torch.
GIVEN=${XLA_PYTHON_CLIENT_MEM_FRACTION:-}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${GIVEN:-0.92}
mkdir -p "$OUT"
ALL=(setup matmul attention conv layers plain bench1 bench4 bench8 hd long1 long4 savings fidelity endless rewards)
PLAIN=(--candidates 1 --set search.noise_propagation=false --set search.sinking=false) # configs/longlive.py
# The native rewards of random weights append nothing at the usual thresholds, so a window would never grow.
APPEND=(--set search.short_threshold=-1000 --set search.long_threshold=-1000)
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

micro() { run "$1" "$PYTHON" benchmarks/micro.py "$1" --preset "$PRESET" --json "$OUT/$NAME-$1.json"; }

bench() { # bench NAME OPTION...
    local step=$1
    shift
    run "$step" "$PYTHON" -c 'import sys; from streamt1_jax.cli import main; sys.exit(main(sys.argv[1:]))' \
        bench --preset "$PRESET" --json "$OUT/$NAME-$step.json" "$@"
}

step() {
    case $1 in
    setup)
        "$PYTHON" -c 'import einops, flax, ftfy, jaxtyping, safetensors, tokenizers' ||
            run install "$PYTHON" -m pip install 'flax>=0.12' einops ftfy jaxtyping safetensors tokenizers
        run setup "$PYTHON" -c 'import sys, jax; print(sys.version, jax.__version__, jax.devices())'
        run device nvidia-smi
        ;;
    attention | layers | matmul) micro "$1" ;;
    conv)
        micro conv
        # A flag that this XLA does not know aborts the process, so it is tried in one of its own.
        run conv-nhwc env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_force_conv_nhwc=true" \
            "$PYTHON" benchmarks/micro.py conv --preset "$PRESET" --json "$OUT/$NAME-conv-nhwc.json"
        ;;
    plain) bench plain "${PLAIN[@]}" --profile "$OUT/$NAME-profile" ;;
    bench1) bench bench1 --candidates 1 ;;
    bench4) bench bench4 --candidates 4 ;;
    bench8) bench bench8 --candidates 8 ;;
    hd) bench hd "${PLAIN[@]}" --height 720 --width 1280 --chunks 10 ;;
    long1) bench long1 "${PLAIN[@]}" --chunks 40 ;;
    long4) bench long4 --candidates 4 --chunks 40 "${APPEND[@]}" ;;
    savings) run savings "$PYTHON" benchmarks/savings.py --preset "$PRESET" --rounds 5 --json "$OUT/$NAME-savings.json" ;;
    fidelity) run fidelity "$PYTHON" benchmarks/fidelity.py --preset "$FIDELITY" --chunks 32 --json "$OUT/$NAME-fidelity.json" ;;
    endless) run endless "$PYTHON" benchmarks/endless.py --chunks 200 --json "$OUT/$NAME-endless.json" ;;
    rewards)
        if [ -z "$GIVEN" ]; then unset XLA_PYTHON_CLIENT_MEM_FRACTION; fi # the benchmark leaves torch its part
        run rewards "$PYTHON" benchmarks/rewards.py --size "$REWARDS" --beside "$PRESET" --json "$OUT/$NAME-rewards.json"
        export XLA_PYTHON_CLIENT_MEM_FRACTION=${GIVEN:-0.92}
        ;;
    *)
        echo "unknown step $1, expected: ${ALL[*]}" >&2
        exit 2
        ;;
    esac
}

if [ $# -eq 0 ] || [ "$1" = all ]; then set -- "${ALL[@]}"; fi
for name in "$@"; do step "$name"; done

if [ "${#failed[@]}" -ne 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "done: $OUT"
