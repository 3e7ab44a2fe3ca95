"""Makes again on this host what another kind of host made: a quantization from its unquantized model.

Configuration and inputs are those of the artifact's own provenance, so what comes out differs by the
host alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tunemill.errors import UsageError
from tunemill.progress import Progress
from tunemill.recipe import Recipe, Setting
from tunemill.signals import Signals
from tunemill.stage import Plan, execute, plan
from tunemill.stages import load_stage
from tunemill.store import Artifact, Store

log = logging.getLogger("tunemill")


def remake_foreign(store: Store, planned: Plan, progress: Progress, signals: Signals) -> Mapping[str, str]:
    """Return the roles whose artifacts other kinds of hosts made, with references of what was made here.

    Raises:
        UsageError: what such an artifact was made from is not in this store.
    """
    return {
        role: _remake(store, planned.inputs[role], progress, signals).reference for role in planned.foreign
    }


def _remake(store: Store, artifact: Artifact, progress: Progress, signals: Signals) -> Artifact:
    made = store.provenance(artifact)
    stage = load_stage(made.stage)
    settings = {
        key: Setting(value, f"provenance of {artifact.reference}")
        for key, value in made.config.items()
        if key in stage.config.model_fields
    }
    recipe = Recipe({"run": artifact.name.partition("/")[0]}, settings)
    planned = plan(store, stage, recipe, dict(made.inputs))
    if planned.missing:
        raise UsageError(
            f"{artifact.reference} cannot be made again, since this store lacks what it was made from: "
            f"{next(iter(planned.missing.values()))}"
        )
    log.info("%s: making it again on this host, from %s", artifact.reference, ", ".join(made.inputs.values()))
    return execute(store, planned, progress, signals).artifact
