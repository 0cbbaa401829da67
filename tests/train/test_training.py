"""Laws of a run: resume equals uninterrupted to the bit, and how it runs changes nothing but the order of sums."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aifactory.engine.load import load_model
from aifactory.errors import ConfigError, TokenizerMismatchError, TrainingError, UnsafeModelError
from aifactory.text.shards import TokenRows
from aifactory.train import loop
from aifactory.train.base import model_from_scratch, resolve_base
from aifactory.train.checkpoint import Checkpoints, restore
from aifactory.train.room import NoRoomError, Room
from aifactory.train.step import make_optimizer, summed_loss
from aifactory.train.work import Stored
from aifactory.train.worker import work

GANG = Path(__file__).parent / "gang.py"


def losses(runs, task):
    """What the run wrote of its last tenth: at full precision, so equal only if every sum was made alike."""
    return runs.figures(task)["final_loss"]


# ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 6, 9, 10])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(runs, uninterrupted, stopped, stop_after):
    # Checkpoints are at 3, 6, 9 and 10: before the first, exactly at one, just after it, after the last step.
    task = runs.work(f"stopped-{stop_after}")
    with pytest.raises(stopped):
        runs.run(task, stop_after=stop_after)
    assert not runs.folder(task).exists()
    runs.run(task)

    assert runs.files(task) == runs.files(uninterrupted)
    assert losses(runs, task) == losses(runs, uninterrupted)
    assert runs.figures(task)["resumed_from"] == (10 if stop_after == 10 else stop_after // 3 * 3)


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bytes(runs, uninterrupted, stopped):
    task = runs.work("often")
    for stop_after in (4, 5, 7, 10):
        with pytest.raises(stopped):
            runs.run(task, stop_after=stop_after)
    runs.run(task)

    assert runs.files(task) == runs.files(uninterrupted)


def test_dropout_is_at_work_in_these_tests(runs, uninterrupted, largest_difference):
    task = runs.work("no-dropout", dropout=0.0)
    runs.run(task)

    assert largest_difference(task, uninterrupted) > 1e-3


def test_a_finished_run_that_is_started_again_ends_with_the_same_bytes(runs, uninterrupted):
    before = runs.files(uninterrupted)
    runs.run(uninterrupted)

    assert runs.files(uninterrupted) == before


def test_a_checkpoint_without_its_marker_does_not_exist(runs, uninterrupted, stopped):
    task = runs.work("unmarked")
    with pytest.raises(stopped):
        runs.run(task, stop_after=8)
    folder = Path(runs.storage.path(*task.run_folder))
    assert Checkpoints(runs.storage, *task.run_folder).committed() == [3, 6]
    (folder / "step-00000006" / "COMMITTED").unlink()
    for part in (folder / "step-00000006").iterdir():
        part.write_bytes(b"half of it")
    assert Checkpoints(runs.storage, *task.run_folder).committed() == [3]
    runs.run(task)

    assert runs.figures(task)["resumed_from"] == 3
    assert runs.files(task) == runs.files(uninterrupted)


def tiny_model(runs, uninterrupted):
    return model_from_scratch(
        uninterrupted.architecture, vocab_size=runs.tokenizer.vocab_size, end_id=0, row_len=32, seed=1
    )


def test_the_newest_checkpoints_are_kept(runs, uninterrupted):
    model = tiny_model(runs, uninterrupted)
    optimizer = make_optimizer(model, uninterrupted.recipe)
    checkpoints = Checkpoints(runs.storage, "runs", "kept", keep=2)
    for step in (1, 2, 30):
        checkpoints.save(step, model, optimizer)
    checkpoints.wait()

    assert checkpoints.committed() == [2, 30]
    assert runs.storage.names("runs", "kept") == ["step-00000002", "step-00000030"]


def test_a_checkpoint_holds_nothing_that_can_run_code(runs, uninterrupted, stopped):
    task = runs.work("plain")
    with pytest.raises(stopped):
        runs.run(task, stop_after=5)
    folder = Path(runs.storage.path(*task.run_folder, "step-00000003"))
    (part,) = folder.glob("*.safetensors")

    assert {file.name for file in folder.iterdir()} == {part.name, "COMMITTED"}
    assert json.loads((folder / "COMMITTED").read_text())["parts"] == [part.name]
    assert all(tensor.dim() == 1 for tensor in load_file(part).values())


def test_no_checkpoint_is_step_zero(runs, uninterrupted):
    model = tiny_model(runs, uninterrupted)

    optimizer = make_optimizer(model, uninterrupted.recipe)
    assert restore(Checkpoints(runs.storage, "runs", "none"), model, optimizer) == (0, [])


FSDP = {"parallel": "fsdp", "micro_batch_rows": 1}
# A sum of three depends on its order.
SIX = {"global_batch_rows": 6}
ACROSS = {"reproducible": "across_workers", "micro_batch_rows": 1, "threads": 1}


# ── several workers, micro-batches ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gang(runs, tmp_path_factory):
    """All runs in processes of their own, in one go: torch takes seconds to import."""
    one_row = {"micro_batch_rows": 1}
    tasks = {
        "killed-1": (runs.work("killed-1"), 1, 7),
        "killed-2": (runs.work("killed-2", changes=one_row), 2, 6),
        "two": (runs.work("two"), 2, None),
        "two-dropped": (runs.work("two-dropped", changes=one_row), 2, None),
        "uneven-2": (runs.work("uneven-2", dropout=0.0, global_batch_rows=5), 2, None),
        "uneven-3": (runs.work("uneven-3", dropout=0.0, global_batch_rows=5), 3, None),
        "three": (runs.work("three", **SIX), 3, None),
        "three-killed": (runs.work("three-killed", **SIX), 3, 7),
        "three-again": (runs.work("three-killed", **SIX), 3, None),
        "fsdp-3": (runs.work("fsdp-3", changes=FSDP, **SIX), 3, None),
        "fsdp-3-killed": (runs.work("fsdp-3-killed", changes=FSDP, **SIX), 3, 7),
        "fsdp-3-again": (runs.work("fsdp-3-killed", changes=FSDP, **SIX), 3, None),
        "bf16": (runs.work("bf16-2", dropout=0.0, precision="bf16"), 2, None),
        "fsdp": (runs.work("fsdp", changes=FSDP), 2, None),
        "fsdp-killed": (runs.work("fsdp-killed", changes=FSDP), 2, 7),
        "fsdp-again": (runs.work("fsdp-killed", changes=FSDP), 2, None),
        "fsdp-to-one": (runs.work("fsdp-to-one", changes=FSDP), 2, 7),
        "fsdp-bf16": (runs.work("fsdp-bf16", dropout=0.0, precision="bf16", changes=FSDP), 2, None),
        "hybrid": (runs.work("hybrid", changes={**FSDP, "shard_workers": 2}), 4, None),
        "tree-2": (runs.work("tree-2", **ACROSS), 2, None),
        "tree-4": (runs.work("tree-4", **ACROSS), 4, None),
        "tree-killed": (runs.work("tree-killed", **ACROSS), 4, 7),
        "tree-again": (runs.work("tree-killed", **ACROSS), 2, None),
    }
    file = tmp_path_factory.mktemp("gang") / "jobs"
    file.write_bytes(pickle.dumps(list(tasks.values())))
    done = subprocess.run([sys.executable, GANG, file], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    codes = dict(zip(tasks, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return {name: task for name, (task, _, _) in tasks.items()}, codes, done.stderr


def test_a_run_that_was_killed_ends_with_the_same_bytes(runs, uninterrupted, gang):
    tasks, codes, _ = gang

    assert codes["killed-1"] == [-9]
    assert not runs.folder(tasks["killed-1"]).exists()
    runs.run(tasks["killed-1"])

    assert runs.figures(tasks["killed-1"])["resumed_from"] in (3, 6)
    assert runs.files(tasks["killed-1"]) == runs.files(uninterrupted)


def test_a_run_of_two_workers_that_was_killed_can_be_ended_by_one(runs, gang, largest_difference):
    tasks, codes, _ = gang

    assert codes["killed-2"][0] == -9
    assert codes["killed-2"][1] != 0
    runs.run(tasks["killed-2"])

    assert runs.figures(tasks["killed-2"])["resumed_from"] in (3, 6)
    assert largest_difference(tasks["killed-2"], tasks["two-dropped"]) < 1e-5


def test_two_workers_equal_one(runs, uninterrupted, gang, largest_difference):
    tasks, codes, errors = gang
    alone = runs.work("alone-dropped", changes={"micro_batch_rows": 1})
    runs.run(alone)

    assert codes["two"] == codes["two-dropped"] == [0, 0], errors
    # Dropout is the same too, as its seeds are those of the slots.
    assert largest_difference(tasks["two"], uninterrupted) < 1e-5
    assert largest_difference(tasks["two-dropped"], alone) < 1e-5
    assert losses(runs, tasks["two"]) == pytest.approx(losses(runs, uninterrupted), rel=1e-5)


@pytest.mark.parametrize("name", ["uneven-2", "uneven-3"])
def test_workers_equal_one_where_the_rows_do_not_divide_evenly(runs, gang, largest_difference, name):
    tasks, codes, errors = gang
    alone = runs.work(f"alone-{name}", dropout=0.0, global_batch_rows=5)
    runs.run(alone)

    assert set(codes[name]) == {0}, errors
    assert largest_difference(tasks[name], alone) < 1e-5
    assert losses(runs, tasks[name]) == pytest.approx(losses(runs, alone), rel=1e-5)


def test_more_workers_than_rows_are_refused(runs):
    with pytest.raises(TrainingError, match=r"train\.global_batch_rows, found 1 rows for 2 workers"):
        work(runs.work("too-many", global_batch_rows=1), rank=0, world_size=2, device=torch.device("cpu"))


def test_bf16_trains_with_one_worker_and_with_two(runs, gang, largest_difference):
    tasks, codes, errors = gang
    alone = runs.work("bf16-1", dropout=0.0, precision="bf16")
    runs.run(alone)
    exact = runs.work("fp32", dropout=0.0)
    runs.run(exact)

    assert codes["bf16"] == [0, 0], errors
    assert runs.figures(alone)["precision"] == "bf16"
    assert {weight.dtype for weight in runs.weights(alone).values()} == {torch.float32}
    assert losses(runs, alone) == pytest.approx(losses(runs, exact), rel=0.02)
    assert losses(runs, tasks["bf16"]) == pytest.approx(losses(runs, alone), rel=0.02)
    assert largest_difference(alone, exact) > 0


def test_fsdp_equals_ddp(runs, gang, largest_difference):
    tasks, codes, errors = gang

    assert codes["fsdp"] == [0, 0], errors
    assert codes["hybrid"] == [0, 0, 0, 0], errors
    assert largest_difference(tasks["fsdp"], tasks["two-dropped"]) < 1e-5
    assert largest_difference(tasks["hybrid"], tasks["two-dropped"]) < 1e-5
    assert losses(runs, tasks["fsdp"]) == pytest.approx(losses(runs, tasks["two-dropped"]), rel=1e-5)


def test_a_run_of_fsdp_that_was_killed_ends_with_the_same_bytes(runs, gang):
    tasks, codes, errors = gang

    assert codes["fsdp-killed"][0] == -9
    assert codes["fsdp-again"] == [0, 0], errors
    assert runs.figures(tasks["fsdp-again"])["resumed_from"] in (3, 6)
    assert runs.files(tasks["fsdp-again"]) == runs.files(tasks["fsdp"])
    assert losses(runs, tasks["fsdp-again"]) == losses(runs, tasks["fsdp"])


@pytest.mark.parametrize("how", ["three", "fsdp-3"])
def test_a_run_of_three_that_was_killed_ends_with_the_same_bytes(runs, gang, how):
    tasks, codes, errors = gang

    assert codes[how] == [0, 0, 0], errors
    assert codes[f"{how}-killed"][0] == -9
    assert codes[f"{how}-again"] == [0, 0, 0], errors
    assert runs.figures(tasks[f"{how}-again"])["resumed_from"] in (3, 6)
    assert runs.files(tasks[f"{how}-again"]) == runs.files(tasks[how])
    assert losses(runs, tasks[f"{how}-again"]) == losses(runs, tasks[how])


def test_what_fsdp_began_one_worker_can_end(runs, gang, largest_difference):
    tasks, codes, _ = gang
    alone = replace(tasks["fsdp-to-one"], parallel="ddp")
    runs.run(alone)

    assert codes["fsdp-to-one"][0] == -9
    assert runs.figures(alone)["resumed_from"] in (3, 6)
    assert largest_difference(alone, tasks["two-dropped"]) < 1e-5


def test_fsdp_in_bf16_learns_what_ddp_learns(runs, gang):
    tasks, codes, errors = gang

    assert codes["fsdp-bf16"] == [0, 0], errors
    assert {weight.dtype for weight in runs.weights(tasks["fsdp-bf16"]).values()} == {torch.float32}
    assert losses(runs, tasks["fsdp-bf16"]) == pytest.approx(losses(runs, tasks["bf16"]), rel=0.02)


def test_fsdp_refuses_a_batch_that_its_workers_can_not_share_evenly(runs):
    with pytest.raises(
        TrainingError, match=r"expected runtime\.workers to divide train\.global_batch_rows.*found 2 and 5"
    ):
        work(runs.work("odd", global_batch_rows=5, changes=FSDP), rank=0, world_size=2, device=torch.device("cpu"))


# ── the same bits by any number of workers ────────────────────────────────────────────────────────────────────────────


def test_across_workers_1_2_and_4_workers_end_with_the_same_bytes_dropout_included(runs, gang, largest_difference):
    tasks, codes, errors = gang
    alone = runs.work("tree-1", **ACROSS)
    runs.run(alone)

    assert (codes["tree-2"], codes["tree-4"]) == ([0] * 2, [0] * 4), errors
    assert runs.files(tasks["tree-2"]) == runs.files(tasks["tree-4"]) == runs.files(alone)
    assert losses(runs, tasks["tree-2"]) == losses(runs, tasks["tree-4"]) == losses(runs, alone)
    # The same run as any other, but for the order of its sums.
    assert largest_difference(alone, tasks["two-dropped"]) < 1e-5


def test_without_it_the_bytes_differ_by_the_number_of_workers(runs, gang):
    tasks, _, _ = gang
    alone = runs.work("execution-1", changes={"micro_batch_rows": 1})
    runs.run(alone)

    assert runs.files(alone) != runs.files(tasks["two-dropped"])


def test_across_workers_a_run_of_four_that_was_killed_ends_with_two_and_the_same_bytes(runs, gang):
    tasks, codes, errors = gang

    assert codes["tree-killed"][0] == -9
    assert codes["tree-again"] == [0, 0], errors
    assert runs.figures(tasks["tree-again"])["resumed_from"] in (3, 6)
    assert runs.files(tasks["tree-again"]) == runs.files(tasks["tree-4"])
    assert losses(runs, tasks["tree-again"]) == losses(runs, tasks["tree-4"])


def test_across_workers_the_micro_batch_of_the_runtime_changes_nothing(runs):
    tasks = [runs.work(f"tree-micro-{rows}", **ACROSS, changes={"micro_batch_rows": rows}) for rows in (1, 4)]
    for task in tasks:
        runs.run(task)

    assert runs.files(tasks[0]) == runs.files(tasks[1])


def test_micro_batches_equal_one_large_batch(runs, largest_difference):
    tasks = [runs.work(f"micro-{rows}", dropout=0.0, changes={"micro_batch_rows": rows}) for rows in (4, 1, 2, 3, 100)]
    for task in tasks:
        runs.run(task)

    for task in tasks[1:]:
        assert largest_difference(task, tasks[0]) < 1e-5
        assert losses(runs, task) == pytest.approx(losses(runs, tasks[0]), rel=1e-5)
    assert runs.weights(tasks[4]).keys() == runs.weights(tasks[0]).keys()


def test_a_run_learns(runs):
    task = runs.work("learns", dropout=0.0, max_steps=80, changes={"checkpoint_every_steps": 1000})
    runs.run(task)
    told = json.loads(Path(runs.storage.path(*task.run_folder, "progress.json")).read_text())

    assert losses(runs, task) < 0.6 * math.log(runs.tokenizer.vocab_size)
    assert told["step"] == 80
    assert runs.figures(task)["tokens"] == 80 * 4 * 32


def test_the_seed_makes_another_model(runs, uninterrupted, largest_difference):
    task = runs.work("seeded", seed=2)
    runs.run(task)

    assert largest_difference(task, uninterrupted) > 1e-2


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gradient_that_is_not_finite_ends_the_run_and_harms_no_checkpoint(runs, uninterrupted, stopped):
    task = runs.work("diverges", guards={"max_skipped": 0})
    with pytest.raises(stopped):
        runs.run(task, stop_after=5)
    checkpoints = Checkpoints(runs.storage, *task.run_folder)
    (part,) = Path(runs.storage.path(*task.run_folder, "step-00000003")).glob("*.safetensors")
    good = part.read_bytes()
    weights = runs.weights(uninterrupted)
    with safe_open(part, "pt") as file:
        metadata = file.metadata()
    state = load_file(part)
    state["weights/model.embed_tokens.weight"][:] = 1e38
    save_file(state, part, metadata)

    said = r"found one more at step 3: .* is (nan|inf); the checkpoints up to step 3 are intact"
    with pytest.raises(TrainingError, match=said):
        runs.run(task)

    assert checkpoints.committed() == [3]
    part.write_bytes(good)
    runs.run(task)
    assert {name: file.tolist() for name, file in runs.weights(task).items()} == {
        name: weight.tolist() for name, weight in weights.items()
    }


@pytest.fixture
def poisoned_base(runs, uninterrupted, tmp_path):
    """A model that one token breaks: whatever is read with it has no finite loss. And the ids of the rows with that token."""
    model = tiny_model(runs, uninterrupted)
    model.config.tie_word_embeddings = False
    untied = type(model)(model.config)
    ids = [row["ids"] for row in every_row(runs)]
    counts = {token: sum(token in row for row in ids) for token in {t for row in ids for t in row}}
    token = min((count, token) for token, count in counts.items())[1]
    with torch.no_grad():
        untied.get_input_embeddings().weight[token] = float("inf")
    untied.save_pretrained(tmp_path / "poisoned")
    return tmp_path / "poisoned", token


def every_row(runs):
    for row_set in runs.row_sets:
        rows = TokenRows(Path(runs.storage.path(*row_set.shards.folder)), row_set.shards.names)
        for index in range(len(rows)):
            yield {
                "ids": rows.read(np.array([index]))[0][0].tolist(),
                "documents": {document["row"] for document in rows.documents(index)},
            }


@pytest.mark.parametrize("every", [2, 1000])
def test_a_batch_without_a_finite_loss_is_left_out_its_rows_are_named_and_the_run_goes_on(
    runs, stopped, poisoned_base, every
):
    base, token = poisoned_base
    changes = {"base": base, "checkpoint_every_steps": every}
    task = runs.work(f"poisoned-{every}", dropout=0.0, guards={"max_skipped": 20}, changes=changes)
    runs.run(task)
    skipped = runs.figures(task)["skipped"]

    assert 0 < len(skipped) < 20
    poisoned = set().union(*(row["documents"] for row in every_row(runs) if token in row["ids"]))
    for each in skipped:
        assert "is nan" in each["reason"] or "is inf" in each["reason"]
        assert set(each["rows"]) & poisoned
    assert all(torch.isfinite(weight).all() for name, weight in runs.weights(task).items() if "embed" not in name)
    assert runs.figures(task)["steps"] == 10

    again = runs.work(f"poisoned-again-{every}", dropout=0.0, guards={"max_skipped": 20}, changes=changes)
    for stop_after in (1, 4, 7):
        with pytest.raises(stopped):
            runs.run(again, stop_after=stop_after)
    runs.run(again)
    assert runs.files(again) == runs.files(task)
    assert runs.figures(again)["skipped"] == skipped


def test_more_batches_than_allowed_stop_the_run(runs, poisoned_base):
    task = runs.work("too-poisoned", guards={"max_skipped": 0}, changes={"base": poisoned_base[0]})

    with pytest.raises(TrainingError, match=r"expected at most 0 batches .* Lower train\.learning_rate"):
        runs.run(task)
    assert not runs.folder(task).exists()


@pytest.fixture
def narrow(monkeypatch):
    """Memory for so many rows at once, from a step on."""

    def make(rows, *, from_call=0):
        calls = []

        def crowded(model, ids_BT, *rest, **options):
            calls.append(len(ids_BT))
            if len(ids_BT) > rows and len(calls) > from_call:
                raise torch.OutOfMemoryError(f"no room for {len(ids_BT)} rows")
            return summed_loss(model, ids_BT, *rest, **options)

        monkeypatch.setattr(loop, "summed_loss", crowded)
        return calls

    return make


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_run_is_that_of_smaller_ones(runs, narrow):
    small = runs.work("small", changes={"micro_batch_rows": 1})
    runs.run(small)
    calls = narrow(1)
    task = runs.work("crowded", changes={"micro_batch_rows": 4})
    runs.run(task)

    assert calls[:3] == [4, 2, 1]
    assert set(calls[2:]) == {1}
    assert runs.files(task) == runs.files(small)
    assert runs.figures(task)["micro_batch_rows"] == 1


def test_a_run_that_gets_too_little_room_goes_on_from_its_checkpoint(runs, uninterrupted, narrow, largest_difference):
    narrow(1, from_call=9)
    task = runs.work("crowded-later", dropout=0.0)
    runs.run(task)
    plain = runs.work("never-crowded", dropout=0.0)
    narrow(2)
    runs.run(plain)

    assert runs.figures(task)["resumed_from"] == 3
    assert largest_difference(task, plain) < 1e-5


def test_one_row_that_does_not_fit_and_a_micro_batch_that_is_fixed_are_errors(runs, narrow):
    narrow(0)
    for task in (runs.work("no-room"), runs.work("no-room-fixed", **{**ACROSS, "micro_batch_rows": 2})):
        with pytest.raises(TrainingError, match="can't be halved"):
            runs.run(task)


def test_what_fits_is_noted_for_the_next_start(runs, narrow):
    narrow(1)
    task = runs.work("crowded-gang", changes={"micro_batch_rows": 2})
    room = Room(runs.storage, *task.run_folder)
    with pytest.raises(NoRoomError, match="begun again, the run takes 1"), room.watched(2, is_fixed=False):
        loop.summed_loss(None, torch.zeros(2, 8))

    assert room.rows(8) == 1
    assert Room(runs.storage, "runs", "other").rows(8) == 8


def test_other_errors_are_no_lack_of_room(runs):
    with pytest.raises(RuntimeError, match="shape"), Room(runs.storage, "runs", "shape").watched(2, is_fixed=False):
        raise RuntimeError("a wrong shape")
    assert Room(runs.storage, "runs", "shape").rows(2) == 2


def test_a_row_longer_than_the_context_is_refused(runs, uninterrupted):
    architecture = uninterrupted.architecture.model_copy(update={"context_length": 16})

    with pytest.raises(ConfigError, match=r"tokenize\.row_len.*found 32 and 16"):
        runs.run(runs.work("long", changes={"architecture": architecture}))


def test_a_base_that_can_not_read_the_rows_is_refused(runs, uninterrupted, tmp_path):
    model = load_model(runs.folder(uninterrupted), device="cpu", dtype=torch.float32)
    model.config.max_position_embeddings = 16
    model.save_pretrained(tmp_path / "short")
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "few")

    with pytest.raises(ConfigError, match=r"tokenize\.row_len of at most the 16 tokens.*found 32"):
        runs.run(runs.work("short", changes={"base": tmp_path / "short"}))
    with pytest.raises(TokenizerMismatchError, match=r"300 tokens.*found 200"):
        runs.run(runs.work("few", changes={"base": tmp_path / "few"}))


def test_a_base_with_a_pickle_is_refused(runs, uninterrupted, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, data in runs.files(uninterrupted).items():
        (folder / name).write_bytes(data)
    assert resolve_base(str(folder)) == folder
    (folder / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        resolve_base(str(folder))
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin"):
        runs.run(runs.work("unsafe", changes={"base": folder}))


def test_a_missing_base_is_an_error_that_says_what_is_possible(tmp_path):
    with pytest.raises(ConfigError, match=r"a model folder, a hub id or registry:production at model\.base"):
        resolve_base(str(tmp_path / "nowhere"))


# ── export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_export_is_a_folder_that_transformers_loads_with_equal_logits_and_ids(runs, uninterrupted):
    folder = runs.folder(uninterrupted)
    ours = load_model(folder, device="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    text = "the quick größe 日本語 return x = 1"
    ids = torch.tensor([runs.tokenizer.encode(text)])

    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    for loaded in (AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)):
        assert loaded.encode(text, add_special_tokens=False) == ids[0].tolist()
        assert loaded.decode(ids[0]) == text
        assert loaded.eos_token_id == runs.tokenizer.eos_id
    assert theirs.config.eos_token_id == runs.tokenizer.eos_id


def test_the_export_holds_nothing_that_can_run_code(runs, uninterrupted):
    assert sorted(runs.files(uninterrupted)) == [
        "config.json",
        "generation_config.json",
        "golden.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(runs.files(uninterrupted)["config.json"])["tie_word_embeddings"] is True


def test_training_goes_on_from_a_folder_and_from_a_stored_model(runs, uninterrupted, largest_difference):
    from_folder = runs.work("child-a", max_steps=3, changes={"base": runs.folder(uninterrupted)})
    stored = Stored(folder=uninterrupted.model_folder, names=tuple(runs.files(uninterrupted)))
    from_store = runs.work("child-b", max_steps=3, changes={"base": stored})
    for task in (from_folder, from_store):
        runs.run(task)

    assert runs.files(from_folder) == runs.files(from_store)
    assert 0 < largest_difference(from_folder, uninterrupted) < 0.5
    assert losses(runs, from_folder) < losses(runs, runs_from_scratch(runs))


def runs_from_scratch(runs):
    task = runs.work("child-c", max_steps=3)
    runs.run(task)
    return task


def test_the_work_of_a_run_can_be_pickled(uninterrupted):
    assert pickle.loads(pickle.dumps(uninterrupted)) == uninterrupted


def test_a_partial_file_beside_the_tokenizer_is_not_exported(runs, uninterrupted):
    partial = Path(runs.storage.path("tokens", "a", "tokenizer", ".tokenizer.json.0a1b"))
    partial.write_bytes(b"half")
    task = replace(runs.work("partial"), recipe=uninterrupted.recipe)
    runs.run(task)
    partial.unlink()

    assert runs.files(task) == runs.files(uninterrupted)
