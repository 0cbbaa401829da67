"""Laws of what training starts from: a folder, or a hub id, whose files are fetched once and then found."""

from __future__ import annotations

import huggingface_hub.constants
import pytest

from aifactory.errors import ConfigError, UnsafeModelError
from aifactory.train.base import digest_folder, resolve_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(runs, uninterrupted, tmp_path, monkeypatch):
    """A cache as the hub's client keeps it, with one model that was fetched before: `maker/tiny`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--maker--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, data in runs.files(uninterrupted).items():
        (repository / "blobs" / name).write_bytes(data)
        (snapshot / name).symlink_to(repository / "blobs" / name)
    return snapshot


def test_a_hub_id_is_the_folder_that_its_files_were_fetched_to(runs, uninterrupted, hub, largest_difference):
    found = resolve_base("maker/tiny")
    assert found == hub
    # Which model it is counts, not where it lies.
    assert digest_folder(found) == digest_folder(runs.folder(uninterrupted))

    from_hub = runs.work("child-hub", max_steps=3, changes={"base": found})
    from_folder = runs.work("child-folder", max_steps=3, changes={"base": runs.folder(uninterrupted)})
    for task in (from_hub, from_folder):
        runs.run(task)
    assert runs.files(from_hub) == runs.files(from_folder)
    assert 0 < largest_difference(from_hub, uninterrupted) < 0.5


def test_a_hub_id_that_was_never_fetched_is_named(hub):
    with pytest.raises(ConfigError, match=r"a hub id or registry:production at model\.base, found 'maker/other'"):
        resolve_base("maker/other")


def test_a_hub_model_that_could_run_code_is_refused(hub):
    (hub / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        resolve_base("maker/tiny")
