"""Settings that would change nothing for a task, because they are about answers of another form."""

from __future__ import annotations

from tunemill.errors import ConfigurationError
from tunemill.infer.config import InferConfig
from tunemill.infer.constraints import KEYS
from tunemill.task import Task

FORMS = {"label": "one label of a set", "labels": "several labels", "text": "free answers"}
FREE = ("n", "top_k", "top_p", "min_p", "stop", *KEYS)
MEANT_FOR = {
    **dict.fromkeys(("calibration", "decoding"), ("label",)),
    "max_pruned": ("label", "labels"),
    **dict.fromkeys(FREE, ("text",)),
}
"""Settings, and the forms of answers that know them."""


def refuse_idle(config: InferConfig, task: Task) -> None:
    """Refuse settings that say nothing of answers of the task's form.

    Raises:
        ConfigurationError: names the first.
    """
    for key, forms in MEANT_FOR.items():
        given = getattr(config, key) != InferConfig.model_fields[key].default
        if given and task.form not in forms:
            raise ConfigurationError(
                f"{key} is for {' or '.join(FORMS[form] for form in forms)}, and this task's answers are "
                f"{FORMS[task.form]}: leave it out"
            )
