#!/usr/bin/env bash
# Compile llama.cpp from llama-cpp-python's hash-locked source distribution, for $BACKEND (cpu or cuda),
# $CPU_VARIANTS (x86-64) and $CUDA_ARCHITECTURES.
# Leaves in /opt/llama: the package's wheel, lib/ for its libraries, and the source archive, which
# holds the converter. Runs while an image is built.
set -euo pipefail
# shellcheck source=images/base/site.sh
. /base/site.sh

PATH=/opt/build/bin:$PATH
work=$(mktemp -d)
pip download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
    --find-links /wheels --requirement /locks/llama.txt --dest "$work"
mkdir -p /opt/llama/lib "$work/source"
mv "$work"/*.tar.gz /opt/llama/
tar -xzf /opt/llama/*.tar.gz -C "$work/source" --strip-components 1

options=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_SKIP_INSTALL_RPATH=OFF
    "-DCMAKE_INSTALL_RPATH=\$ORIGIN" -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF
    -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON)
if [ "$(uname -m)" = x86_64 ]; then
    # Upstream compiles fourteen variants, which takes longer than all the rest.
    sed -i -E "/^ *ggml_add_cpu_backend_variant\(/{/\((${CPU_VARIANTS// /|})[ )]/!d}" \
        "$work/source/vendor/llama.cpp/ggml/src/CMakeLists.txt"
fi
if [ "$BACKEND" = cuda ]; then
    options+=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$CUDA_ARCHITECTURES")
fi
cmake -S "$work/source/vendor/llama.cpp" -B "$work/build" "${options[@]}" >"$work/log" || { cat "$work/log"; exit 1; }
cmake --build "$work/build" --target llama >"$work/log" 2>&1 || { tail -n 100 "$work/log"; exit 1; }
find "$work/build/bin" -name '*.so*' -exec cp --no-dereference {} /opt/llama/lib/ \;
strip --strip-unneeded /opt/llama/lib/*.so

# The Python package without its own copy of the libraries.
CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir /opt/llama "$work/source"
rm -rf "$work"
