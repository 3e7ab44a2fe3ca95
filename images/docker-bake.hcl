# All images: `docker buildx bake -f images/docker-bake.hcl` builds those for CPUs, with `cuda` those for
# NVIDIA GPUs. Every variable can be set in the environment; docs/images.md says what each is for.

variable "REGISTRY" { default = "tunemill" }
variable "TAG" { default = "dev" } # also the version in the label
variable "REVISION" { default = "unknown" }
variable "SOURCE" { default = "unknown" }

# Base images, pinned; an air-gapped site names its own.
variable "BASE" {
  default = "docker.io/library/debian:bookworm-slim@sha256:7c7b2c966bc9ee8cedfeef67e0e279108992c77681fa595db4a9d65c06ccc587"
}
# For llama.cpp: the last CUDA whose compiler knows Pascal and Volta well, and drivers from 525 on run it.
variable "CUDA_BASE" {
  default = "docker.io/nvidia/cuda:12.6.3-runtime-ubuntu24.04@sha256:92906d87596d638d35015c6353053121bd299d25943b875763321653884ba924"
}
variable "CUDA_BUILD_BASE" {
  default = "docker.io/nvidia/cuda:12.6.3-devel-ubuntu24.04@sha256:392c0df7b577ecae17a17f6ba7f2009c217bb4422f8431c053ae9af61a8c148a"
}
# For PyTorch, whose wheels on PyPI bring CUDA 13.0: Turing and later, drivers from 580 on.
variable "CUDA_TORCH_BASE" {
  default = "docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701"
}

# What llama.cpp is compiled for. On x86-64 one library for each of these processors, of which the best is
# loaded: AVX2 (haswell, the least that is needed), AVX-512, VNNI, VNNI without AVX-512, AMX.
variable "CPU_VARIANTS" { default = "haswell skylakex icelake alderlake sapphirerapids" }
# Pascal to Hopper, the GPUs that groups and clusters have; the code for the newest is also kept in a form
# that drivers compile for later ones.
variable "CUDA_ARCHITECTURES" { default = "60-real;61-real;70-real;75-real;80-real;86-real;89-real;90" }

# Where packages come from. Secrets hold what must not be seen in an image's history.
variable "WHEELS" { default = "images/wheels" }
variable "TORCH_INDEX" { default = "https://download.pytorch.org/whl/cpu" }
variable "PIP_CONF" { default = "" }
variable "APT_SOURCES" { default = "" }
variable "CA_BUNDLE" { default = "" }

group "default" { targets = ["cpu"] }
group "cpu" { targets = ["prepare", "train", "merge", "convert", "quantize", "infer", "store"] }
group "cuda" { targets = ["train-cuda", "gptq-cuda", "quantize-cuda", "infer-cuda"] }

target "_site" {
  context  = "."
  contexts = { wheels = WHEELS }
  secret = [
    for id, file in { pip_conf = PIP_CONF, apt_sources = APT_SOURCES, ca_bundle = CA_BUNDLE } :
    "id=${id},src=${file}" if file != ""
  ]
}

# What is shared: images/base/Dockerfile.
target "_base" {
  inherits   = ["_site"]
  dockerfile = "images/base/Dockerfile"
  args       = { BASE = BASE, TORCH_INDEX = TORCH_INDEX, CPU_VARIANTS = CPU_VARIANTS }
}
target "runtime" {
  inherits = ["_base"]
  target   = "runtime"
}
target "build" {
  inherits = ["_base"]
  target   = "build"
}
target "code" {
  inherits = ["_base"]
  target   = "code"
}
target "torch" {
  inherits = ["_base"]
  target   = "torch"
}
target "llama" {
  inherits = ["_base"]
  target   = "llama"
}

target "_image" {
  inherits = ["_site"]
  contexts = {
    build   = "target:build"
    runtime = "target:runtime"
    code    = "target:code"
  }
  labels = {
    "org.opencontainers.image.source"   = SOURCE
    "org.opencontainers.image.revision" = REVISION
    "org.opencontainers.image.version"  = TAG
    "org.opencontainers.image.licenses" = "Apache-2.0"
  }
}

