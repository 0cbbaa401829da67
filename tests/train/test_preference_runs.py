"""Laws of runs that learn preferences, and of adapters: as for any run, and the start is never forgotten."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from aifactory.engine.engine import TorchEngine
from aifactory.engine.golden import check_golden_adapter
from aifactory.engine.load import load_model, require_safe_folder
from aifactory.errors import ConfigError, ParityError, TrainingError
from aifactory.text.documents import document_tokens
from aifactory.text.shards import TokenRows, shard_bytes
from aifactory.tokens.packing import pack_preferences
from aifactory.tokens.preferences import Preferences
from aifactory.train.checkpoint import Checkpoints
from aifactory.train.pieces import WEIGHTS, PartFile
from aifactory.train.work import RowSet, Stored

GANG = Path(__file__).parent / "gang.py"
ROW_LEN = 64
DPO = {"objective": "dpo", "preference": {"beta": 0.5}}
KTO = {"objective": "kto", "preference": {"beta": 0.5}}
LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 3e-2}
FSDP = {"parallel": "fsdp", "micro_batch_rows": 1}
ACROSS = {"reproducible": "across_workers", "micro_batch_rows": 1, "threads": 1}
RECIPES = {
    "dpo": DPO,
    "kto": KTO,
    "lora": LORA,
    "lora-dpo": DPO | LORA,
    "lora-kto": KTO | LORA,
}


@pytest.fixture(scope="module")
def sets(runs):
    """By objective what a run reads: answers that say `fox` are preferred to those that say `brown`."""
    rng = random.Random(5)

    def documents(texts):
        encoded = [document_tokens(runs.tokenizer, prompt="say it: ", text=text) for text in texts]
        return [ids for ids, _ in encoded], [len(mask) - sum(mask) for _, mask in encoded]

    def write(name, units, marks):
        texts = [text for unit in units for text in unit]
        ids, prompts = documents(texts)
        shape = (len(units), len(units[0]))
        lengths = np.array([len(each) for each in ids], np.int64)
        preferences = Preferences(
            ids_N=np.concatenate([np.array(each, np.uint16) for each in ids]),
            begins_UK=(np.cumsum(lengths) - lengths).reshape(shape),
            lengths_UK=lengths.reshape(shape),
            prompt_lengths_UK=np.array(prompts, np.int64).reshape(shape),
            marks_UK=np.array(marks, np.int8).reshape(shape),
            refused={},
        )
        names = pa.array([f"{name}-{i}" for i in range(len(units))])
        rows = pack_preferences(names, preferences, row_len=ROW_LEN, pad_id=runs.tokenizer.eos_id)
        file = runs.storage.write_bytes(shard_bytes(rows), "tokens", name, "shard-0.arrow").name
        return (RowSet(shards=Stored(folder=("tokens", name), names=(file,)), share=1.0),)

    def said(word):
        return " ".join([rng.choice(["the", "quick", "over"]), word, rng.choice(["jumps", "x = 1"])])

    pairs = [(said("fox"), said("brown")) for _ in range(60)]
    return {
        "likelihood": runs.row_sets,
        "dpo": write("pairs", pairs, [[1, -1]] * 60),
        "kto": write("marked", [(answer,) for pair in pairs for answer in pair], [[1], [-1]] * 60),
    }


@pytest.fixture(scope="module")
def base(runs):
    """A model that has learnt to speak."""
    task = runs.work("preference-base", max_steps=40, changes={"checkpoint_every_steps": 1000})
    runs.run(task)
    return task


@pytest.fixture(scope="module")
def make(runs, sets, base):
    def work(name, recipe, *, changes=None, **more):
        """A run of a recipe from the base."""
        values = {"learning_rate": 3e-3, "max_steps": 8, **recipe, **more}
        return runs.work(
            name,
            changes={
                "base": Stored(folder=base.model_folder, names=tuple(runs.files(base))),
                "row_sets": sets[values.get("objective", "likelihood")],
                **(changes or {}),
            },
            **values,
        )

    return work


@pytest.fixture(scope="module")
def gang(runs, make, tmp_path_factory):
    """All runs in processes of their own, in one go."""
    one_row = {"micro_batch_rows": 1}
    tasks = {}
    for name, recipe in RECIPES.items():
        tasks[f"{name}-ddp"] = (make(f"{name}-ddp", recipe, changes=one_row), 2, None)
        tasks[f"{name}-fsdp"] = (make(f"{name}-fsdp", recipe, changes=FSDP), 2, None)
    for name in ("kto", "lora-dpo"):
        tasks[f"{name}-tree"] = (make(f"{name}-tree", {**RECIPES[name], **ACROSS}), 2, None)
    for name in ("dpo", "lora-kto"):
        tasks[f"{name}-killed"] = (make(f"{name}-again", RECIPES[name], changes=FSDP), 2, 5)
        tasks[f"{name}-again"] = (make(f"{name}-again", RECIPES[name], changes=FSDP), 2, None)
    file = tmp_path_factory.mktemp("gang") / "jobs"
    file.write_bytes(pickle.dumps(list(tasks.values())))
    done = subprocess.run([sys.executable, GANG, file], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    codes = dict(zip(tasks, json.loads(done.stdout.splitlines()[-1]), strict=True))
    return {name: task for name, (task, _, _) in tasks.items()}, codes, done.stderr


@pytest.fixture(scope="module")
def alone(runs, make):
    """The same recipes by one worker."""
    tasks = {name: make(f"{name}-alone", recipe, changes={"micro_batch_rows": 1}) for name, recipe in RECIPES.items()}
    for task in tasks.values():
        runs.run(task)
    return tasks


def preference(runs, task, sets):
    """How much likelier (nats) the answers with `fox` are than those with `brown`, on average."""
    model = load_model(runs.folder(task), device="cpu", dtype=torch.float32)
    rows = TokenRows(Path(runs.storage.path("tokens", "marked")), ["shard-0.arrow"])
    ids, positions, loss = (torch.from_numpy(values) for values in rows.read(np.arange(len(rows))))
    marks = torch.from_numpy(rows.marks(np.arange(len(rows))))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.log_softmax(-1)
    told = logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) * loss[:, 1:]
    return float((told * marks[:, 1:]).sum() / 60)


@pytest.mark.parametrize("name", ["dpo", "kto", "lora-dpo", "lora-kto"])
def test_a_run_learns_to_prefer_what_is_preferred(runs, sets, base, alone, name):
    assert preference(runs, alone[name], sets) > preference(runs, base, sets) + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_equal_one_by_ddp_and_by_fsdp(runs, alone, gang, largest_difference, name):
    tasks, codes, errors = gang

    for how in ("ddp", "fsdp"):
        assert codes[f"{name}-{how}"] == [0, 0], errors
        assert largest_difference(tasks[f"{name}-{how}"], alone[name]) < 1e-5
        assert runs.figures(tasks[f"{name}-{how}"])["final_loss"] == pytest.approx(
            runs.figures(alone[name])["final_loss"], rel=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "lora-dpo"])
def test_across_workers_one_and_two_end_with_the_same_bytes(runs, make, gang, name):
    tasks, codes, errors = gang
    single = make(f"{name}-tree-1", {**RECIPES[name], **ACROSS})
    runs.run(single)

    assert codes[f"{name}-tree"] == [0, 0], errors
    assert runs.files(single) == runs.files(tasks[f"{name}-tree"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "lora-kto"])
def test_a_run_of_fsdp_that_was_killed_ends_with_the_same_bytes(runs, gang, name):
    tasks, codes, errors = gang

    assert codes[f"{name}-killed"][0] == -9
    assert codes[f"{name}-again"] == [0, 0], errors
    assert runs.figures(tasks[f"{name}-again"])["resumed_from"] == 3
    assert runs.files(tasks[f"{name}-again"]) == runs.files(tasks[f"{name}-fsdp"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(runs, make, alone, stopped, name):
    task = make(f"{name}-stopped", RECIPES[name], changes={"micro_batch_rows": 1})
    for stop_after in (2, 5, 7):
        with pytest.raises(stopped):
            runs.run(task, stop_after=stop_after)
    runs.run(task)

    assert runs.figures(task)["resumed_from"] == 6
    assert runs.files(task) == runs.files(alone[name])


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_logits(model):
    ids = torch.arange(40).reshape(2, 20) + 10
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["lora", "lora-dpo"])
def test_the_merged_folder_and_the_adapter_beside_its_base_say_the_same(runs, base, alone, name):
    folder = runs.folder(alone[name])
    require_safe_folder(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(runs.folder(base), dtype=torch.float32)
    unchanged = some_logits(start)
    adapted = some_logits(PeftModel.from_pretrained(start, folder / "adapter"))

    # Stated: 1e-4, where the two differ by the order of sums alone.
    torch.testing.assert_close(some_logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert float((adapted - unchanged).abs().max()) > 0.1
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["base_model_name_or_path"] is None
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_engine_serves_the_adapter_beside_its_base_and_not_beside_what_it_is_merged_into(runs, base, alone):
    folder = runs.folder(alone["lora"])
    for start, fits in ((runs.folder(base), True), (folder, False)):
        engine = TorchEngine.from_folder(start, num_slots=1, num_threads=1)
        try:
            engine.add_adapter("trained", folder / "adapter")
            check = partial(check_golden_adapter, folder, engine, runs.tokenizer, adapter="trained", tolerance=1e-3)
            if fits:
                assert check() < 1e-4
            else:
                with pytest.raises(ParityError, match="other weights"):
                    check()
        finally:
            engine.close(0.0)


def test_adapters_alone_are_trained_and_kept_in_checkpoints(runs, make, alone, base, stopped):
    task = make("lora-kept", LORA, changes={"micro_batch_rows": 1})
    with pytest.raises(stopped):
        runs.run(task, stop_after=4)
    checkpoints = Checkpoints(runs.storage, *task.run_folder)
    (step,) = checkpoints.committed()
    sizes = {}
    for part in checkpoints.marker(step).parts:
        with runs.storage.open_file(*task.run_folder, f"step-{step:08d}", part) as file:
            sizes |= PartFile(file).sizes
    weights = {name: size for name, size in sizes.items() if name.startswith(WEIGHTS)}

    assert weights
    assert all("lora_" in name for name in sizes)
    before, after = runs.weights(base), runs.weights(alone["lora"])
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("_proj.weight")
    }
    figures = runs.figures(alone["lora"])
    assert figures["trained"] == sum(weights.values()) < figures["parameters"]


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 2), ("alpha", 1.0), ("dropout", 0.0), ("target_modules", ["q_proj", "v_proj"])]
)
def test_each_option_of_lora_makes_another_model(runs, make, alone, option, value):
    lora = {**LORA["lora"], option: value}
    task = make(f"lora-{option}", {**LORA, "lora": lora}, changes={"micro_batch_rows": 1})
    runs.run(task)
    adapter = load_file(runs.folder(task) / "adapter" / "adapter_model.safetensors")

    assert runs.files(task) != runs.files(alone["lora"])
    if option == "rank":
        assert {min(each.shape) for each in adapter.values()} == {2}
    if option == "target_modules":
        assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}


def test_modules_that_are_not_there_are_named(runs, make):
    with pytest.raises(ConfigError, match=r"train\.lora\.target_modules, found \('nowhere',\)"):
        runs.run(make("lora-nowhere", {"lora": {"target_modules": ["nowhere"]}}))


@pytest.mark.parametrize(("asked", "given"), [("dpo", "likelihood"), ("likelihood", "dpo")])
def test_rows_that_were_packed_for_another_objective_are_refused(runs, sets, make, asked, given):
    task = replace(make(f"wrong-{asked}", {"objective": asked}), row_sets=sets[given])

    with pytest.raises(
        TrainingError, match=rf"made for train\.objective: {asked}, found rows (of|without) preferences"
    ):
        runs.run(task)


@pytest.mark.parametrize("name", ["dpo", "lora-kto"])
def test_held_out_rows_are_judged_by_the_loss_of_the_objective(runs, sets, make, alone, name):
    held_out = sets[RECIPES[name]["objective"]][0].shards
    changes = {"micro_batch_rows": 1, "held_out": held_out, "validate_every_steps": 4}
    task = make(f"{name}-validated", RECIPES[name], changes=changes)
    runs.run(task)
    losses = runs.figures(task)["holdout_loss"]

    # As it starts the loss is log 2, or a half, whatever the answers.
    start = 0.6931 if name == "dpo" else 0.5
    assert set(losses) == {"4", "8"}
    assert all(0 < loss < start for loss in losses.values())
    # And nobody has noticed.
    assert runs.files(task) == runs.files(alone[name])
