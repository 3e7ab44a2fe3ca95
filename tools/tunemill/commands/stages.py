"""``tunemill fetch``, ``tunemill train`` and so on: one command for each stage, made from its declaration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from tunemill import options
from tunemill.commands import foreign
from tunemill.errors import UsageError
from tunemill.group import speaks
from tunemill.progress import Progress
from tunemill.recipe import Choice, resolve
from tunemill.remake import remake_foreign
from tunemill.signals import Signals
from tunemill.stage import Plan, check, execute, plan, refuse_foreign
from tunemill.stages import known_keys, load_stage
from tunemill.work import Stage

EXAMPLES = """\b
Examples:
  tunemill {name} --model tiny --task stdlib
  tunemill {name} --model tiny --task stdlib --dry-run"""


class StageCommand(click.Command):
    """A command whose help lists the recipe keys of its stage."""

    def __init__(self, stage: Stage[Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stage = stage

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the keys; a library's own many keys as a list of names."""
        super().format_options(ctx, formatter)
        own, passed_on = keys_of(self.stage)
        with formatter.section("Keys (--set KEY=VALUE)"):
            formatter.write_dl(own)
        for library, names in passed_on.items():
            with formatter.section(f"Keys of {library}, by its own names"):
                formatter.write_text(", ".join(names))


def keys_of(stage: Stage[Any]) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """Return a stage's own keys with their descriptions, and those it passes on to a library by library."""
    own: list[tuple[str, str]] = []
    passed_on: dict[str, list[str]] = {}
    for key, field in stage.config.model_fields.items():
        text = field.description or ""
        library, colon, _ = text.partition(":")
        if text.startswith("Cannot be set"):
            continue
        if colon and library in ("trl.SFTConfig", "peft.LoraConfig"):
            passed_on.setdefault(library, []).append(key)
        else:
            own.append((key, text if field.is_required() else f"{text}  [{_shown(field.default)}]"))
    return own, {library: sorted(names) for library, names in passed_on.items()}


def stage_command(name: str) -> click.Command:
    """Return the command of one stage."""
    stage = load_stage(name)

    @click.pass_obj
    def run(
        signals: Signals,
        /,
        store_url: str,
        inputs: Sequence[str],
        dry_run: bool,
        as_json: bool,
        check_model: str | None = None,
        join_parts: str | None = None,
        requantize: bool = False,
        reprove: bool = False,
        types: str | None = None,
        memory_budget: str | None = None,
        context: int | None = None,
        ids: Sequence[str] = (),
        **choice: Any,
    ) -> None:
        if check_model is not None:
            from tunemill.commands import preflight

            preflight.check_model(check_model, store_url, as_json, signals)
            return
        if join_parts is not None:
            from tunemill.commands import join

            join.join_parts(join_parts, as_json)
            return
        if table := foreign.taken(choice):
            if dry_run:
                raise UsageError("--dry-run is for stages: a table is judged at once, leave it out")
            foreign.judge_table(table, choice, as_json)
            return
        if reprove:
            choice["settings"] = (*choice["settings"], "reprove=true")
        recipe = resolve(Choice(**_choice(choice)), known_keys())
        store, chosen = options.open_the_store(store_url), parse_inputs(inputs)
        if types:
            from tunemill.commands import side_by_side

            wanted = side_by_side.parse(types, memory_budget, context)
            plans = side_by_side.plan_all(store, stage, recipe, chosen, wanted)
            if dry_run:
                records = {"types": [plan_record(each) for each in plans]}
                _say(json.dumps(records) if as_json else "\n".join(map(plan_text, plans)))
                return
            side_by_side.run(store, plans, wanted, as_json, signals)
            return
        planned = plan(store, stage, recipe, chosen)
        if ids and not dry_run:
            from tunemill.commands import samples

            samples.show(store, planned, ids, as_json, signals)
            return
        if requantize and not dry_run and planned.foreign and planned.existing is None:
            made = remake_foreign(store, planned, Progress(quiet=not speaks()), signals)
            planned = plan(store, stage, recipe, {**chosen, **made})
        if dry_run:
            check(planned)
            if not requantize:
                refuse_foreign(planned)
            _say(json.dumps(plan_record(planned)) if as_json else plan_text(planned))
            return
        outcome = execute(store, planned, Progress(quiet=not speaks()), signals)
        _say(json.dumps(outcome.record()) if as_json else outcome.artifact.reference)

    decorated: Any = run
    proves = [options.publish_anyway] if "publish_anyway" in stage.config.model_fields else []
    checks = [options.check_model, options.join_parts] if name == "convert" else []
    binds = [options.requantize, options.reprove] if stage.bound_inputs else []
    singles = [options.ids] if name == "infer" else []
    several = [options.context, options.memory_budget, options.types] if name == "quantize" else []
    tables = [foreign.options] if name == "evaluate" else []
    for option in (
        options.json,
        options.dry_run,
        *checks,
        *binds,
        *several,
        *singles,
        *tables,
        *proves,
        options.inputs,
        options.store,
    ):
        decorated = option(decorated)
    decorated = options.recipe(decorated)
    return StageCommand(
        stage,
        name=name,
        callback=decorated,
        params=list(reversed(decorated.__click_params__)),
        help=f"{stage.summary}.\n\nTakes {_takes(stage)}; makes {stage.output}.",
        epilog=EXAMPLES.format(name=name),
    )


