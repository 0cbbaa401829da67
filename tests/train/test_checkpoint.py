"""Laws of a checkpoint: whole or not there, whoever wrote which part of it, and wherever it lies."""

from __future__ import annotations

import hashlib
import pickle
import secrets
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from aifactory.errors import StorageError
from aifactory.records.storage import Storage
from aifactory.train.checkpoint import Checkpoints, restore
from aifactory.train.pieces import Held, PartFile, Staging, held_moments, held_weights


def small_model(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def numbers(model, optimizer):
    state = {f"{i}.{key}": value for i, each in optimizer.state_dict()["state"].items() for key, value in each.items()}
    return {name: value.tolist() for name, value in {**model.state_dict(), **state}.items()}


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path) if request.param == "local" else f"memory://{secrets.token_hex(8)}")


def test_what_is_read_is_what_was_written(storage):
    model, optimizer = small_model(1)
    other, others = small_model(2)
    with Checkpoints(storage, "run") as checkpoints:
        checkpoints.save(7, model, optimizer, losses=[2.5, 1.5])

    assert restore(Checkpoints(storage, "run"), other, others) == (7, [2.5, 1.5])
    assert numbers(other, others) == numbers(model, optimizer)
    assert others.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_fresh_optimizer_goes_on_as_the_one_that_was_saved(storage):
    model, optimizer = small_model(1)
    other, _ = small_model(2)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    with Checkpoints(storage, "run") as checkpoints:
        checkpoints.save(1, model, optimizer)
    restore(checkpoints, other, fresh)
    for each, its in ((model, optimizer), (other, fresh)):
        each(torch.ones(4, 7)).square().sum().backward()
        its.step()

    assert numbers(other, fresh) == numbers(model, optimizer)


def test_what_is_changed_after_it_began_is_not_in_it(tmp_path):
    class Slow(Storage):
        opened = threading.Event()

        def write_bytes(self, data, *parts, **options):
            self.opened.wait()
            return super().write_bytes(data, *parts, **options)

    model, optimizer = small_model(1)
    before = numbers(model, optimizer)
    storage = Slow(str(tmp_path))
    with Checkpoints(storage, "run") as checkpoints:
        checkpoints.save(1, model, optimizer)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert checkpoints.committed() == []
        storage.opened.set()
    restore(checkpoints, model, optimizer)

    assert numbers(model, optimizer) == before


def test_one_save_is_in_flight_at_most_and_what_a_step_waits_for_is_counted(tmp_path):
    class Busy(Storage):
        now, most = 0, 0

        def write_bytes(self, data, *parts, **options):
            Busy.now += 1
            Busy.most = max(Busy.most, Busy.now)
            threading.Event().wait(0.05)
            Busy.now -= 1
            return super().write_bytes(data, *parts, **options)

    model, optimizer = small_model(1)
    with Checkpoints(Busy(str(tmp_path)), "run", keep=9) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, model, optimizer)
        stalled = checkpoints.stalled_s

    assert Busy.most == 1
    assert stalled > 0.1  # two of the three waited for the one before
    assert checkpoints.committed() == [1, 2, 3]


def test_the_newest_are_kept_and_what_is_spared(storage):
    model, optimizer = small_model(1)
    with Checkpoints(storage, "run", keep=2) as checkpoints:
        checkpoints.spared = lambda steps: {2} & set(steps)
        for step in range(1, 7):
            checkpoints.save(step, model, optimizer)

    assert checkpoints.committed() == [2, 5, 6]
    assert storage.names("run") == ["step-00000002", "step-00000005", "step-00000006"]


def test_a_storage_that_fails_is_an_error_and_what_was_committed_is_intact(tmp_path):
    class Failing(Storage):
        is_full = False

        def write_bytes(self, data, *parts, **options):
            if self.is_full:
                raise StorageError("expected room, found the disk full")
            return super().write_bytes(data, *parts, **options)

    model, optimizer = small_model(1)
    before = numbers(model, optimizer)
    storage = Failing(str(tmp_path))
    checkpoints = Checkpoints(storage, "run")
    checkpoints.save(1, model, optimizer)
    checkpoints.wait()
    storage.is_full = True
    checkpoints.save(2, model, optimizer)
    with pytest.raises(StorageError, match="the disk full"):
        checkpoints.wait()
    other, others = small_model(2)

    assert restore(Checkpoints(storage, "run"), other, others)[0] == 1
    assert numbers(other, others) == before


def test_a_checkpoint_of_another_model_is_an_error_that_names_what_is_wrong(storage):
    model, optimizer = small_model(1)
    with Checkpoints(storage, "run") as checkpoints:
        checkpoints.save(1, model, optimizer)
    other = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))

    with pytest.raises(StorageError, match=r"all of weights/0\.weight in the checkpoint .*step-00000001"):
        restore(checkpoints, other, torch.optim.AdamW(other.parameters()))


