"""The harness runs a stage once, reuses what exists, and leaves nothing half-done."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toys import GROW, PLANT, SAVE
from tunemill import __version__, stage
from tunemill.errors import BadDataError, ConfigurationError, UsageError
from tunemill.host import Host, this_host
from tunemill.progress import Progress
from tunemill.recipe import Recipe, Setting
from tunemill.signals import Signals
from tunemill.stage import Outcome, execute, plan
from tunemill.store import Store, open_store
from tunemill.store.pull import cache_directory
from tunemill.work import Stage

Run = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "cache"))
    return open_store(str(tmp_path / "store"), create=True)


def recipe(**values: Any) -> Recipe:
    names = {"model": "Oak", "task": "forest", "run": "Oak-forest"}
    return Recipe(names, {key: Setting(value, "flag") for key, value in values.items()})


@pytest.fixture
def run(store: Store) -> Run:
    def execute_one(toy: Stage[Any], chosen: dict[str, str] | None = None, **values: Any) -> Outcome:
        planned = plan(store, toy, recipe(**values), chosen or {})
        return execute(store, planned, Progress(quiet=True), Signals())

    return execute_one


def work_folders() -> list[Path]:
    return [path for path in (cache_directory() / "work").iterdir() if path.is_dir()]


def test_it_runs_once_and_reuses_afterwards(store: Store, run: Run) -> None:
    first, second = run(PLANT, seed=3), run(PLANT, seed=3)
    assert (first.reused, second.reused) == (False, True)
    assert first.artifact == second.artifact
    assert first.artifact.name == "base/oak"
    assert store.find("base/oak") == first.artifact
    assert len(store.history("base/oak")) == 1


def test_settings_that_change_no_result_do_not_run_it_again(run: Run) -> None:
    assert run(PLANT, n_threads=1).plan.key == run(PLANT, n_threads=8).plan.key


@pytest.mark.parametrize(
    "values", [{"seed": 4}, {"note": "n"}, {"note": None}], ids=["other seed", "other note", "set to null"]
)
def test_every_setting_that_decides_runs_it_again(run: Run, values: dict[str, Any]) -> None:
    run(PLANT, seed=3)
    assert not run(PLANT, **{"seed": 3, **values}).reused


def test_what_it_reads_besides_is_part_of_the_key(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    first = run(PLANT, source=str(source))
    source.write_text("b")
    second = run(PLANT, source=str(source))
    assert not second.reused
    assert first.plan.key != second.plan.key


def test_another_tool_version_runs_it_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(PLANT)
    monkeypatch.setattr("tunemill.action.__version__", "9.9.9")
    assert not run(PLANT).reused


def test_equal_input_content_under_another_name_is_the_same_action(store: Store, run: Run) -> None:
    run(PLANT, seed=3)
    first = run(GROW)
    copy = plan(store, PLANT, replace(recipe(seed=3), names={"model": "elm"}), {})
    execute(store, copy, Progress(quiet=True), Signals())
    second = run(GROW, {"base": "base/elm"})
    assert second.reused
    assert second.artifact == first.artifact


def test_another_input_runs_it_again(run: Run) -> None:
    run(PLANT, seed=3)
    first = run(GROW)
    run(PLANT, seed=4)
    assert not run(GROW).reused
    run(PLANT, seed=3)
    assert run(GROW).artifact == first.artifact


def test_reuse_makes_the_output_the_newest_of_its_name_again(store: Store, run: Run) -> None:
    old = run(PLANT, seed=3).artifact
    run(PLANT, seed=4)
    run(PLANT, seed=3)
    assert store.find("base/oak") == old
    assert len(store.history("base/oak")) == 3


def test_only_what_binds_its_host_depends_on_it(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(PLANT)
    run(GROW)
    elsewhere = replace(this_host(), kernels=("neon",), machine="aarch64")
    monkeypatch.setattr(stage, "this_host", lambda: elsewhere)
    assert run(PLANT).reused
    assert not run(GROW).reused


def test_provenance_tells_everything(store: Store, run: Run) -> None:
    base = run(PLANT, seed=3).artifact
    outcome = run(GROW, steps=2)
    told = store.provenance(outcome.artifact)
    assert (told.stage, told.tool_version) == ("grow", __version__)
    assert told.config == {"seconds": 0.0, "steps": 2, "quant": "Q4_K_M"}
    assert told.origins == {"seconds": "default", "steps": "flag", "quant": "default"}
    assert told.inputs == {"base": base.reference}
    assert told.action_key == outcome.plan.key
    assert told.host["host_class"] == this_host().host_class
    assert told.llama_cpp == this_host().llama_cpp
    assert told.started < told.finished
    assert outcome.artifact.facts == {"height": 2, "of": {"seed": 3}}


def test_the_work_directory_is_gone_afterwards(run: Run) -> None:
    run(PLANT)
    run(GROW)
    assert work_folders() == []


def test_a_failure_shows_nothing_and_keeps_only_scratch(store: Store, run: Run) -> None:
    run(PLANT)
    with pytest.raises(BadDataError, match="rotten"):
        run(GROW, fail="data")
    assert store.names() == ["base/oak"]
    (folder,) = work_folders()
    assert [path.name for path in folder.iterdir()] == ["scratch"]


def test_a_leftover_of_a_killed_run_does_not_get_into_the_output(store: Store, run: Run) -> None:
    run(PLANT)
    planned = plan(store, GROW, recipe(), {})
    stale = cache_directory() / "work" / str(planned.key) / "output" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("from a kill")
    assert {file.path for file in run(GROW).artifact.files} == {"whole.txt", "plant.txt"}


def test_a_missing_input_names_its_maker(run: Run) -> None:
    with pytest.raises(UsageError, match=r"grow needs base: .*base/oak.*tunemill fetch"):
        run(GROW)


def test_an_input_of_another_kind_is_refused(run: Run) -> None:
    run(PLANT)
    run(GROW)
    with pytest.raises(UsageError, match=r"is gguf, expected base"):
        run(GROW, {"base": "oak-forest/gguf-q4_k_m"})


def test_an_unknown_role_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="no input 'adapter'; its inputs: base"):
        run(GROW, {"adapter": "base/oak"})


def test_the_check_comes_before_missing_inputs_and_not_at_reuse(run: Run) -> None:
    with pytest.raises(UsageError, match="no luck"):
        run(PLANT, seed=13)


def test_planning_changes_nothing(store: Store) -> None:
    planned = plan(store, PLANT, recipe(seed=3), {})
    assert planned.existing is None
    assert store.names() == []
    assert not cache_directory().exists()


def test_a_cache_that_cannot_be_written_says_what_to_set(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="set TUNEMILL_CACHE"):
        run(PLANT)


def test_two_processes_of_one_action_make_it_once(store: Store, run: Run) -> None:
    run(PLANT)
    outcomes: list[Outcome] = []

    def grow() -> None:
        planned = plan(store, GROW, recipe(seconds=0.5), {})
        outcomes.append(execute(store, planned, Progress(quiet=True), Signals()))

    threads = [threading.Thread(target=grow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.reused for outcome in outcomes) == [False, True, True]
    assert len({outcome.artifact.digest for outcome in outcomes}) == 1


def test_who_loses_the_race_for_an_action_takes_the_winners_output(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two machines share no lock: both work, one publishes first."""
    run(PLANT)
    planned = plan(store, GROW, recipe(), {})
    monkeypatch.setenv("TUNEMILL_CACHE", str(tmp_path / "other machine"))
    original = stage._pull

    def slower(*arguments: Any) -> Any:
        winners.append(_publish_other(store, planned))
        return original(*arguments)

    winners: list[Any] = []
    monkeypatch.setattr(stage, "_pull", slower)
    outcome = execute(store, planned, Progress(quiet=True), Signals())
    assert outcome.artifact.digest == winners[0].digest
    assert store.find(planned.output) == winners[0]


