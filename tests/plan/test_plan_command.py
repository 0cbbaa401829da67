"""`aifactory plan`: what it reads, what it says, and what it refuses. It asks no network and opens no books."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from small_factories import small_config

from aifactory.cli import main
from aifactory.errors import ConfigError
from aifactory.plan.arguments import add_arguments
from aifactory.plan.command import run
from aifactory.plan.plan import Plan
from aifactory.plan.tradeoff import hours_words

LLAMA = ("--model", "llama-3.1-8b", "--tokens", "1e10")
SERVED = ("--model", "llama-3.1-8b", "--users", "1000")


@pytest.fixture(autouse=True)
def _without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan asks no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def planned(*words: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plan = run(parser.parse_args(words))
    assert isinstance(plan, Plan)
    return plan


def told(*words: str) -> Any:
    return json.loads(json.dumps(planned(*words).to_json()))


def written(folder: Path, **sections: Any) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(small_config(folder, **sections)), encoding="utf-8")
    return str(file)


# ── configurations ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_configuration_is_planned_as_it_stands(tmp_path: Path) -> None:
    file = written(tmp_path, runtime={"workers": 2, "micro_batch_rows": 4})
    (plan,) = planned(file).training

    assert (plan.accelerator, plan.count) == ("cpu", 2)
    assert plan.fits
    assert plan.changes == ()
    assert plan.step.micro_batch_rows == 4
    assert planned(file).tokens == 60 * 8 * 128
    assert not (tmp_path / "storage").exists()


def test_a_configuration_with_gpus_is_planned_on_all_of_them(tmp_path: Path) -> None:
    plan = planned(written(tmp_path, runtime={"gpus_per_worker": 1}))

    assert [each.accelerator for each in plan.training] == ["h100", "h200", "a100", "b200", "l40s", "mi300x"]


def test_sources_of_this_machine_are_weighed(tmp_path: Path) -> None:
    file = written(tmp_path)
    size = sum(each.stat().st_size for each in (tmp_path / "corpus").rglob("*") if each.is_file())

    found = planned(file).ingestion
    assert found is not None
    assert found.num_bytes == size
    assert found.cpus == pytest.approx(2 * 0.8)


def test_sources_elsewhere_are_not_asked(tmp_path: Path) -> None:
    sources = [{"name": "far", "kind": "jsonl", "path": "s3://bucket/rows"}]
    file = written(tmp_path, ingest={"sources": sources})

    assert planned(file).ingestion is None
    found = planned(file, "--bytes", "3e9", "--cpus", "4").ingestion
    assert found is not None
    assert (found.num_bytes, found.cpus) == (3e9, 4)


def test_adapters_and_preferences_are_planned_and_what_is_not_is_told(tmp_path: Path) -> None:
    whole = planned(written(tmp_path), "--model", "llama-3.2-1b", "--accelerator", "h100", "--count", "1")
    changes = {"objective": "dpo", "lora": {"rank": 8}}
    thin = planned(
        written(tmp_path, train=changes, model={"base": "llama-3.2-1b"}), "--accelerator", "h100", "--count", "1"
    )

    assert thin.training[0].memory.states < whole.training[0].memory.states / 2.5
    assert any("reference model" in each for each in thin.left_out)
    assert not whole.left_out


def test_what_the_factorys_own_trainer_can_not_do_is_told() -> None:
    own, other = planned(*LLAMA, "--accelerator", "h100"), planned(*LLAMA, "--accelerator", "h100", "--tensor", "8")

    assert not own.left_out
    assert any("another trainer" in each for each in other.left_out)


def test_blocks_that_are_not_compiled_are_hinted_at_with_what_it_would_bring() -> None:
    start = (*LLAMA, "--accelerator", "h100", "--count", "8")
    eager = planned(*start, "--set", "runtime.execution.compile=false")

    (hint,) = eager.hints
    assert "runtime.execution.compile=true" in hint
    assert hours_words(planned(*start).training[0].hours) in hint
    assert not planned(*start).hints


def test_a_cpu_draws_what_the_configuration_says(tmp_path: Path) -> None:
    ten, five = (planned(written(tmp_path, runtime={"watts_per_cpu": watts})).training[0] for watts in (10, 5))

    assert ten.footprint.kwh == pytest.approx(2 * five.footprint.kwh)


# ── every flag acts ───────────────────────────────────────────────────────────────────────────────────────────────────

TRAINED = (*LLAMA, "--accelerator", "h100")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--count", "64"), lambda plan: plan.training[0].count),
        (("--days", "1"), lambda plan: plan.training[0].count),
        (("--tensor", "2"), lambda plan: plan.training[0].layout.tensor),
        (("--pipeline", "2"), lambda plan: plan.training[0].layout.pipeline),
        (("--parallel", "fsdp"), lambda plan: plan.training[0].changes),
        (("--activations", "full"), lambda plan: plan.training[0].step.activations),
        (("--row-len", "8192"), lambda plan: plan.row_len),
        (("--batch-rows", "256"), lambda plan: plan.batch_rows),
        (("--micro-batch-rows", "1"), lambda plan: plan.training[0].changes),
        (("--set", "runtime.execution.compile=false"), lambda plan: plan.training[0].hours),
        (("--set", "runtime.execution.loss=plain"), lambda plan: plan.training[0].memory.loss),
        (("--set", "runtime.execution.attention=mask"), lambda plan: plan.training[0].time.attention_s),
        (("--set", "runtime.execution.gradients=bf16"), lambda plan: plan.training[0].memory.casts),
        (("--set", "runtime.checkpoint_every_steps=10000"), lambda plan: plan.training[0].hours),
        (("--set", "runtime.site.pue=1.1"), lambda plan: plan.training[0].footprint.kwh),
        (("--set", "runtime.site.carbon_kg_per_kwh=0.1"), lambda plan: plan.training[0].footprint.tonnes_co2),
        (("--set", "runtime.site.water_litres_per_kwh=0"), lambda plan: plan.training[0].footprint.litres),
        (("--set", "runtime.site.prices={h100: 2}"), lambda plan: plan.training[0].footprint.money),
        (("--set", "runtime.site.price_per_kwh=0.1"), lambda plan: plan.training[0].footprint.money),
        (("--set", "runtime.site.currency=EUR"), lambda plan: plan.site.currency),
    ],
)
def test_every_flag_and_option_of_training_changes_the_plan(flags: tuple[str, ...], what: Any) -> None:
    assert what(planned(*TRAINED, *flags)) != what(planned(*TRAINED))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--users", "90000"), lambda plan: plan.serving[0].replicas),
        (("--per-hour", "600"), lambda plan: plan.serving[0].replicas),
        (("--prompt-tokens", "4000"), lambda plan: plan.serving[0].load.first_token_s),
        (("--answer-tokens", "1000"), lambda plan: plan.serving[0].load.requests_per_s),
        (("--first-token-ms", "35"), lambda plan: plan.serving[0].load.requests),
        (("--token-ms", "10"), lambda plan: plan.serving[0].load.requests),
        (("--slots", "8"), lambda plan: plan.serving[0].load.requests),
        (("--tensor", "2"), lambda plan: plan.serving[0].tensor),
        (("--set", "runtime.endpoint.engine=vllm"), lambda plan: plan.serving[0].load.first_token_s),
        (("--set", "runtime.endpoint.weights=float32"), lambda plan: plan.serving[0].weight_bytes),
        (("--set", "runtime.site.prices={h100: 2}"), lambda plan: plan.serving[0].day.money),
    ],
)
def test_every_flag_and_option_of_serving_changes_the_plan(flags: tuple[str, ...], what: Any) -> None:
    start = (*SERVED, "--accelerator", "h100")
    assert what(planned(*start, *flags)) != what(planned(*start))


# ── what it says ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_names_all_that_was_asked_and_says_that_it_is_an_estimate() -> None:
    text = "\n".join(planned(*TRAINED, "--users", "1000", "--bytes", "5e9", "--count", "16").lines())

    for word in (
        "An estimate",
        "16 h100",
        "FSDP 16",
        "MFU",
        "kWh",
        "litres",
        "t CO2",
        "Serving",
        "Ingestion",
        "PUE 1.56",
    ):
        assert word in text, word
    assert "runtime.parallel=fsdp" in text
    assert "USD" not in text
    assert "USD" in "\n".join(planned(*TRAINED, "--set", "runtime.site.prices={h100: 2}").lines())


def test_json_has_the_plan_the_trade_off_and_how_far_to_believe_it() -> None:
    found = told(*TRAINED, "--users", "10", "--bytes", "1e9")

    assert found["is_estimate"]
    assert found["holds"]
    assert found["training"][0]["accelerator"] == "h100"
    assert {point["count"] for point in found["tradeoff"]} > {16, 64}
    assert found["serving"][0]["fits"]
    assert found["ingestion"]["num_bytes"] == 1e9
    assert found["largest_errors"]["published, training"] > 0
    assert found["accelerators"][0]["source"]


def test_exit_status_tells_whether_it_is_to_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    start = ["plan", *TRAINED]

    assert main([*start, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]
    assert main([*start, "--count", "1"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*start, "--days", "0.0001"]) == 1
    assert "later than asked" in capsys.readouterr().out
    assert main(["plan", *SERVED, "--accelerator", "h100", "--token-ms", "0.1"]) == 1
    assert "does not do" in capsys.readouterr().out


def test_accelerators_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    text = capsys.readouterr().out

    for name in ("h100", "h200", "a100", "b200", "l40s", "mi300x", "cpu"):
        assert f"\n{name} " in text
    assert text.count("data sheet") >= 6


def test_the_picture_has_a_point_for_each_plan_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        plan = planned(*LLAMA, "--svg", str(picture), "--set", "runtime.site.prices={h100: 2, a100: 1}")
    root = ElementTree.fromstring(pictures[0].read_text(encoding="utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text or "" for title in root.iter(f"{space}title")]

    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert len(titles) == len(plan.tradeoff)
    # Not all have a price, so it is energy that is compared.
    assert all("kWh" in title for title in titles)
    assert len(list(root.iter(f"{space}polyline"))) == len(plan.accelerators)
    for text in root.iter(f"{space}text"):
        assert 0 <= float(text.get("x", 0)) <= 720
        assert 0 <= float(text.get("y", 0)) <= 460


def test_the_picture_compares_money_where_all_have_a_price(tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    prices = "runtime.site.prices={h100: 2, a100: 1}"
    planned(*LLAMA, "--accelerator", "h100", "--accelerator", "a100", "--svg", str(picture), "--set", prices)

    assert "USD" in picture.read_text(encoding="utf-8")
    assert "kWh" not in picture.read_text(encoding="utf-8")


# ── what it refuses ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "something to plan"),
        (("--tokens", "1e9"), "expected a model"),
        (("--users", "5"), "expected a model"),
        ((*LLAMA, "--accelerator", "h1000"), "h100, h200"),
        (("--model", "no-such-model", "--tokens", "1e9"), "fetches nothing"),
        (("--model", "mistralai/Mistral-7B-v0.1", "--tokens", "1e9"), "fetches nothing"),
        ((*TRAINED, "--count", "6", "--tensor", "4"), "multiple of tensor x pipeline"),
        ((*TRAINED, "--count", "2048"), "at most 1024 accelerators"),
        ((*TRAINED, "--set", "train.precision=fp32"), "found fp32"),
        ((*TRAINED, "--set", "runtime.site.prices={h1000: 2}"), "runtime.site.prices"),
        ((*TRAINED, "--set", "runtime.site.pue=0.9"), "runtime.site.pue"),
        ((*TRAINED, "--set", "runtime.site.prices={h100: -1}"), "runtime.site.prices.h100"),
        ((*TRAINED, "--set", "runtime.shard_workers=2"), "shard_workers"),
        ((*TRAINED, "--count", "1", "--svg", "/nonexistent/a.svg"), "write the picture"),
        (
            ("--model", "llama-3.1-405b", "--tokens", "1e9", "--batch-rows", "1", "--svg", "a.svg"),
            "plan that fits for --svg",
        ),
        (("--set", "model.architecture.hidden_size=768", "--tokens", "1e9"), "context_length"),
        (("--set", "model.architecture.hidden_size=768", "--users", "9", "--prompt-tokens", "5000"), "context_length"),
        (("no-such.yaml",), "expected a configuration file"),
    ],
)
def test_what_can_not_be_planned_says_what_was_expected(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        planned(*words)


def test_a_base_in_the_registry_has_no_shape_without_the_books(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        planned(written(tmp_path, model={"base": "registry:production"}))


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenize\.tokenizer"):
        planned(written(tmp_path, tokenize={"tokenizer": str(tmp_path / "none")}))


@pytest.mark.parametrize("value", ["0", "-3", "x", "nan", "inf", "1.5"])
def test_a_count_that_is_none_ends_with_status_2(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *LLAMA, f"--count={value}"])

    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err
    assert main(["plan", "no-such.yaml"]) == 2
