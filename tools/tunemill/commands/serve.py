"""``tunemill serve``: a GGUF behind an API that OpenAI's clients speak.

llama.cpp's own server does the work, with the libraries that infer uses. Before it starts, the files are
verified: those of an artifact by its digests, a pulled folder by finding the artifact with the same files.
A quantization of another kind of host is refused as infer refuses it, or proved by its probe set.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunemill import options
from tunemill.errors import ConfigurationError, UsageError
from tunemill.ggufs import find_gguf, first_part
from tunemill.progress import Progress

if TYPE_CHECKING:
    from tunemill.store import Artifact, Store

KEY = "TUNEMILL_API_KEY"
CONTEXT = 4096  # tokens of a request; a long context is memory taken whether or not anyone uses it
UNKNOWN = "a host that is not known"


@dataclass(frozen=True)
class Served:
    """A model to serve."""

    reference: str
    folder: Path
    """Where its files are, or will be."""
    bound_to: str | None
    """The class of host it is trusted on; None where it is trusted on all."""
    artifact: Artifact | None
    """None for a folder whose files are no artifact's."""


@click.command(
    epilog="\b\nExamples:\n  tunemill serve tiny-stdlib/gguf-q4_k_m\n"
    "  tunemill serve models/tiny-stdlib-Q4_K_M --port 0 --dry-run"
)
@click.argument("reference")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 for a free one.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Its first line is the key that requests need; else {KEY}, if that is set.",
)
@click.option(
    "--parallel", default=2, show_default=True, type=click.IntRange(1, 256), help="Requests answered at once."
)
@click.option(
    "--ctx-size",
    type=click.IntRange(min=256),
    metavar="TOKENS",
    help=f"Tokens remembered; each of --parallel requests has an equal share.  "
    f"[default: {CONTEXT} for each, or what the model was trained for]",
)
@click.option(
    "--threads",
    default=0,
    type=click.IntRange(0, 256),
    help="Worker threads; 0 takes one per core.  [default: 0]",
)
@click.option(
    "--n-gpu-layers",
    default=-1,
    show_default=True,
    type=click.IntRange(min=-1),
    help="Layers computed on the GPU where llama.cpp was built for one; -1 for all.",
)
@options.reprove
@options.dry_run
@options.store
@options.json
def serve(
    reference: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    parallel: int,
    ctx_size: int | None,
    threads: int,
    n_gpu_layers: int,
    reprove: bool,
    dry_run: bool,
    store_url: str,
    as_json: bool,
) -> None:
    """Serve a GGUF to OpenAI's clients.

    REFERENCE is an artifact (name, name:tag or name@sha256:…) or a folder that 'tunemill pull' made. It is
    served until Ctrl-C. Prints the address when the model is loaded, verified and asked as in training.
    Other machines reach it only with --host, and then an API key is needed.
    """
    from tunemill.gguf.server import find_server
    from tunemill.prompting import read_prompting
    from tunemill.serving import Settings, check_rendering, choose_address, running

    progress = Progress()
    key = _key(api_key_file)
    address = choose_address(host, port, protected=key is not None)
    server = find_server()
    found = _find(reference, store_url, progress)
    _refuse_foreign(found, reprove)
    if dry_run:
        click.echo(f"would serve {found.reference} at {address.url}, with {server}")
        return
    _fetch(found, store_url, progress)
    path = find_gguf(found.folder)
    prompting = read_prompting(found.folder)
    size = ctx_size or parallel * _context(path)
    _prove(found, path, reprove, progress)
    alias = found.reference.partition("@")[0]
    settings = Settings(path, alias, address, parallel, size, threads or os.cpu_count() or 1, n_gpu_layers)
    with running(server, settings, prompting, key) as started:
        asked = check_rendering(started, found.folder, prompting)
        progress.say(f"{found.reference}: verified; {asked} conversations rendered as in training")
        record = {
            "url": address.url,
            "model": alias,
            "reference": found.reference,
            "protected": key is not None,
        }
        click.echo(json.dumps(record) if as_json else address.url)
        started.wait()


def _context(path: Path) -> int:
    """Return how many tokens a request may have unless the user says so."""
    from tunemill.gguf.header import read_gguf

    metadata = read_gguf(path).metadata
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return min(CONTEXT, trained) if isinstance(trained, int) and trained > 0 else CONTEXT


def _key(file: Path | None) -> str | None:
    """Return the key that requests need, if any.

    Raises:
        UsageError: the file cannot be read, or begins with no key.
    """
    if file is None:
        return os.environ.get(KEY) or None
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} cannot be read: {error}") from error
    key = lines[0].strip() if lines else ""
    if not key or "," in key or not key.isprintable():
        raise UsageError(f"--api-key-file {file}: its first line is no key (printable, without commas)")
    return key


