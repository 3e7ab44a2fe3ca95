"""Eight writers racing for one tag and one branch, 200 rounds: one winner each, and the losers are told."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from backends import MakeDraft
from tunemill.errors import ConflictError
from tunemill.progress import Progress
from tunemill.store import Artifact, Store, keys
from tunemill.store.backend import Backend
from tunemill.store.publish import advance, commit_tag
from tunemill.store.reference import create_reference, new_reference, newest, revisions

ROUNDS, WRITERS = 200, 8
CHAIN_ROUNDS = 6  # in each all eight take a number, after up to eight attempts
SIZE = 1000


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def together(work: object, pool: ThreadPoolExecutor) -> list[object]:
    """Run ``work(writer)`` in eight threads that start at the same moment."""
    barrier = Barrier(WRITERS)

    def start(writer: int) -> object:
        barrier.wait()
        return work(writer)  # type: ignore[operator]

    return list(pool.map(start, range(WRITERS)))


def test_of_eight_writers_one_gets_the_tag(backend: Backend) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for round_number in range(ROUNDS):
            tag = f"round-{round_number}"

            def write(writer: int, tag: str = tag) -> str | None:
                try:
                    commit_tag(backend, "race/tag", tag, digest(writer), SIZE)
                except ConflictError as error:
                    return str(error)
                return None

            told = together(write, pool)
            assert told.count(None) == 1
            winner = digest(told.index(None))
            held = backend.get(keys.tag("race/tag", tag))
            assert held is not None
            assert winner in held.decode()
            assert all(winner[:19] in str(message) for message in told if message is not None)


def test_of_eight_writers_one_gets_the_next_number(backend: Backend) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(1, ROUNDS + 1):
            references = [new_reference(digest(writer), SIZE, number) for writer in range(WRITERS)]
            key = keys.branch("race/number", number)
            held = together(lambda writer, r=references, k=key: create_reference(backend, k, r[writer]), pool)
            assert len(set(held)) == 1
            assert [ours is theirs for ours, theirs in zip(references, held, strict=True)].count(True) == 1
            last = newest(backend, "race/number")
            assert last == (number, held[0])


def test_racing_for_a_branch_loses_no_step(backend: Backend) -> None:
    """Each writer that lost a number takes a later one: the branch becomes one unbroken chain."""
    with ThreadPoolExecutor(WRITERS) as pool:
        for round_number in range(CHAIN_ROUNDS):
            start = round_number * WRITERS
            together(lambda writer, s=start: advance(backend, "race/branch", digest(s + writer), SIZE), pool)
    chain = list(reversed(list(revisions(backend, "race/branch"))))
    assert [step.sequence for step in chain] == list(range(1, len(chain) + 1))
    assert sorted(step.digest for step in chain) == [
        digest(number) for number in range(CHAIN_ROUNDS * WRITERS)
    ]
    assert [step.previous for step in chain] == [None, *(step.digest for step in chain[:-1])]


@pytest.mark.parametrize("same", [pytest.param(True, id="same content"), pytest.param(False, id="other")])
def test_publishers_racing_for_a_tag(store: Store, make_draft: MakeDraft, same: bool) -> None:
    """With the same content all get the winner's artifact; with other content all but one are refused."""
    drafts = [
        make_draft({"model.safetensors": b"same" if same else os.urandom(8)}, tags=("v1",))
        for _ in range(WRITERS)
    ]

    def publish(writer: int) -> Artifact | ConflictError:
        try:
            return store.publish(drafts[writer], Progress(quiet=True))
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(WRITERS) as pool:
        results = together(publish, pool)
    won = [result for result in results if isinstance(result, Artifact)]
    assert len(won) == (WRITERS if same else 1)
    assert len({artifact.digest for artifact in won}) == 1
    assert store.resolve(drafts[0].name + ":v1") == won[0]
    assert store.resolve(drafts[0].name) == won[0]
    assert [step.digest for step in store.history(drafts[0].name)] == [won[0].digest]
    assert list(store.backend.list(keys.LEASES)) == []