target "prepare" {
  inherits   = ["_image"]
  dockerfile = "images/prepare/Dockerfile"
  contexts   = { torch = "target:torch" }
  tags       = ["${REGISTRY}/prepare:${TAG}"]
}
target "train" {
  inherits   = ["_image"]
  dockerfile = "images/train/Dockerfile"
  contexts   = { torch = "target:torch", llama = "target:llama" }
  tags       = ["${REGISTRY}/train:${TAG}"]
}
target "merge" {
  inherits   = ["_image"]
  dockerfile = "images/merge/Dockerfile"
  contexts   = { torch = "target:torch" }
  tags       = ["${REGISTRY}/merge:${TAG}"]
}
target "convert" {
  inherits   = ["_image"]
  dockerfile = "images/convert/Dockerfile"
  contexts   = { torch = "target:torch", llama = "target:llama" }
  tags       = ["${REGISTRY}/convert:${TAG}"]
}
target "quantize" {
  inherits   = ["_image"]
  dockerfile = "images/quantize/Dockerfile"
  contexts   = { llama = "target:llama" }
  tags       = ["${REGISTRY}/quantize:${TAG}"]
}
target "infer" {
  inherits   = ["_image"]
  dockerfile = "images/infer/Dockerfile"
  contexts   = { llama = "target:llama" }
  tags       = ["${REGISTRY}/infer:${TAG}"]
}
target "store" {
  inherits   = ["_image"]
  dockerfile = "images/store/Dockerfile"
  tags       = ["${REGISTRY}/store:${TAG}"]
}

# For NVIDIA GPUs. Both kinds of base are Ubuntu 24.04, so one environment's paths serve both.
target "_base-cuda" {
  inherits = ["_base"]
  args = {
    BASE               = CUDA_BASE
    BUILD_BASE         = CUDA_BUILD_BASE
    BACKEND            = "cuda"
    CUDA_ARCHITECTURES = CUDA_ARCHITECTURES
    TORCH              = "torch-cuda"
    TORCH_INDEX        = ""
  }
}
target "runtime-cuda" {
  inherits = ["_base-cuda"]
  target   = "runtime"
}
target "runtime-torch-cuda" {
  inherits = ["_base-cuda"]
  target   = "runtime"
  args     = { BASE = CUDA_TORCH_BASE }
}
target "build-cuda" {
  inherits = ["_base-cuda"]
  target   = "build"
}
target "code-cuda" {
  inherits = ["_base-cuda"]
  target   = "code"
}
target "torch-cuda" {
  inherits = ["_base-cuda"]
  target   = "torch"
}
target "llama-cuda" {
  inherits = ["_base-cuda"]
  target   = "llama"
}
target "_image-cuda" {
  inherits = ["_image"]
  args     = { BACKEND = "cuda" }
  contexts = {
    build   = "target:build-cuda"
    runtime = "target:runtime-cuda"
    code    = "target:code-cuda"
  }
}
target "train-cuda" {
  inherits   = ["_image-cuda"]
  dockerfile = "images/train/Dockerfile"
  contexts   = { torch = "target:torch-cuda", llama = "target:llama", runtime = "target:runtime-torch-cuda" }
  tags       = ["${REGISTRY}/train:${TAG}-cuda"]
}
target "gptq-cuda" {
  inherits   = ["_image-cuda"]
  dockerfile = "images/gptq/Dockerfile"
  contexts   = { torch = "target:torch-cuda", runtime = "target:runtime-torch-cuda" }
  tags       = ["${REGISTRY}/gptq:${TAG}-cuda"]
}
target "quantize-cuda" {
  inherits   = ["_image-cuda"]
  dockerfile = "images/quantize/Dockerfile"
  contexts   = { llama = "target:llama-cuda" }
  tags       = ["${REGISTRY}/quantize:${TAG}-cuda"]
}
target "infer-cuda" {
  inherits   = ["_image-cuda"]
  dockerfile = "images/infer/Dockerfile"
  contexts   = { llama = "target:llama-cuda" }
  tags       = ["${REGISTRY}/infer:${TAG}-cuda"]
}
