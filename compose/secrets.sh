#!/usr/bin/env bash
# Make the keys of the bundled server, once: random, mode 600, never printed, never replaced.
set -euo pipefail
folder=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/secrets}
umask 077

random() { # random BYTES: as hex digits
    od -An -v -tx1 -N "$1" /dev/urandom | tr -d ' \n'
}

mkdir -p "$folder"
chmod 700 "$folder"
if [ ! -e "$folder/credentials" ]; then
    new=$(mktemp "$folder/.new.XXXXXX")
    trap 'rm -f "$new"' EXIT
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$(random 10)" "$(random 20)" >"$new"
    # A link, because it never replaces what another `make up` has just put there.
    ln "$new" "$folder/credentials" 2>/dev/null || [ -e "$folder/credentials" ]
fi
chmod 600 "$folder/credentials"
