#!/usr/bin/env bash
# Put a report where a person finds it: compose/report.sh tiny-stdlib/report-q4_k_m
#
# Prints the page's path; an older report of the same name goes.
set -euo pipefail
# shellcheck source=compose/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"

reference=${1:?compose/report.sh REFERENCE}
name=${reference%%[@:]*}                                  # tiny-stdlib/report-q4_k_m
folder=.tunemill/reports/${name%%/*}-${name##*/report-} # as `tunemill pipeline` names it
mkdir -p .tunemill/reports
new=$(mktemp -d .tunemill/reports/.new.XXXXXX)
trap 'rm -rf "$new"' EXIT
# As a stream, because what the containers' user writes would not belong to the caller.
# shellcheck disable=SC2016 # expands in the container
compose run --rm --no-deps -T --entrypoint /bin/sh store -euc \
    'tunemill store pull "$0" /tmp/report >/dev/null; tar -C /tmp/report -c .' "$reference" </dev/null |
    tar -x --no-same-owner -C "$new" 2>/dev/null
chmod -R u+w,go+rX "$new"
rm -rf "$folder"
mv "$new" "$folder"
echo "report: $folder/report.html"
