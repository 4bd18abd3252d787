#!/usr/bin/env bash
# Runs the tests as other processors and other environments would, and prints one line for each setting.
#
#   tests/every_machine.sh [fast|slow|all] [SETTING ...]
#
# fast (the default) is what `make test` runs, slow is the rest of `make test-all`, all is both. Without a SETTING every
# setting below runs, as far as this processor goes. Each setting shuffles the tests with a seed of its own; the log of
# a setting is in $LOGS (default: a new temporary folder). The limits are those that PyTorch (ATEN_CPU_CAPABILITY),
# oneDNN (ONEDNN_MAX_CPU_ISA) and MKL (MKL_ENABLE_INSTRUCTIONS) document.
set -uo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
case ${1:-fast} in
    fast) marks="not slow and not faults" ;;
    slow) marks="slow and not faults" ;;
    all) marks="not faults" ;;
    *) echo "usage: $0 [fast|slow|all] [SETTING ...]"; exit 2 ;;
esac
shift || true
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
flags=$(grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || sysctl -n machdep.cpu.features machdep.cpu.leaf7_features 2>/dev/null)

settings=(as-it-is:1 as-it-is:2)
if [ "$(uname -m)" = x86_64 ]; then
    settings+=(sse:1 sse:2)
    [[ ${flags,,} == *avx2* ]] && settings+=(avx2:1 avx2:2)
    [[ ${flags,,} == *avx512f* ]] && settings+=(avx512:1 avx512:2)
    [[ ${flags,,} == *amx_bf16* ]] && settings+=(no-amx:1)
else
    settings+=(default:1 default:2)
fi
settings+=(environment:1 load:1)
[ $# -gt 0 ] && settings=("$@")

failed=0 seed=0
for setting in "${settings[@]}"; do
    name=${setting%:*} threads=${setting#*:} seed=$((seed + 1))
    # Inductor keeps what it compiled for one instruction set, and would give it to the next
    limits=(OMP_NUM_THREADS="$threads" GPTLAB_TEST_ORDER="$seed" TORCHINDUCTOR_CACHE_DIR="$logs/inductor-$name")
    workers=$((threads > 1 ? 1 : 2)) where=$repo busy=()  # with more threads than cores all would be slow
    case $name in
        as-it-is) ;;
        default) limits+=(ATEN_CPU_CAPABILITY=default) ;;
        sse) limits+=(ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2) ;;
        avx2) limits+=(ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2) ;;
        avx512) limits+=(ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512) ;;
        no-amx) limits+=(ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16) ;;
        environment)  # another locale, home, time zone and current folder, and a git that finds no repository
            home=$(mktemp -d) where=/
            limits+=(LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii TZ=Pacific/Chatham
                HOME="$home" GIT_DIR=/nonexistent COLUMNS=40) ;;
        load)  # two processes for each core that do nothing but take time
            for _ in $(seq $((2 * $(nproc)))); do while :; do :; done & busy+=($!); done ;;
        *) echo "$setting: no such setting"; exit 2 ;;
    esac
    began=$SECONDS
    (cd "$where" && env "${limits[@]}" "$repo/.venv/bin/python" -m pytest -c "$repo/pyproject.toml" --rootdir "$repo" \
        -n "$workers" --dist loadgroup -q -m "$marks" "$repo/tests") >"$logs/$setting.log" 2>&1 || failed=1
    [ ${#busy[@]} -gt 0 ] && kill "${busy[@]}"
    printf '%-14s %5d s  %s\n' "$setting" $((SECONDS - began)) "$(tail -n 1 "$logs/$setting.log")"
    grep -E '^(FAILED|ERROR)' "$logs/$setting.log"
done
echo "logs: $logs"
exit $failed
