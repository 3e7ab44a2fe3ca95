"""Model recipe, task recipe, a user's file and flags, combined into one flat configuration.

Every value keeps its origin, which is printed by ``--dry-run`` and goes into the provenance. Later
sources win: model recipe, task recipe, ``--recipe`` file, ``--set``. Recipes are YAML as of 1.2: ``1e-4``
is a number, ``no`` and dates are text. All errors of a recipe are reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from tunemill.errors import UsageError
from tunemill.work import Stage, StageConfig

RECIPES = Path(__file__).with_name("recipes")
NAMING = ("model", "task", "run")
"""Keys of a ``--recipe`` file that stand for the options of the same name."""

ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Setting:
    """One resolved value."""

    value: Any
    origin: str
    """``recipe models/llama3``, ``file my.yaml`` or ``flag``."""


@dataclass(frozen=True)
class Choice:
    """What a user chose on the command line, unread."""

    model: str | None = None
    task: str | None = None
    run: str | None = None
    file: str | None = None
    settings: Sequence[str] = ()
    """``key=value`` each."""
    publish_anyway: bool = False
    """A flag of its own, because whoever wants it has just read of it in an error."""

    def words(self) -> list[str]:
        """Return the options that stand for it on a command line."""
        named = {"--model": self.model, "--task": self.task, "--run": self.run, "--recipe": self.file}
        words = [word for option, value in named.items() if value for word in (option, value)]
        return words + [word for setting in self.settings for word in ("--set", setting)]


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe."""

    names: Mapping[str, str]
    """``model``, ``task`` and ``run``, as far as they are known; they name artifacts."""
    settings: Mapping[str, Setting]

    def configure(self, stage: Stage[ConfigT]) -> ConfigT:
        """Return the stage's configuration: the keys it declares, checked by its types.

        Raises:
            UsageError: values are missing or wrong; all of them are named.
        """
        taken = {key: self.settings[key].value for key in stage.config.model_fields if key in self.settings}
        try:
            return stage.config(**taken)
        except ValidationError as error:
            raise UsageError(f"{stage.name}: {self._complaints(stage.config, error)}") from error

    def origin(self, key: str) -> str:
        """Return where a key's value came from; ``default`` when nobody set it."""
        return self.settings[key].origin if key in self.settings else "default"

    def format(self, template: str, config: StageConfig) -> str:
        """Fill in a name such as ``{run}/gguf-{quant}``, in lower case.

        Raises:
            UsageError: it needs a model, task or run that was not given.
        """
        known = {**config.model_dump(), **config.naming(), **self.names}
        wanted = re.findall(r"{(\w+)}", template)
        for key in wanted:
            if known.get(key) is None:
                raise UsageError(f"{template} needs {_how_to_name(key)}")
        return template.format(**{key: str(known[key]).lower() for key in wanted})

    def _complaints(self, config: type[StageConfig], error: ValidationError) -> str:
        return "; ".join(self._complaint(config, found) for found in error.errors(include_url=False))

    def _complaint(self, config: type[StageConfig], found: Any) -> str:
        path = ".".join(str(part) for part in found["loc"])
        key = str(found["loc"][0]) if found["loc"] else ""
        if found["type"] == "missing":
            field = config.model_fields[key]
            return f"{key} is not set ({field.description}): add --set {key}=…"
        message = str(found["msg"]).removeprefix("Value error, ")
        if not key:
            return message
        return f"{path}={_short(found['input'])} ({self.origin(key)}): {message[:1].lower()}{message[1:]}"


def resolve(choice: Choice, known: Iterable[str]) -> Recipe:
    """Combine everything a user chose; ``known`` are the keys of all stages.

    Raises:
        UsageError: an unknown model, task or key (near ones are named), or malformed YAML.
    """
    file = _read(Path(choice.file), f"file {choice.file}") if choice.file else {}
    model = choice.model or _naming(file, "model")
    task = choice.task or _naming(file, "task")
    layers = [
        *([_find("models", model)] if model else []),
        *([_find("tasks", task)] if task else []),
        {key: setting for key, setting in file.items() if key not in NAMING},
        _flags([*choice.settings, *(["publish_anyway=true"] if choice.publish_anyway else [])]),
    ]
    _check_keys(layers, frozenset(known))
    names = {"model": _stem(model), "task": _stem(task), "run": choice.run or _naming(file, "run")}
    if not names["run"] and model and task:
        names["run"] = f"{names['model']}-{names['task']}"
    return Recipe(
        names={key: name for key, name in names.items() if name},
        settings={key: setting for layer in layers for key, setting in layer.items()},
    )


def available(kind: str) -> list[str]:
    """Return the names of the recipes that come with Tunemill; ``kind`` is models or tasks."""
    return sorted(path.stem for path in (RECIPES / kind).glob("*.yaml"))


def describe(kind: str, name: str) -> str:
    """Return the first sentence of the comment that a recipe of Tunemill begins with."""
    lines = (RECIPES / kind / f"{name}.yaml").read_text("utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"\.(?:\s|$)", comment)[0]


def _find(kind: str, name: str) -> dict[str, Setting]:
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name), f"file {name}")
    names = available(kind)
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"unknown {kind[:-1]} '{name}': {hint} (a path to a YAML file works too)")
    return _read(RECIPES / kind / f"{name}.yaml", f"recipe {kind}/{name}")


def _read(path: Path, origin: str) -> dict[str, Setting]:
    try:
        value = parse_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {_where(error)}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path} has to be a mapping of keys to values")
    return {key: Setting(entry, origin) for key, entry in value.items()}


def _flags(settings: Sequence[str]) -> dict[str, Setting]:
    parsed: dict[str, Setting] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes KEY=VALUE, got '{setting}'")
        if key.strip() in NAMING:
            raise UsageError(f"--set {setting}: use --{key.strip()} instead")
        try:
            parsed[key.strip()] = Setting(parse_yaml(text), "flag")
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: the value is not YAML: {_where(error)}") from error
    return parsed


def _check_keys(layers: Sequence[Mapping[str, Setting]], known: frozenset[str]) -> None:
    unknown = [
        (key, setting.origin) for layer in layers for key, setting in layer.items() if key not in known
    ]
    if unknown:
        raise UsageError("; ".join(_unknown(key, origin, known) for key, origin in unknown))


def _unknown(key: str, origin: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "'tunemill STAGE --help' lists the keys"
    return f"unknown key '{key}' ({origin}): {hint}"


def _naming(file: Mapping[str, Setting], key: str) -> str | None:
    return str(file[key].value) if key in file else None


def _stem(name: str | None) -> str | None:
    if name and name.endswith((".yaml", ".yml")):
        return Path(name).stem
    return name


def _how_to_name(key: str) -> str:
    return "--run, or --model and --task" if key == "run" else f"--{key}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else " ".join(problem.split())


class _Loader(yaml.SafeLoader):
    """Reads YAML by the core schema of 1.2, and refuses a key given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name for it

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key_node.value}' is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# YAML 1.2.2, section 10.3.2; 1.1 reads 1e-4 as text and the label "no" as false.
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 1.1's own would read 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises:
        yaml.YAMLError: it is malformed, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)
