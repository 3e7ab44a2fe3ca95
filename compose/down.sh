#!/usr/bin/env bash
# Stop the lab. What is stored stays; `--volumes` deletes the store, the cache and the containers' secrets.
set -euo pipefail
# shellcheck source=compose/engine.sh
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
need_engine
compose --profile '*' down --remove-orphans "$@"
