#!/usr/bin/env bash
# What `tunemill pipeline` does, each stage in its own container; takes the same words.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MAKE_PID=${MAKE_PID:-$PPID}

quants=() words=() shared=(fetch prepare train merge convert) converted=F16
while [ $# -gt 0 ]; do
    case "$1" in
        --quant)
            [ $# -gt 1 ] || { echo "compose: --quant needs a type: for example Q4_K_M" >&2; exit 2; }
            for quant in ${2//,/ }; do quants+=("$(tr '[:lower:]' '[:upper:]' <<<"$quant")"); done
            shift ;;
        outtype=*) converted=$(tr '[:lower:]' '[:upper:]' <<<"${1#outtype=}") && words+=("$1") ;;
        imatrix=true) shared+=(imatrix) && words+=("$1") ;;
        *) words+=("$1") ;;
    esac
    shift
done
[ ${#quants[@]} -gt 0 ] || quants=(Q4_K_M)

run() { # run STAGE WORDS…
    echo "== $1" >&2
    "$here/run.sh" "$@"
}

reports=()

for stage in "${shared[@]}"; do
    run "$stage" ${words[@]+"${words[@]}"}
done
for quant in "${quants[@]}"; do
    stages=(quantize infer evaluate)
    [ "$quant" != "$converted" ] || stages=(infer evaluate) # it is what convert has made
    for stage in "${stages[@]}"; do
        made=$(run "$stage" ${words[@]+"${words[@]}"} --set quant="$quant")
        echo "$made"
    done
    reports+=("$made")
done
for report in "${reports[@]}"; do
    "$here/report.sh" "$report"
done