def test_what_is_frozen_is_not_written(storage):
    model, _ = small_model(1)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Checkpoints(storage, "run") as checkpoints:
        checkpoints.save(1, model, optimizer)
    (part,) = checkpoints.marker(1).parts
    with storage.open_file("run", "step-00000001", part) as file:
        names = set(PartFile(file).sizes)

    assert names == {f"weights/{n}" for n in ("1.weight", "2.weight", "2.bias", "2.running_mean", "2.running_var")} | {
        "weights/2.num_batches_tracked"
    }


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk is mounted in a namespace of its own")
def test_a_full_disk_ends_a_run_with_an_error_that_says_so_and_with_room_it_goes_on(runs, uninterrupted, tmp_path):
    disk, task = tmp_path / "disk", tmp_path / "task"
    shutil.copytree(runs.storage.path("tokens"), disk / "tokens")
    task.write_bytes(pickle.dumps(replace(uninterrupted, storage=Storage(str(disk)), keep_checkpoints=9)))
    train = f"{sys.executable} {Path(__file__).with_name('small_disk.py')} {task}"
    # Room for some checkpoints of about 370 kB and for the tokens, and not for all.
    script = (
        f"cp -r {disk} {tmp_path}/full; mount -t tmpfs -o size=1100k none {disk} || exit 90; cp -r {tmp_path}/full/. {disk}; "
        f"{train}; mount -o remount,size=20m {disk}; {train}; sha256sum {disk}/model/uninterrupted/model.safetensors"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=200
    )
    if done.returncode in (1, 90) and "unshare" in done.stderr + done.stdout:
        pytest.skip(f"no namespace with a disk of its own here: {done.stderr[-200:]}")
    error, first, last, digest = done.stdout.splitlines()

    assert error.startswith("StorageError: expected room for "), (done.stdout, done.stderr[-3000:])
    assert "found the disk or the quota full; what was published is intact" in error
    assert first in ("committed 3", "committed 3 6", "committed 3 6 9"), done.stdout
    assert last == "committed 3 6 9 10"
    assert digest.split()[0] == hashlib.sha256(runs.files(uninterrupted)["model.safetensors"]).hexdigest()


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def divided(held, workers, *, sharded):
    """What each of so many workers would hold: a range of its own, or all of it with a share of the writing."""
    for rank in range(workers):
        if not sharded:
            yield [
                Held(name=h.name, values=h.values, start=0, size=h.size, replica=rank, replicas=workers) for h in held
            ]
            continue
        cuts = [(h, h.size * rank // workers, h.size * (rank + 1) // workers) for h in held]
        yield [Held(name=h.name, values=h.values[a:b], start=a, size=h.size) for h, a, b in cuts]


@pytest.mark.parametrize(("writers", "writes_sharded"), [(1, False), (2, False), (3, False), (3, True), (4, True)])
@pytest.mark.parametrize(("readers", "reads_sharded"), [(1, False), (2, True), (5, True)])
def test_any_number_of_workers_reads_what_any_number_has_written(
    tmp_path, writers, writes_sharded, readers, reads_sharded
):
    model, optimizer = small_model(1)
    held = [h for h in held_weights(model) + held_moments(model, optimizer) if h.size]
    files = []
    for rank, part in enumerate(divided(held, writers, sharded=writes_sharded)):
        (tmp_path / f"{rank}").write_bytes(Staging().copy(part))
        files.append(tmp_path / f"{rank}")
    empty = [Held(name=h.name, values=torch.full_like(h.values, 9), start=0, size=h.size) for h in held]
    for wanted in divided(empty, readers, sharded=reads_sharded):
        for file in files:
            with open(file, "rb") as stream:
                PartFile(stream).fill(wanted)

    assert {h.name: h.values.tolist() for h in empty} == {h.name: h.values.tolist() for h in held}
    # Nothing is written twice, and all write alike much.
    written = [sum(len(h.share().values) for h in part) for part in divided(held, writers, sharded=writes_sharded)]
    assert sum(written) == sum(h.size for h in held)
    assert max(written) - min(written) <= len(held)


def test_numbers_of_every_width_lie_side_by_side(tmp_path):
    dtypes = [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.float16, torch.float64]
    held = [Held(name=str(d), values=torch.arange(n).to(d), start=0, size=n) for n, d in enumerate(dtypes, start=1)]
    (tmp_path / "part").write_bytes(Staging().copy(held))
    found = [Held(name=h.name, values=torch.zeros_like(h.values), start=0, size=h.size) for h in held]
    with open(tmp_path / "part", "rb") as stream:
        PartFile(stream).fill(found)

    assert [h.values.tolist() for h in found] == [h.values.tolist() for h in held]