def _find(reference: str, store_url: str, progress: Progress) -> Served:
    """Return what is to be served.

    Raises:
        UsageError: there is no such artifact or folder, or it is no GGUF.
    """
    store = options.open_the_store(store_url)
    if not Path(reference).is_dir():
        artifact = store.resolve(reference)
        if artifact.kind != "gguf":
            raise UsageError(f"{artifact.reference} is {artifact.kind}, expected gguf")
        return _served(store, artifact, None)
    folder = Path(reference).absolute()
    find_gguf(folder)
    same = _artifact_of(store, folder, progress)
    if same is None:
        progress.say(f"no artifact in {store_url} has the files of {reference}")
        return Served(f"{folder.name}", folder, UNKNOWN, None)
    return _served(store, same, folder)


def _served(store: Store, artifact: Artifact, folder: Path | None) -> Served:
    from tunemill.store.pull import cache_directory

    made = store.provenance(artifact)
    bound = str(made.host["host_class"]) if made.stage == "quantize" and made.host.get("host_class") else None
    place = folder or cache_directory() / "served" / artifact.digest.removeprefix("sha256:")[:16]
    return Served(artifact.reference, place, bound, artifact)


def _artifact_of(store: Store, folder: Path, progress: Progress) -> Artifact | None:
    """Return the artifact whose files a folder holds, byte by byte."""
    from tunemill.files import sha256_file
    from tunemill.store.manifest import File, content_digest

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = []
    with progress.task("verify", sum(path.stat().st_size for path in paths), "B") as task:
        for path in paths:
            size = path.stat().st_size
            files.append(File(path.relative_to(folder).as_posix(), sha256_file(path), size))
            task.advance(size)
    content = content_digest("gguf", files)
    for name in store.names():
        newest = store.find(name)
        if newest is None or newest.kind != "gguf":
            continue
        for revision in store.history(name):
            one = store.find(f"{name}@{revision.digest}")
            if one is not None and one.content == content:
                return one
    return None


def _refuse_foreign(found: Served, reprove: bool) -> None:
    """See that the model is trusted on this host, or is going to be proved.

    Raises:
        ConfigurationError: naming both classes of host and what can be done.
    """
    from tunemill.host import this_host

    here = this_host().host_class
    if reprove or found.bound_to in (None, here):
        return
    if found.artifact is None:
        raise ConfigurationError(
            f"where the files in {found.folder} are from is not known: give --store with the one they were "
            "pulled from, or --reprove to have them prove themselves by their probe set"
        )
    run, _, kind = found.artifact.name.partition("/")
    words = ["tunemill", "quantize", "--run", run, "--set", f"quant={kind.removeprefix('gguf-').upper()}"]
    raise ConfigurationError(
        f"{found.reference} was quantized on another kind of host ({found.bound_to}) than this one ({here}): "
        f"--reprove proves it here by its probe set; '{shlex.join(words)}' makes it here"
    )


def _fetch(found: Served, store_url: str, progress: Progress) -> None:
    """Bring an artifact's files into the cache's folder of served models, or verify those there."""
    from tunemill.store.pull import cache_directory, check_placed

    if found.artifact is None or found.folder.parent.name != "served":
        return
    first_part(file.path for file in found.artifact.files)
    if found.folder.exists():
        check_placed(found.artifact.files, found.folder, cache_directory(), progress)
        return
    options.open_the_store(store_url).pull(found.artifact, found.folder, progress)


def _prove(found: Served, path: Path, asked: bool, progress: Progress) -> None:
    """Load the model once where a crash does no harm; prove one of another host by its probe set."""
    from tunemill.host import this_host
    from tunemill.infer.probe import check_loads

    check_loads(path)
    if not asked or found.bound_to in (None, this_host().host_class):
        return
    from tunemill.infer.config import InferConfig
    from tunemill.infer.model import Model
    from tunemill.infer.reprove import reprove
    from tunemill.work import Input, Work

    given = Input(found.reference, "", "gguf", found.folder, {}, found.bound_to)
    nothing: Any = None  # a proof saves no state
    with tempfile.TemporaryDirectory(prefix="tunemill-") as temporary, Model(path) as model:
        scratch = Path(temporary)
        reprove(
            Work(
                InferConfig(reprove=True),
                {"gguf": given},
                scratch,
                scratch,
                progress,
                nothing,
                threading.Event(),
            ),
            model,
        )
