"""Laws of the run log and the trackers: they change no result, they end no run, and what they wrote can be read back."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aifactory.observe import metrics
from aifactory.records.storage import Storage
from aifactory.train import run_log as run_log_module
from aifactory.train import worker
from aifactory.train.run_log import RunLog, curve
from aifactory.train.trackers import tracker_environment


def told(runs, task):
    return json.loads(Path(runs.storage.path(*task.run_folder, "progress.json")).read_text())


def folder_of(runs, task):
    return Path(runs.storage.path(*task.run_folder))


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_newest_figures_are_told_with_mfu_and_the_peak_that_it_is_a_share_of(runs):
    task = runs.work("told")
    runs.run(task)
    figures, last = runs.figures(task), told(runs, task)

    assert last["step"] == 10
    assert figures["peak_source"] == last["peak_source"] == "measured"
    share = figures["mfu"] * figures["peak_flops_per_s"]
    assert share == pytest.approx(last["mfu"] * last["peak_flops_per_s"], rel=0.5)
    assert 0 < figures["mfu"] < 1
    # The formula that is stated: one worker, so tokens/s times FLOPs a token is the share of the peak.
    assert last["mfu"] == pytest.approx(
        last["tokens_per_s"] * last["flops_per_token"] / last["peak_flops_per_s"], rel=0.2
    )


def test_what_is_told_has_the_curve_of_the_losses_the_length_of_the_run_and_the_time(runs):
    task = runs.work("told-curve")
    began = time.time()
    runs.run(task)
    last = told(runs, task)

    assert (last["steps"], last["tokens_per_step"]) == (10, 4 * 32)
    assert [tuple(point) for point in last["curve"]] == [tuple(point) for point in runs.figures(task)["curve"]]
    assert last["curve"][-1] == [10, last["loss"]]
    assert began <= last["at"] <= time.time()


def test_a_run_that_has_only_its_export_left_to_do_claims_no_utilisation(runs):
    task = runs.work("exported-again")
    runs.run(task)
    runs.run(task)

    assert runs.figures(task)["mfu"] is None


def test_a_run_that_was_stopped_keeps_every_loss_of_one_that_was_not(runs, uninterrupted, stopped):
    task = runs.work("curve-stopped")
    for stop_after in (4, 8):
        with pytest.raises(stopped):
            runs.run(task, stop_after=stop_after)
    runs.run(task)

    points = runs.figures(task)["curve"]
    assert points == runs.figures(uninterrupted)["curve"]
    assert [step for step, _ in points] == list(range(1, 11))
    assert points[-1][1] == runs.figures(task)["final_loss"]


def test_losses_after_the_checkpoint_from_which_a_run_goes_on_are_those_of_the_steps_that_count(tmp_path):
    def log_of(at):
        log = RunLog(Storage(str(tmp_path)), "runs", "a")
        log._losses, log._kept = log._read_losses(at), at
        log._started, log._taken, log._tokens_per_step = 0.0, 0, 1
        return log

    def step(log, done, loss):
        log.step(done, loss=loss, norm=1.0, rate=0.1)

    first = log_of(0)
    for done in (1, 2, 3):
        step(first, done, 1.0)
    first.keep()
    for done in (4, 5, 6):
        step(first, done, 2.0)
    first.keep()  # and the checkpoint after step 6 was never committed
    second = log_of(3)
    for done in (4, 5):
        step(second, done, 3.0)
    second.back(4)
    step(second, 5, 4.0)
    second.keep()

    assert log_of(5)._losses == [1.0, 1.0, 1.0, 3.0, 4.0]
    assert all(math.isnan(loss) for loss in log_of(7)._losses[5:])


def test_a_curve_has_few_points_and_each_is_the_mean_of_its_steps():
    points = curve([float(i) for i in range(1, 1001)], points=100)

    assert len(points) == 100
    assert points[0] == (10, 5.5)
    assert points[-1] == (1000, 995.5)
    assert curve([3.0, 1.0]) == [(1, 3.0), (2, 1.0)]
    assert curve([1.0, 2.0, 6.0], points=2) == [(2, 1.5), (3, 6.0)]
    assert curve([float("nan"), 2.0, 6.0]) == [(2, 2.0), (3, 6.0)]


# ── trackers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No library may ask the network, nor write to the home folder."""
    folder = tmp_path_factory.mktemp("home")
    changed = pytest.MonkeyPatch()
    for name, value in {"WANDB_MODE": "offline", "WANDB_CONFIG_DIR": folder, "WANDB_CACHE_DIR": folder}.items():
        changed.setenv(name, str(value))
    yield
    changed.undo()


def test_with_trackers_the_weights_are_the_same_to_the_bit(runs, uninterrupted, offline):
    task = runs.work("tracked", changes={"trackers": ("tensorboard", "wandb"), "factory": "tests"})
    runs.run(task)

    assert runs.figures(task)["warnings"] == []
    assert runs.files(task) == runs.files(uninterrupted)
    assert runs.figures(task)["curve"] == runs.figures(uninterrupted)["curve"]
    losses = [loss for _, loss in runs.figures(task)["curve"]]

    scalars = events(folder_of(runs, task) / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 11))
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses, rel=1e-6)
    assert set(scalars) == {
        f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu")
    }

    seen = read_wandb(folder_of(runs, task))
    assert [row["train/loss"] for row in seen] == pytest.approx(losses)


