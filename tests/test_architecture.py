"""The rules of docs/architecture.md hold, and the documents say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tunemill import cli, errors
from tunemill.stages import LISTED, known_keys, load_stage, load_stages

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("accelerate", "bitsandbytes", "boto3", "botocore", "datasets", "gguf", "huggingface_hub", "jinja2"),
    *("llama_cpp", "matplotlib", "numpy", "pandas", "peft", "pyarrow", "pydantic", "safetensors", "scipy"),
    *("sklearn", "torch", "transformers", "trl", "wandb", "yaml"),
}


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level packages that a command imports."""
    program = (
        "import sys\nfrom tunemill.cli import run\ncode = run(sys.argv[1:])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.splitlines()[-1].split())


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_package_of_a_stage_is_under_contract() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    independent = re.search(r'type = "independence"\nmodules = \[(.*?)\]', text, re.DOTALL)
    assert independent
    for listed in LISTED.values():
        package = ".".join(listed.where.split(".")[:2])
        assert f'"{package}"' in independent[1]


def test_help_imports_nothing_heavy() -> None:
    assert not imported_by("--help") & HEAVY


@pytest.mark.parametrize("stage", LISTED)
def test_help_of_a_stage_imports_no_library_of_its_work(stage: str) -> None:
    assert not imported_by(stage, "--help") & (HEAVY - {"pydantic", "yaml"})


@pytest.mark.parametrize("stage", LISTED)
def test_the_listed_summary_and_name_are_the_stages_own(stage: str) -> None:
    declared = load_stage(stage)
    assert (declared.name, declared.summary) == (stage, LISTED[stage].summary)


@pytest.mark.parametrize("stage", LISTED)
def test_every_key_is_described(stage: str) -> None:
    undescribed = [
        key for key, field in load_stage(stage).config.model_fields.items() if not field.description
    ]
    assert undescribed == []


def test_a_key_that_several_stages_take_has_one_default() -> None:
    """``--set`` knows one flat name, so it has to mean the same everywhere."""
    loaded = load_stages()
    for key, names in known_keys().items():
        defaults = {repr(loaded[name].config.model_fields[key].default) for name in names}
        assert len(defaults) == 1, f"{key} of {', '.join(names)}: {defaults}"


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []

    def walk(context: click.Context, path: str) -> None:
        command = context.command
        found.append((path, command))
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                assert below is not None
                walk(click.Context(below, parent=context, info_name=name), f"{path} {name}")

    walk(click.Context(cli.tree), "tunemill")
    return found


@pytest.mark.parametrize(("path", "command"), [pytest.param(*found, id=found[0]) for found in commands()])
def test_every_command_says_what_it_does_and_ends_with_examples(path: str, command: click.Command) -> None:
    assert command.help
    examples = re.findall(r"^ {2}(tunemill .*)$", command.epilog or "", re.MULTILINE)
    assert len(examples) == 2
    if path != "tunemill":
        assert all(example.startswith(path) for example in examples)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_listed_commands_say_what_their_summaries_say() -> None:
    for path, command in commands():
        name = path.partition(" ")[2]
        if name in cli.COMMANDS:
            assert (command.help or "").startswith(f"{cli.COMMANDS[name][1]}.")


def test_the_command_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/cli.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs/cli.md").read_text(), "run: python docs/cli.py > docs/cli.md"


def test_the_exit_codes_are_those_of_the_errors() -> None:
    documented = set(
        re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
    )
    declared = {
        (str(found.exit_code), found.__name__)
        for found in vars(errors).values()
        if isinstance(found, type)
        and issubclass(found, errors.TunemillError)
        and found is not errors.TunemillError
    }
    assert documented == declared


def test_the_codes_that_belong_to_no_error_are_documented() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text()
    assert re.search(rf"^\| {cli.BUG} \| \|", page, re.MULTILINE)
    assert re.search(rf"^\| {cli.BROKEN_PIPE} \| \|", page, re.MULTILINE)
