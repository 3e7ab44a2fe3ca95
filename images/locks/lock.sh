#!/usr/bin/env bash
# Resolve the images' Python packages anew: one resolution for all (all.txt), of which each image takes
# a part, with the hash of every file that may be installed. Run by `make lock` after a change of
# pyproject.toml's dependencies; review the difference like any other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
uv=${UV:-uv}
locks=images/locks

# Torch stands apart: its builds for CPU and CUDA have one version and different files (torch-*.txt),
# and the index's build would bring gigabytes of CUDA into every lock. What it needs otherwise is here.
apart=$(mktemp)
trap 'rm -f "$apart"' EXIT
cat >"$apart" <<'TOML'
dependency-metadata = [
  { name = "torch", version = "2.13.0", requires-dist = ["filelock", "typing-extensions>=4.10", "setuptools>=77.0.3", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"] },
]
TOML

compile() {
    local target=$1
    shift
    "$uv" pip compile --quiet --config-file "$apart" --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --output-file "$locks/$target.txt" "$@"
}

compile all --upgrade --extra all --extra tracking --no-emit-package torch pyproject.toml
# Compiled once by images/base/llama.sh, never from an index's wheel.
grep -A 1 '^llama-cpp-python==' "$locks/all.txt" >"$locks/llama.txt"

# image: the extras it has, and -packages that come with them and that no stage of it uses
while read -r image words; do
    arguments=()
    for word in $words; do
        case $word in
            -*) arguments+=(--no-emit-package "${word#-}") ;;
            *) arguments+=(--extra "$word") ;;
        esac
    done
    compile "$image" --constraint "$locks/all.txt" --no-emit-package torch \
        --no-emit-package llama-cpp-python "${arguments[@]}" pyproject.toml
done <<'IMAGES'
prepare prepare
train train tracking convert
merge merge -setuptools -hf-xet -typer -rich -pygments -markdown-it-py -mdurl -shellingham
convert convert -setuptools -hf-xet -typer -rich -pygments -markdown-it-py -mdurl -shellingham
quantize quantize
infer infer evaluate
store kube
IMAGES

# By itself: GPTQModel wants an older NumPy than the others have.
compile gptq --no-emit-package torch --extra gptq pyproject.toml

# What builds the package and llama.cpp; none of it reaches an image.
echo 'cmake
ninja
scikit-build-core
setuptools>=77
wheel
cyclonedx-bom' | compile build -

# PyPI's build for Linux, with the CUDA it needs.
echo 'torch==2.13.0 ; sys_platform == "linux"' |
    "$uv" pip compile --quiet --python-platform linux --python-version 3.12 --generate-hashes --no-header \
        --no-annotate --constraint "$locks/all.txt" --output-file "$locks/torch-cuda.txt" -