def _publish_other(store: Store, planned: stage.Plan) -> Any:
    from tunemill.action import action_tag
    from tunemill.store import Draft

    folder = cache_directory() / "elsewhere"
    folder.mkdir(parents=True)
    (folder / "plant.txt").write_text("grown elsewhere, with other bytes")
    provenance = stage._provenance(planned)
    draft = Draft(planned.output, "gguf", folder, {}, provenance, (action_tag(str(planned.key)),))
    return store.publish(draft, Progress(quiet=True))


def test_the_result_line_is_plain_json(run: Run) -> None:
    record = json.loads(json.dumps(run(PLANT, seed=3).record()))
    assert record["reference"] == f"{record['name']}@{record['digest']}"
    assert record["facts"] == {"seed": 3}
    assert record["reused"] is False


def test_checkpoints_are_found_by_the_same_action_alone(store: Store, run: Run) -> None:
    run(PLANT)
    planned = plan(store, SAVE, recipe(steps=3), {})
    signals = Signals()
    signals.stop.set()
    with pytest.raises(Exception, match="stopped after step 1"):
        execute(store, planned, Progress(quiet=True), signals)
    assert run(SAVE, steps=4).artifact.facts["resumed_from"] == 0
    assert run(SAVE, steps=3).artifact.facts["resumed_from"] == 1


def test_a_host_is_classed_by_what_its_results_depend_on() -> None:
    host = this_host()
    assert replace(host, memory=1, cores=1, python="0").host_class == host.host_class
    for other in (
        replace(host, llama_cpp="0.0.1"),
        replace(host, kernels=("neon",)),
        replace(host, compiler="clang-1.0.0"),
        replace(host, ggml="0.0.1"),
        replace(host, rounding="00000000"),
        replace(host, machine="sparc"),
        replace(host, backend="cuda"),
    ):
        assert isinstance(other, Host)
        assert other.host_class != host.host_class
