"""The store as the rest of the program sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import MakeDraft
from tunemill.errors import BadDataError, ConfigurationError, ConflictError, IntegrityError, UsageError
from tunemill.progress import Progress
from tunemill.store import Artifact, Store, keys, open_store
from tunemill.store.local import LocalBackend
from tunemill.store.reference import create_reference, new_reference

NAME = "tiny-stdlib/adapter"


@pytest.fixture
def first(store: Store, make_draft: MakeDraft, progress: Progress) -> Artifact:
    return store.publish(make_draft({"a.json": b"1"}, tags=("v1",)), progress)


@pytest.fixture
def local(directory_store: Store, make_draft: MakeDraft, progress: Progress) -> Artifact:
    return directory_store.publish(make_draft({"a.json": b"1"}, tags=("v1",)), progress)


class TestFinding:
    def test_by_name_tag_and_digest(
        self, store: Store, first: Artifact, make_draft: MakeDraft, progress: Progress
    ) -> None:
        second = store.publish(make_draft({"a.json": b"2"}), progress)
        assert store.find(NAME) == second
        assert store.find(f"{NAME}:v1") == first
        assert store.find(first.reference) == first
        assert store.resolve(second.reference) == second

    def test_what_is_absent_is_none(self, store: Store, first: Artifact) -> None:
        for reference in ("base/tiny", f"{NAME}:v2", f"{NAME}@sha256:{'0' * 64}"):
            assert store.find(reference) is None

    def test_a_digest_belongs_to_its_own_name(self, store: Store, first: Artifact) -> None:
        assert store.find(f"base/tiny@{first.digest}") is None

    @pytest.mark.parametrize(
        ("reference", "suggestion"),
        [
            pytest.param("tiny-stdlib/adaptor", f"did you mean {NAME}?", id="name"),
            pytest.param(f"{NAME}:v2", f"did you mean {NAME}:v1?", id="tag"),
            pytest.param(f"{NAME}:zzz", f"did you mean {NAME}?", id="no near tag"),
            pytest.param(f"{NAME}@sha256:{'0' * 64}", f"did you mean {NAME}?", id="digest"),
            pytest.param("x/y", "'tunemill store ls' lists", id="nothing near"),
        ],
    )
    def test_an_absent_reference_suggests_near_ones(
        self, store: Store, first: Artifact, reference: str, suggestion: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            store.resolve(reference)
        assert f"has no '{reference}'" in str(caught.value)
        assert suggestion in str(caught.value)
        assert caught.value.exit_code == 2

    def test_names_tags_and_history(
        self, store: Store, first: Artifact, make_draft: MakeDraft, progress: Progress
    ) -> None:
        store.publish(make_draft({"a.json": b"2"}, name="base/tiny"), progress)
        store.tag(NAME, "best")
        assert store.names() == ["base/tiny", NAME]
        assert store.tags(NAME) == ["best", "v1"]
        assert store.tags("base/tiny") == []
        assert [step.digest for step in store.history(NAME)] == [first.digest]
        assert store.history("no/body") == []

    def test_a_name_that_begins_another_is_not_it(
        self, store: Store, first: Artifact, make_draft: MakeDraft, progress: Progress
    ) -> None:
        store.publish(make_draft({"a.json": b"2"}, name=f"{NAME}-2"), progress)
        assert store.find(NAME) == first
        assert store.tags(f"{NAME}-2") == []


class TestNaming:
    def test_a_tag_is_for_ever(
        self, store: Store, first: Artifact, make_draft: MakeDraft, progress: Progress
    ) -> None:
        store.tag(first.reference, "v1")
        second = store.publish(make_draft({"a.json": b"2"}), progress)
        with pytest.raises(ConflictError, match="a tag never changes"):
            store.tag(second.reference, "v1")
        assert store.find(f"{NAME}:v1") == first

    def test_advancing_to_an_older_artifact_and_back(
        self, store: Store, first: Artifact, make_draft: MakeDraft, progress: Progress
    ) -> None:
        second = store.publish(make_draft({"a.json": b"2"}), progress)
        store.advance(second)
        store.advance(first)
        store.advance(first)
        assert store.find(NAME) == first
        assert [step.digest for step in store.history(NAME)] == [first.digest, second.digest, first.digest]

    def test_tagging_what_is_absent(self, store: Store) -> None:
        with pytest.raises(UsageError, match="has no"):
            store.tag(NAME, "v1")


class TestProvenance:
    def test_it_is_what_was_published(self, store: Store, make_draft: MakeDraft, progress: Progress) -> None:
        draft = make_draft({"a.json": b"1"})
        assert store.provenance(store.publish(draft, progress)) == draft.provenance

    def test_damage_is_found(self, directory_store: Store, local: Artifact) -> None:
        assert isinstance(directory_store.backend, LocalBackend)
        statement = keys.blob(directory_store.manifest(local).provenance.hex)
        path = directory_store.backend.root / statement
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"42", b"43"))
        with pytest.raises(IntegrityError, match=r"provenance of .* missing or damaged"):
            directory_store.provenance(local)


class TestHostileStores:
    """A store is written by others; what is read from it may be anything."""

    def test_a_reference_to_nothing(self, directory_store: Store) -> None:
        reference = new_reference(f"sha256:{'1' * 64}", 10)
        create_reference(directory_store.backend, keys.tag(NAME, "v1"), reference)
        with pytest.raises(IntegrityError, match="names manifest sha256:1111"):
            directory_store.find(f"{NAME}:v1")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"{}",
            b"[]",
            b'{"digest": "../../x", "size": 1, "sequence": 0, "previous": null, "write_id": "0"}',
        ],
    )
    def test_a_malformed_reference(self, directory_store: Store, text: bytes) -> None:
        directory_store.backend.put_if_absent(keys.tag(NAME, "v1"), text)
        with pytest.raises(BadDataError, match=f"reference tags/{NAME}/v1 .* is malformed") as caught:
            directory_store.find(f"{NAME}:v1")
        assert "\n" not in str(caught.value)

    def test_a_reference_of_a_gigabyte_is_not_read(self, directory_store: Store) -> None:
        directory_store.backend.put_if_absent(keys.tag(NAME, "v1"), b" " * 5000)
        with pytest.raises(IntegrityError, match="larger than the 4096 bytes"):
            directory_store.find(f"{NAME}:v1")

    def test_a_step_with_another_number(self, directory_store: Store, local: Artifact) -> None:
        create_reference(
            directory_store.backend, keys.branch(NAME, 7), new_reference(local.digest, 10, sequence=3)
        )
        with pytest.raises(BadDataError, match="says it is number 3"):
            directory_store.find(NAME)

    def test_a_name_that_leads_to_another_names_manifest(
        self, directory_store: Store, local: Artifact
    ) -> None:
        create_reference(
            directory_store.backend, keys.tag("base/tiny", "v1"), new_reference(local.digest, 10)
        )
        with pytest.raises(IntegrityError, match=f"names a manifest of {NAME}"):
            directory_store.find("base/tiny:v1")

    def test_a_damaged_manifest(self, directory_store: Store, local: Artifact) -> None:
        assert isinstance(directory_store.backend, LocalBackend)
        path = directory_store.backend.root / keys.manifest(local.digest.removeprefix("sha256:"))
        path.chmod(0o644)
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(IntegrityError, match="does not have its digest"):
            directory_store.find(NAME)


class TestOpening:
    def test_a_path_and_a_file_url_are_one_store(self, tmp_path: Path) -> None:
        assert open_store(str(tmp_path / "new store"), create=True).url == f"file://{tmp_path}/new%20store"
        assert open_store(f"file://{tmp_path}/new%20store").url == f"file://{tmp_path}/new%20store"

    def test_a_store_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="there is no store at") as caught:
            open_store(str(tmp_path / "absent"))
        assert caught.value.exit_code == 78
        assert not (tmp_path / "absent").exists()

    def test_some_other_directory_is_no_store(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(ConfigurationError, match=r"is no store: it holds 'thesis\.tex'"):
            open_store(str(tmp_path), create=True)

    @pytest.mark.parametrize(
        "url", ["http://x/y", "gs://bucket", "file://host", "file://host/path", "s3://", ""]
    )
    def test_other_addresses(self, url: str) -> None:
        with pytest.raises(UsageError):
            open_store(url)