def read_wandb(folder):
    """The history of an offline run, from the file that `wandb sync` would send: LevelDB's log format, of protobufs."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_events_of_steps_that_are_taken_again_are_void(runs, stopped):
    task = runs.work("tracked-stopped", changes={"trackers": ("tensorboard",)})
    with pytest.raises(stopped):
        runs.run(task, stop_after=5)
    runs.run(task)

    steps = [step for step, _ in events(folder_of(runs, task) / "tensorboard")["train/loss"]]
    assert steps == list(range(1, 11))


def test_mlflow_has_one_run_whatever_stopped_it(runs, stopped, monkeypatch, tmp_path):
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("expected mlflow, found none: pip install 'aifactory[mlflow]'")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    task = runs.work("tracked-mlflow", changes={"trackers": ("mlflow",), "factory": "tests"})
    with pytest.raises(stopped):
        runs.run(task, stop_after=5)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["KILLED"]
    runs.run(task)

    assert runs.figures(task)["warnings"] == []
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tracked-mlflow")
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.params["guards.max_skipped"] == "3"
    kept = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert [kept[step] for step in range(1, 11)] == [loss for _, loss in runs.figures(task)["curve"]]


class Broken:
    """A tracker that fails, or hangs, at one of its calls."""

    name = "broken"

    def __init__(self, at, *, hangs=None):
        self.at, self.hangs = at, hangs

    def fail(self, where):
        if where == self.at and self.hangs is not None:
            self.hangs.wait()
        elif where == self.at:
            raise ConnectionError("the server is gone")

    def begin(self, run):
        self.fail("begin")

    def log(self, entries):
        self.fail("log")

    def end(self, is_finished):
        self.fail("end")


@pytest.mark.parametrize("at", ["begin", "log", "end"])
def test_a_tracker_that_fails_is_said_and_the_run_goes_on(runs, uninterrupted, monkeypatch, at):
    monkeypatch.setattr(worker, "make_trackers", lambda names: [Broken(at)])
    task = runs.work(f"tracked-broken-{at}")
    runs.run(task)

    said = ["the run is not tracked further by broken, and goes on without it: ConnectionError: the server is gone"]
    assert runs.figures(task)["warnings"] == told(runs, task)["warnings"] == said
    assert runs.files(task) == runs.files(uninterrupted)


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(runs, uninterrupted, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(run_log_module, "_LAST_WORDS_S", 0.2)
    monkeypatch.setattr(worker, "make_trackers", lambda names: [Broken("log", hangs=released)])
    task = runs.work("tracked-hung")
    runs.run(task)
    released.set()

    (said,) = runs.figures(task)["warnings"]
    assert "did not end within 0.2 s" in said
    assert runs.files(task) == runs.files(uninterrupted)


def test_a_library_that_is_not_installed_is_said(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    task = runs.work("tracked-without", changes={"trackers": ("tensorboard",)})
    runs.run(task)

    (said,) = runs.figures(task)["warnings"]
    assert "tracked further by tensorboard" in said
    assert "tensorboardX" in said


def test_variables_that_say_where_to_write_reach_the_workers(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    monkeypatch.setenv("WANDB_PROJECT", "mine")

    found = tracker_environment()
    assert (found["MLFLOW_TRACKING_URI"], found["WANDB_PROJECT"]) == ("http://somewhere", "mine")
    assert all(name.startswith(("MLFLOW_", "WANDB_")) for name in found)


def test_no_library_of_a_tracker_is_loaded_unless_it_is_asked_for():
    code = "import aifactory.train.worker, sys; print([m for m in ('tensorboardX', 'wandb', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_events_reach_a_storage_that_is_no_local_path(runs, tmp_path):
    (tmp_path / "away").mkdir()
    storage = Storage(f"local://{tmp_path}/away")  # fsspec's own name of a local folder: a URI like any other
    assert not storage.is_local
    from aifactory.train.trackers import TensorBoard, Tracked

    board = TensorBoard()
    board.begin(Tracked(name="a", group="", storage=storage, folder=("runs", "a"), first_step=0, parameters={"x": 1}))
    board.log([(1, {"loss": 2.0})])
    board.end(True)

    assert events(tmp_path / "away" / "runs" / "a" / "tensorboard") == {"train/loss": [(1, 2.0)]}


def test_the_meters_of_the_process_have_the_steps_and_the_tokens_of_a_run(runs, monkeypatch):
    for metric in metrics.meters.metrics.values():
        monkeypatch.setattr(metric, "_series", {})
    task = runs.work("metered")
    runs.run(task)
    figures = runs.figures(task)

    def value(metric):
        ((_, series),) = metric.series()
        return series.value

    assert value(metrics.TRAIN_STEPS) == figures["steps"] == 10
    assert value(metrics.TRAIN_TOKENS) == figures["tokens"]
    assert value(metrics.TRAIN_LOSS) == told(runs, task)["loss"]
    assert value(metrics.TRAIN_WAIT) == pytest.approx(
        figures["data_wait_share"] * figures["seconds"], rel=0.5, abs=0.01
    )
    assert 0 < figures["cpu_share"] <= 2 and figures["starved_share"] >= 0
