"""Small real stages, for tests of the harness; run as a program they are a whole command line.

``python tests/toys.py grow --model m.yaml --task t.yaml`` behaves as ``tunemill grow`` would.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pydantic import Field

from tunemill import stages
from tunemill.errors import BadDataError, Stopped, UsageError
from tunemill.work import Facts, Stage, StageConfig, Work


class PlantConfig(StageConfig):
    seed: int = Field(1, ge=0, description="Number written into the file")
    note: str | None = Field(None, description="A word beside it")
    n_threads: int = Field(1, ge=1, description="Changes nothing", json_schema_extra={"identity": False})
    source: str | None = Field(None, description="A file that is read besides")


class GrowConfig(StageConfig):
    seconds: float = Field(0, ge=0, description="How long it takes")
    steps: int = Field(1, ge=1, description="How many steps it saves")
    fail: str | None = Field(None, description="What goes wrong")
    quant: str = Field("Q4_K_M", description="Part of the output's name")


PLANT = Stage(
    name="plant",
    summary="Write a number",
    config=PlantConfig,
    inputs={},
    output="base/{model}",
    kind="base",
    work="toys:plant",
    check="toys:check",
    reads="toys:reads",
)
GROW = Stage(
    name="grow",
    summary="Copy the number once for each step",
    config=GrowConfig,
    inputs={"base": "base/{model}"},
    output="{run}/gguf-{quant}",
    kind="gguf",
    work="toys:grow",
    binds_host=True,
)
SAVE = Stage(
    name="save",
    summary="Save a state after each step, and go on from it",
    config=GrowConfig,
    inputs={"base": "base/{model}"},
    output="{run}/adapter",
    kind="adapter",
    work="toys:save",
    stops_itself=True,
)
TOYS = {stage.name: stage for stage in (PLANT, GROW, SAVE)}
LISTED = {name: stages.Listed(f"toys:{name.upper()}", stage.summary) for name, stage in TOYS.items()}


def check(config: PlantConfig) -> None:
    if config.seed == 13:
        raise UsageError("seed=13 brings no luck: take another")


def reads(config: PlantConfig) -> dict[str, str]:
    return {config.source: Path(config.source).read_text()} if config.source else {}


def plant(work: Work[PlantConfig]) -> Facts:
    (work.output / "seed.txt").write_text(f"{work.config.seed} {work.config.note}\n")
    return {"seed": work.config.seed}


def grow(work: Work[GrowConfig]) -> Facts:
    config = work.config
    seed = (work.inputs["base"].path / "seed.txt").read_text()
    (work.output / "half.txt").write_text("half")
    (work.scratch / "begun").write_text(str(os.getpid()))
    if config.fail == "data":
        raise BadDataError("the seed is rotten")
    if config.fail == "bug":
        raise ZeroDivisionError("division by zero")
    if config.fail == "missing":
        import no_such_library  # noqa: F401
    time.sleep(config.seconds)
    (work.output / "half.txt").rename(work.output / "whole.txt")
    (work.output / "plant.txt").write_text(seed * config.steps)
    return {"height": config.steps, "of": dict(work.inputs["base"].facts)}


def save(work: Work[GrowConfig]) -> Facts:
    """Take ``seconds`` for each step; a stop ends it after the step under way."""
    state = work.scratch / "state"
    begun = work.checkpoints.latest(state) or 0
    for step in range(begun + 1, work.config.steps + 1):
        time.sleep(work.config.seconds)
        saved = work.scratch / f"step-{step}"
        saved.mkdir()
        (saved / "step.txt").write_text(str(step))
        work.checkpoints.save(saved, step)
        if work.stop.is_set() and step < work.config.steps:
            raise Stopped(f"stopped after step {step}")
    (work.output / "steps.txt").write_text(str(work.config.steps))
    return {"resumed_from": begun}


if __name__ == "__main__":
    from tunemill import cli

    stages.LISTED.clear()
    stages.LISTED.update(LISTED)
    cli.main()
