"""``tunemill pull``: a finished GGUF on the machine that will run it, and the command that runs it.

The files come as ``tunemill store pull`` brings them: verified, resumed after a kill, there whole or
not at all. That this host cannot run them is said before they travel, where their facts tell.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tunemill import options
from tunemill.errors import BadDataError, ConfigurationError, UsageError
from tunemill.ggufs import first_part
from tunemill.progress import Progress

if TYPE_CHECKING:
    from tunemill.gguf.header import GgufHeader
    from tunemill.recipe import Choice
    from tunemill.store import Artifact, Store

PLACE = Path("models")
PROBES, ANSWERS = "probes.json", "parity.npz"  # what a model is proved by; named here without loading NumPy


@dataclass(frozen=True)
class Found:
    """What is to be pulled, and by which names it is run."""

    store: Store
    store_url: str
    """As the user wrote it."""
    artifact: Artifact
    choice: Choice
    """The user's, with the run that the artifact belongs to, and without ``quant``."""
    quant: str


@click.command(
    epilog="\b\nExamples:\n  tunemill pull --model tiny --task stdlib --quant Q4_K_M\n"
    "  tunemill pull tiny-stdlib/gguf-f16 --to /tmp/tiny"
)
@click.argument("reference", required=False)
@options.recipe
@click.option(
    "--quant", metavar="TYPE", help="Which quantization; F16 for the unquantized one.  [default: Q4_K_M]"
)
@click.option(
    "--to",
    "destination",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="Where to put it.  [default: models/RUN-TYPE]",
)
@options.store
@options.json
def pull(
    reference: str | None,
    quant: str | None,
    destination: Path | None,
    store_url: str,
    as_json: bool,
    recipe_file: str | None,
    **given: Any,
) -> None:
    """Fetch a finished GGUF, verified, and say how to run it.

    Prints the path of the GGUF, then the command that runs it here over its task's data. REFERENCE is
    name, name:tag or name@sha256:…, in place of model, task and type. A pull that was killed goes on; a
    finished one is verified again. The files are read-only, since they may share bytes with the cache.
    """
    from tunemill.gguf.header import read_gguf
    from tunemill.recipe import Choice

    progress = Progress()
    choice = Choice(file=recipe_file, **given)
    found = find(options.open_the_store(store_url), store_url, reference, choice, quant)
    place = destination or PLACE / f"{found.choice.run}-{found.quant}"
    fetched = _fetch(found, place, progress)
    header = read_gguf(place / first_part(file.path for file in found.artifact.files))
    if not found.artifact.facts.get("architecture"):
        _refuse_unknown(header.architecture, found.artifact)
    foreign = _made_elsewhere(found)
    if foreign:
        progress.say(foreign)
    command, obstacle = how_to_run(found, header)
    if as_json:
        record = {"path": str(header.path), "fetched": fetched, "made_elsewhere": bool(foreign)}
        record |= {"architecture": header.architecture, "file_type": header.file_type}
        click.echo(json.dumps({"reference": found.artifact.reference, **record, "command": command}))
        return
    click.echo(str(header.path))
    if command:
        click.echo(command)
    else:
        progress.say(f"no command runs it here: {obstacle}")


def find(store: Store, store_url: str, reference: str | None, choice: Choice, quant: str | None) -> Found:
    """Return what a reference, or else model, task and quantization, mean in a store.

    Raises:
        UsageError: there is none, or it is no GGUF.
    """
    from tunemill.recipe import resolve
    from tunemill.stages import known_keys, load_stage

    if quant:
        choice = replace(choice, settings=(*choice.settings, f"quant={quant}"))
    recipe, infer = resolve(choice, known_keys()), load_stage("infer")
    artifact = store.resolve(reference or recipe.format(infer.inputs["gguf"], recipe.configure(infer)))
    if artifact.kind != "gguf":
        raise UsageError(
            f"{artifact.reference} is {artifact.kind}, expected gguf: 'tunemill store pull' takes any"
        )
    run, _, kind = artifact.name.partition("/")
    settings = tuple(word for word in choice.settings if not word.startswith("quant="))
    choice = replace(choice, run=run, settings=settings)
    return Found(store, store_url, artifact, choice, kind.removeprefix("gguf-").upper())


def how_to_run(found: Found, header: GgufHeader) -> tuple[str | None, str]:
    """Return the command that infers with it over its task's data, or None and why there is none."""
    from tunemill.prompting import read_prompting
    from tunemill.recipe import resolve
    from tunemill.stage import plan
    from tunemill.stages import known_keys, load_stage

    if header.metadata.get("general.type") == "adapter":
        return None, "it is an adapter, which needs the GGUF of its base"
    try:
        read_prompting(header.path.parent)
    except BadDataError as error:
        return None, str(error)
    reference = found.artifact.reference
    choice = replace(found.choice, settings=(*found.choice.settings, f"quant={found.quant}"))
    planned = plan(found.store, load_stage("infer"), resolve(choice, known_keys()), {"gguf": reference})
    if planned.missing:
        return None, "; ".join(planned.missing.values())
    words = [*_program(), "infer", *choice.words(), "--input", f"gguf={reference}"]
    if planned.foreign:
        proves = {PROBES, ANSWERS} <= {file.path for file in found.artifact.files}
        words.append("--reprove" if proves else "--requantize")
    return shlex.join([*words, "--store", found.store_url]), ""


def _fetch(found: Found, place: Path, progress: Progress) -> bool:
    """Put the files into ``place`` unless they are there; True when they came just now."""
    from tunemill.store.pull import cache_directory, check_placed

    artifact = found.artifact
    first_part(file.path for file in artifact.files)
    if place.exists() or place.is_symlink():
        check_placed(artifact.files, place, cache_directory(), progress)
        progress.say(f"{place} is there already, verified: {artifact.reference}")
        return False
    if architecture := artifact.facts.get("architecture"):
        _refuse_unknown(str(architecture), artifact)
    found.store.pull(artifact, place, progress)
    return True


def _refuse_unknown(architecture: str, artifact: Artifact) -> None:
    """Stop at a model that llama.cpp here cannot run; where it is not installed nothing is known."""
    from tunemill.host import this_host

    version = this_host().llama_cpp
    if version is None:
        return
    from tunemill.gguf.selfcheck import knows

    with tempfile.TemporaryDirectory(prefix="tunemill-") as scratch:
        if knows(architecture, Path(scratch)):
            return
    raise ConfigurationError(
        f"{artifact.reference} is of the architecture '{architecture}', which llama-cpp-python {version} "
        "here does not know: install the version it was made with"
    )


def _made_elsewhere(found: Found) -> str:
    """Say so when it was quantized on another kind of host, with the command that does it here."""
    from tunemill.host import this_host

    made, host = found.store.provenance(found.artifact), this_host()
    there = made.host.get("host_class")
    if made.stage != "quantize" or host.llama_cpp is None or there == host.host_class:
        return ""
    words = [*_program(), "quantize", "--run", str(found.choice.run), "--set", f"quant={found.quant}"]
    return (
        f"quantized and checked on another kind of host ({there}) than this one ({host.host_class}); "
        f"to do it here: {shlex.join([*words, '--store', found.store_url])}"
    )


def _program() -> list[str]:
    """Return the words that start this very installation."""
    script = Path(sys.executable).with_name("tunemill")
    if not script.exists():
        return [sys.executable, "-m", "tunemill.cli"]
    on_path = shutil.which("tunemill")
    if on_path and Path(on_path).samefile(script):
        return ["tunemill"]
    return [str(script)]