def parse_inputs(given: Sequence[str]) -> dict[str, str]:
    """Read ``role=reference`` words.

    Raises:
        UsageError: one is not of that form, or names a role twice.
    """
    chosen: dict[str, str] = {}
    for word in given:
        role, equals, reference = word.partition("=")
        if not equals or not role or not reference:
            raise UsageError(f"--input takes ROLE=REF, got '{word}'")
        if role in chosen:
            raise UsageError(f"--input names {role} twice: {chosen[role]} and {reference}")
        chosen[role] = reference
    return chosen


def plan_record(planned: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values."""
    return {
        "stage": planned.stage.name,
        "output": planned.output,
        "config": {key: {"value": value, "origin": origin} for key, value, origin in planned.settings()},
        "inputs": {role: artifact.reference for role, artifact in planned.inputs.items()},
        "missing": dict(planned.missing),
        "action_key": planned.key,
        "would_run": planned.existing is None,
        "reference": planned.existing.reference if planned.existing else None,
    }


def plan_text(planned: Plan) -> str:
    """Return a plan for people: every value with its origin, inputs by digest, what would happen."""
    settings = [(key, _shown(value), origin) for key, value, origin in planned.settings()]
    widths = [max((len(row[column]) for row in settings), default=0) for column in (0, 1)]
    lines = [f"{planned.stage.name} -> {planned.output}"]
    lines += [
        f"  {key:<{widths[0]}}  {value:<{widths[1]}}  ({origin})".rstrip() for key, value, origin in settings
    ]
    lines += [f"  input {role}: {artifact.reference}" for role, artifact in planned.inputs.items()]
    lines += [f"  {why}" for why in planned.missing.values()]
    if planned.existing:
        lines.append(f"would reuse {planned.existing.reference}")
    else:
        lines.append("would run once its inputs exist" if planned.missing else "would run")
    return "\n".join(lines)


def _say(result: str) -> None:
    """Print the result, once for all the processes that torchrun started."""
    if speaks():
        click.echo(result)


def _choice(given: dict[str, Any]) -> dict[str, Any]:
    return {"file": given.pop("recipe_file"), **given}


def _takes(stage: Stage[Any]) -> str:
    return ", ".join(f"{role} ({template})" for role, template in stage.inputs.items()) or "no artifact"


def _shown(value: Any) -> str:
    """Return a value on one line of at most 60 characters, as YAML would take it."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
