"""python -m pytest tests/test_config.py"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest

from aifactory.config import Config, PromoteGate, Section, Step, expand_environment, plain_overrides, schema_json
from aifactory.errors import ConfigError
from aifactory.records.identity import canonical_json, fingerprint

SMALL = """\
name: demo
ingest:
  sources:
    - name: docs
      kind: text
      path: /data/docs
"""
FULL = (
    SMALL
    + """\
      include: ["*.md"]
    - name: chats
      kind: jsonl
      path: /data/chats
      columns:
        prompt: question
  steps:
    - step: length
      min_bytes: 3
    - step: alphabetic
    - step: line_length
train:
  max_steps: 10
traffic:
  source: {name: users, kind: text, path: /data/users}
runtime:
  workers: 2
"""
)
RECIPE = [name for name in Config.model_fields if name != "runtime"]


def read(text: str, *overrides: str) -> Config:
    return Config.from_text(text, origin="a.yaml", overrides=overrides)


def errors_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(text, *overrides)
    return str(error.value).splitlines()


# ── what is wrong is named, with its place ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian:\n  max_steps: 3\n", "a.yaml:7: unknown key 'trian'; did you mean 'train'?"),
        ("train:\n  max_step: 3\n", "a.yaml:8: unknown key 'train.max_step'; did you mean 'max_steps'?"),
        ("      pathh: /x\n", "a.yaml:7: unknown key 'ingest.sources.0.pathh'; did you mean 'path'?"),
        (
            "    - {name: b, kind: jsonl, path: /b, columns: {promt: q}}\n",
            "a.yaml:7: unknown key 'ingest.sources.1.columns.promt'; did you mean 'prompt'?",
        ),
        (
            "  steps:\n    - step: alphabetic\n    - step: length\n      min_byts: 3\n",
            "a.yaml:10: unknown key 'ingest.steps.1.min_byts'; did you mean 'min_bytes'?",
        ),
        (
            "  steps:\n    - step: alphabetic\n      xyz: 3\n",
            "a.yaml:9: unknown key 'ingest.steps.0.xyz'; valid keys: min_share, step",
        ),
        ("runtime:\n  endpoint:\n    prot: 1\n", "a.yaml:9: unknown key 'runtime.endpoint.prot'; did you mean 'port'?"),
        (
            "traffic:\n  source: {kind: text, nam: x}\n",
            "a.yaml:8: unknown key 'traffic.source.nam'; did you mean 'name'?",
        ),
        (
            "improve:\n  retrain: {steps: 1}\n",
            "a.yaml:8: unknown key 'improve.retrain.steps'; did you mean 'max_steps'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one_with_file_and_line(text: str, expected: str) -> None:
    assert expected in errors_of(SMALL + text)


@pytest.mark.parametrize(
    ("text", "place", "expected", "found"),
    [
        ("train:\n  max_steps: many\n", "a.yaml:8: 'train.max_steps'", "a valid integer", "'many'"),
        ("train:\n  max_steps: 0\n", "a.yaml:8: 'train.max_steps'", "a number greater than or equal to 1", "0"),
        ("train:\n  learning_rate: .nan\n", "a.yaml:8: 'train.learning_rate'", "a finite number", "nan"),
        ("train:\n  learning_rate: .inf\n", "a.yaml:8: 'train.learning_rate'", "a finite number", "inf"),
        ("train: 3\n", "a.yaml:7: 'train'", "a section of keys and values", "3"),
        ("      include: '*.md'\n", "a.yaml:7: 'ingest.sources.0.include'", "a list", "'*.md'"),
        ("serve: {chat_template: jinja}\n", "a.yaml:7: 'serve.chat_template'", "'plain'", "'jinja'"),
        (
            "  steps:\n    - step: length\n    - step: alphabetic\n      min_share: x\n",
            "a.yaml:10: 'ingest.steps.1.min_share'",
            "a valid number",
            "'x'",
        ),
        ("  steps:\n    - 3\n", "a.yaml:8: 'ingest.steps.0'", "a section of keys and values", "3"),
        ("3: 4\n", "a.yaml:7: '3'", "strings", "3"),
    ],
)
def test_a_wrong_value_says_where_what_was_expected_what_was_found_and_what_to_do(
    text: str, place: str, expected: str, found: str
) -> None:
    line = next(line for line in errors_of(SMALL + text) if line.startswith(place))

    assert "expected " in line
    assert expected in line
    assert f", found {found}; change it" in line


def test_a_wrong_value_comes_with_what_the_schema_says_of_its_key() -> None:
    assert errors_of(SMALL + "train: {max_steps: x}\n")[0].endswith("change it (Optimiser steps. Default: 1000)")


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(errors_of(SMALL + f"train: {list(range(10_000))}\n")[0]) < 300


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("name: demo\n", "a.yaml:1: expected the key 'ingest', found none; add it"),
        (SMALL.replace("name: demo\n", ""), "a.yaml:1: expected the key 'name', found none; add it (The factory"),
        (SMALL.replace("kind: text", "include: []"), "a.yaml:4: expected the key 'ingest.sources.0.kind', found none"),
        (SMALL + "  steps:\n    - min_bytes: 3\n", "a.yaml:8: expected the key 'ingest.steps.0.step', found none"),
        (SMALL + "traffic: {requests: 3}\n", "a.yaml:7: expected the key 'traffic.source', found none; add it"),
    ],
)
def test_a_missing_key_is_named_with_its_section_and_meaning(text: str, start: str) -> None:
    assert any(line.startswith(start) for line in errors_of(text))


def test_a_step_that_is_not_known_names_the_nearest() -> None:
    lines = errors_of(SMALL + "  steps:\n    - step: lenght\n    - step: zzz\n    - step: 77\n")

    steps = [tag for step in get_args(get_args(Step)[0]) for tag in get_args(step.model_fields["step"].annotation)]
    known = f"expected {' or '.join(map(repr, steps))}"
    assert {"length", "unicode", "near_duplicates"} <= set(steps)
    assert lines == [
        f"a.yaml:8: 'ingest.steps.0.step': {known}, found 'lenght'; did you mean 'length'?",
        f"a.yaml:9: 'ingest.steps.1.step': {known}, found 'zzz'",
        f"a.yaml:10: 'ingest.steps.2.step': {known}, found '77'",
    ]


def test_a_kind_that_is_not_known_names_the_nearest() -> None:
    (line,) = errors_of(SMALL + "traffic:\n  source: {kind: jsno}\n")

    assert line.startswith("a.yaml:8: 'traffic.source.kind': expected 'code' or 'text' or ")
    assert line.endswith(", found 'jsno'; did you mean 'jsonl'?")


def test_every_problem_is_named_at_once() -> None:
    assert len(errors_of(SMALL + "trian: 1\ntrain: {max_steps: x, seed: -1}\nserve: []\n")) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model:\n  architecture: {num_heads: 5}\n",
            "a.yaml:8: 'model.architecture': expected num_heads to divide hidden_size, found 5 and 384",
        ),
        (
            "model: {architecture: {num_kv_heads: 4}}\n",
            "a.yaml:7: 'model.architecture': expected num_kv_heads to divide num_heads, found 4, 6",
        ),
        (
            "    - {name: docs, kind: text, path: /x}\n",
            "a.yaml:2: 'ingest': expected unique source names, found ['docs'] more than once; rename one of each",
        ),
    ],
)
def test_values_that_contradict_one_another_are_refused(text: str, expected: str) -> None:
    assert errors_of(SMALL + text) == [expected]


def test_a_key_that_stands_twice_is_refused() -> None:
    assert errors_of(SMALL + "train: {max_steps: 3}\ntrain:\n  seed: 2\n  seed: 3\n") == [
        "expected every key once in its section, found again: a.yaml:8: 'train', a.yaml:10: 'seed'; delete one."
    ]


def test_an_anchor_may_be_used_again() -> None:
    text = SMALL.replace("- name", "- &a\n      name") + "    - {<<: *a, name: other}\n"

    assert [source.name for source in read(text).ingest.sources] == ["docs", "other"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "a.yaml:1: expected a mapping with the key 'name', found nothing"),
        ("- name\n", "a.yaml:1: expected a mapping with the key 'name', found a list"),
        ("just text", "a.yaml:1: expected a mapping with the key 'name', found a str"),
        ("name: [1,\n", "a.yaml: expected YAML, found:"),
        ("name: demo\n\tingest: 3\n", "a.yaml: expected YAML, found:"),
        ("name: !!python/object/apply:os.system ['true']\n", "a.yaml: expected YAML, found:"),
        ("a: &a [*a]\n", "a.yaml:1: "),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, start: str) -> None:
    assert errors_of(text)[0].startswith(start)


def test_a_yaml_error_names_the_line() -> None:
    assert "line 8, column 7" in "\n".join(errors_of(SMALL + "train:\n  a: b: c\n"))


def test_a_file_that_is_not_there_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "laptop.yaml").write_text(SMALL)

    with pytest.raises(ConfigError, match=f"found none at {tmp_path}/lapto.yaml. Did you mean {tmp_path}/laptop.yaml"):
        Config.from_yaml(tmp_path / "lapto.yaml")
    with pytest.raises(ConfigError, match=f"found none at {tmp_path}/none/a.yaml.$"):
        Config.from_yaml(tmp_path / "none" / "a.yaml")


def test_a_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))

    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=f"expected a configuration file in UTF-8 at {path}, found: "):
            Config.from_yaml(path)


def test_a_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SMALL + "trian: 1\n")

    with pytest.raises(ConfigError, match=f"^{tmp_path}/a.yaml:7: unknown key"):
        Config.from_yaml(tmp_path / "a.yaml")


# ── overrides ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides_change_what_the_file_says() -> None:
    config = read(
        FULL,
        "train.max_steps=20",
        "ingest.sources.1.name=talks",
        "ingest.steps=[]",
        "runtime.endpoint.port=0",
        "model.architecture.num_kv_heads=2",
        "train.learning_rate=1e-4",
        "runtime.storage=s3://b/x",
        "traffic=null",
        "train.max_steps=30",
    )

    assert (config.train.max_steps, config.train.learning_rate) == (30, 1e-4)
    assert [source.name for source in config.ingest.sources] == ["docs", "talks"]
    assert (config.ingest.steps, config.traffic) == ((), None)
    assert (config.runtime.endpoint.port, config.runtime.workers) == (0, 2)
    assert config.runtime.storage == "s3://b/x"
    assert config.model.architecture.num_kv_heads == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "--set train.max_steps: expected KEY=VALUE such as train.max_steps=10"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("train.max_steps=[", "--set train.max_steps=[: expected a YAML value, found:"),
        ("train.max_step=3", "--set train.max_step=3: unknown key 'train.max_step'; did you mean 'max_steps'?"),
        ("train.max_steps=x", "--set train.max_steps=x: 'train.max_steps': expected a valid integer"),
        ("train=3", "--set train=3: 'train': expected a section of keys and values, found 3"),
        ("name.x=3", "--set name.x=3: expected a section at 'name', found 'demo'; name a key above it."),
        ("ingest.sources.0.name.x=1", "--set ingest.sources.0.name.x=1: expected a section at 'ingest.sources.0.name'"),
        ("ingest.sources.2.name=x", "--set ingest.sources.2.name=x: expected a number below 2 after 'ingest.sources.'"),
        ("ingest.sources.-1.name=x", "expected a number below 2 after 'ingest.sources.', found '-1'."),
        ("ingest.sources.²=x", "expected a number below 2 after 'ingest.sources.', found '²'."),
        ("ingest.sources.docs.name=x", "expected a number below 2 after 'ingest.sources.', found 'docs'."),
        ("ingest.steps.1.step=lenght", "--set ingest.steps.1.step=lenght: 'ingest.steps.1.step': expected"),
        ("ingest.steps.0.min_byts=3", "--set ingest.steps.0.min_byts=3: unknown key 'ingest.steps.0.min_byts'"),
        ("ingest.sources.1.columns.promt=x", "unknown key 'ingest.sources.1.columns.promt'; did you mean 'prompt'?"),
        ("model.architecture.num_heads=5", "--set model.architecture.num_heads=5: 'model.architecture': expected"),
        ("runtime..port=3", "--set runtime..port=3: unknown key 'runtime.'"),
        (".=3", "--set .=3: unknown key ''"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    assert message in errors_of(FULL, override)[0]


def test_an_override_below_a_list_item_that_is_no_section_is_refused() -> None:
    text = SMALL + "  steps: [length]\n"

    assert errors_of(text, "ingest.steps.0.min_bytes=1")[0].startswith(
        "--set ingest.steps.0.min_bytes=1: expected a section at 'ingest.steps.0', found 'length'"
    )


def test_of_two_overrides_of_a_key_the_last_holds_and_is_blamed() -> None:
    assert errors_of(FULL, "train.seed=1", "train.seed=x")[0].startswith("--set train.seed=x:")
    assert read(FULL, "train.seed=x", "train.seed=1").train.seed == 1


def test_an_error_of_the_file_is_not_blamed_on_an_override() -> None:
    text = SMALL + "train: {max_step: 3}\n"

    assert errors_of(text, "train.seed=2")[0].startswith("a.yaml:7: unknown key 'train.max_step'")


def test_overrides_from_a_mapping_say_the_same() -> None:
    values = {
        "train.max_steps": 20,
        "name": "other",
        "ingest.sources.0.path": "/daten/ü😀 #x: y",
        "traffic": None,
        "ingest.sources.0.include": ["a", "b"],
        "train.learning_rate": 1e-5,
    }

    config = read(FULL, *plain_overrides(values))

    assert (config.train.max_steps, config.name, config.traffic) == (20, "other", None)
    assert config.ingest.sources[0].path == "/daten/ü😀 #x: y"
    assert config.ingest.sources[0].include == ("a", "b")
    assert config.train.learning_rate == 1e-5


# ── environment ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables that are set while a test runs."""
    os.environ.update({"AIFACTORY_TEST_A": "secret", "AIFACTORY_TEST_B": "b"})
    os.environ.pop("AIFACTORY_TEST_UNSET", None)
    yield dict(os.environ)
    del os.environ["AIFACTORY_TEST_A"], os.environ["AIFACTORY_TEST_B"]


def test_the_environment_is_expanded_in_places_of_the_runtime(environment: dict[str, str]) -> None:
    config = read(
        SMALL + "runtime:\n  storage: /data/${AIFACTORY_TEST_B}/${AIFACTORY_TEST_UNSET:-x}\n",
        "runtime.state_url=postgresql+psycopg://u:${AIFACTORY_TEST_A}@h/d",
    )

    assert config.runtime.storage == "/data/b/x"
    assert config.runtime.state_url == "postgresql+psycopg://u:secret@h/d"


@pytest.mark.parametrize("key", ["storage", "state_url"])
def test_a_variable_that_is_not_set_is_named(environment: dict[str, str], key: str) -> None:
    text = SMALL + f"runtime:\n  {key}: ${{AIFACTORY_TEST_A}}/${{AIFACTORY_TEST_UNSET}}\n"

    lines = errors_of(text)

    assert lines == [
        f"a.yaml:8: 'runtime.{key}': expected the environment variable AIFACTORY_TEST_UNSET, found it unset; set it or "
        "write a default"
    ]
    assert "secret" not in lines[0]


def test_what_is_no_variable_stays(environment: dict[str, str]) -> None:
    assert expand_environment("$A {A} ${} ${1} ${AIFACTORY_TEST_UNSET:-}|") == "$A {A} ${} ${1} |"


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def identities(config: Config) -> dict[str, str]:
    return {
        section: fingerprint(stage=section, code_version=1, recipe=config.recipe(section), inputs=[])
        for section in RECIPE
    }


def leaves(value: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where every field lies that is not a section or a list of sections."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            yield from leaves(getattr(value, name), (*where, name))
    elif isinstance(value, tuple) and value and isinstance(value[0], Section):
        for at, item in enumerate(value):
            yield from leaves(item, (*where, at))
    else:
        yield where


def changed(value: Any, where: tuple[str | int, ...]) -> Any:
    """A copy of `value` that differs at one place."""
    if not where:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        if isinstance(value, tuple):
            return (*value, "another")
        if isinstance(value, dict):
            return value | {"another": "another"}
        return "another" if value is None else value + "-changed"
    first, rest = where[0], where[1:]
    if isinstance(first, int):
        return tuple(changed(item, rest) if at == first else item for at, item in enumerate(value))
    return value.model_copy(update={first: changed(getattr(value, first), rest)})


LEAVES = list(leaves(read(FULL)))


def test_the_walk_reaches_every_field() -> None:
    names = {".".join(str(part) for part in where if isinstance(part, str)) for where in LEAVES}

    assert {"name", "ingest.sources.columns.prompt", "ingest.steps.max_mean_chars"} <= names
    assert {"model.architecture.dropout", "traffic.source.path", "serve.chat_template"} <= names
    assert {"improve.retrain.max_steps", "runtime.endpoint.port"} <= names
    assert len(LEAVES) > 90


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("where", LEAVES, ids=lambda where: ".".join(map(str, where)))
def test_every_recipe_field_and_only_a_recipe_field_changes_the_fingerprint_of_its_section(
    where: tuple[str | int, ...],
) -> None:
    config = read(FULL)
    before, after = identities(config), identities(changed(config, where))

    differing = [section for section in RECIPE if before[section] != after[section]]

    bears_none = where[0] == "runtime" or where[-1] in ("path", "allow_private", "storage_options", "license")
    assert differing == ([] if bears_none else [where[0]])


def test_a_default_that_is_written_out_has_the_same_identity() -> None:
    written = read(SMALL + "train: {max_steps: 1000, learning_rate: 0.003}\nmodel: {base: null}\n")

    assert identities(written) == identities(read(SMALL))
    assert identities(read(SMALL + "train: {grad_clip: 1}\n")) == identities(read(SMALL + "train: {grad_clip: 1.0}\n"))


def test_the_recipe_is_plain_json_and_leaves_the_configuration_alone() -> None:
    config = read(FULL)

    recipe = config.recipe(*RECIPE)

    assert json.loads(canonical_json(recipe)) == recipe
    assert config.ingest.sources[0].path == "/data/docs"
    assert read(SMALL).recipe("traffic") == {"traffic": None}


# ── the schema ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sections(model: type[pydantic.BaseModel] = Section) -> Iterator[type[pydantic.BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from sections(child)


FIELDS = [(section, name) for section in sections() for name in section.model_fields]


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_every_field_says_what_it_is_and_what_holds_where_it_is_absent(
    section: type[pydantic.BaseModel], name: str
) -> None:
    field = section.model_fields[name]

    text = field.description or ""

    assert section.__doc__
    assert len(text) > 10
    if isinstance(field.default, Section):
        return  # a section's defaults are said at its fields
    is_section = field.is_required() and isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    assert is_section or section.__name__ == "Traffic" or ("No default" if field.is_required() else "Default") in text


def test_a_configuration_is_frozen_and_pickled_whole() -> None:
    config = read(FULL)

    with pytest.raises(pydantic.ValidationError):
        config.train.max_steps = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError):
        config.name = "other"  # type: ignore[misc]

    assert pickle.loads(pickle.dumps(config)) == config


def test_the_schema_names_every_section_and_holds_for_a_configuration() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_json())

    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(read(FULL).model_dump_json()), schema)

    assert set(schema["properties"]) == set(Config.model_fields)
    # Sections that others are made from are in no configuration.
    made = {section.__name__ for section in sections() if not section.__subclasses__()}
    assert made - {"Config"} == set(schema["$defs"])
    assert schema["additionalProperties"] is False
    for field in schema["properties"].values():
        assert "description" in field or schema["$defs"][field["$ref"].rpartition("/")[2]]["description"]


ACROSS = (
    "train.reproducible=across_workers",
    "train.micro_batch_rows=2",
    "train.threads=1",
    "train.global_batch_rows=8",
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.reproducible=across_workers",), "expected micro_batch_rows and threads beside"),
        (("train.threads=2",), "train.threads with reproducible: across_workers alone"),
        ((*ACROSS, "train.global_batch_rows=12"), "1, 2, 4, 8... times micro_batch_rows"),
        ((*ACROSS, "runtime.micro_batch_rows=4"), "no runtime.micro_batch_rows beside"),
        ((*ACROSS, "runtime.parallel=fsdp"), "no runtime.parallel beside"),
        ((*ACROSS, "runtime.execution.activations=full"), "no runtime.execution beside"),
        (("runtime.shard_workers=2",), "shard_workers with parallel: fsdp alone"),
        (("runtime.workers=[3,2]",), "expected workers: [least, most], found [3, 2]; turn them round"),
        (("runtime.endpoint.replicas=[3,2]",), "expected replicas: [least, most], found [3, 2]; turn them round"),
        (("runtime.endpoint.replicas=[0,2]",), "'runtime.endpoint.replicas"),
        (("runtime.endpoint.target_requests=3",), "expected target_requests beside replicas: [least, most] alone"),
        (("runtime.endpoint.scale_up_after_s=3",), "expected scale_up_after_s beside replicas: [least, most] alone"),
        (("runtime.workers=[0,2]",), "'runtime.workers"),
        (("runtime.workers=[1,3]", "runtime.parallel=fsdp", "train.global_batch_rows=4"), "found that 3 can't"),
        (("runtime.workers=[1,5]", "train.global_batch_rows=4"), "found that 5 can't"),
        ((*ACROSS, "runtime.workers=[1,4]"), "found that 3 can't"),
        (
            ("train.early_stopping.patience=2", "runtime.validate_every_steps=5"),
            "no runtime.validate_every_steps beside train.early_stopping, whose every_steps says it, found 5",
        ),
    ],
)
def test_across_workers_asks_for_all_that_decides_the_bits_and_leaves_the_runtime_none(
    overrides: tuple[str, ...], said: str
) -> None:
    assert read(SMALL, *ACROSS, "runtime.workers=[1,2]").train.is_across_workers
    assert any(said in line for line in errors_of(SMALL, *overrides))


def test_a_configuration_across_workers_can_be_handed_on_to_a_job() -> None:
    config = read(SMALL, *ACROSS)

    assert Config.model_validate_json(config.model_dump_json()) == config


# ── candidates ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_candidate_is_the_section_with_its_differences() -> None:
    train = {"learning_rate": 0.01, "guards": {"max_skipped": 1}}
    candidates = [{}, {"learning_rate": 0.02}, {"guards": {"spike_deviations": 6}, "seed": 3}]
    plain = read(SMALL + f"train: {json.dumps(train)}\n").train
    found = read(SMALL + f"train: {json.dumps({**train, 'candidates': candidates})}\n").train.recipes()

    assert found[0] == plain == plain.recipes()[0]
    assert [recipe.learning_rate for recipe in found] == [0.01, 0.02, 0.01]
    assert (found[2].guards.max_skipped, found[2].guards.spike_deviations, found[2].seed) == (1, 6, 3)


def test_without_candidates_a_recipe_has_the_identity_that_it_had_before_there_were_any() -> None:
    alone = read(SMALL)
    several = read(SMALL, "train.candidates=[{}, {seed: 2}]")

    assert "candidates" not in alone.recipe("train")["train"]
    assert several.recipe("train")["train"]["candidates"] == [{}, {"seed": 2}]
    assert several.train.recipes()[0].model_dump(mode="json") == alone.train.model_dump(mode="json")
    assert Config.model_validate(several.model_dump(mode="json")) == several


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ("[{learning_rat: 1}]", "learning_rat"),
        ("[{learning_rate: -1}]", "learning_rate"),
        ("[{}, {seed: 1}]", r"train.candidates[1] to be train.candidates[0] again"),
        ("[{candidates: []}]", "no candidates within train.candidates[0]"),
        ("[{mixture: {other: {}}}]", "train.mixture to name the sources ['docs']"),
        ("[{threads: 2}]", "threads"),
    ],
)
def test_a_candidate_that_is_no_recipe_is_refused(candidates: str, said: str) -> None:
    assert said in "\n".join(errors_of(SMALL, f"train.candidates={candidates}"))


def test_a_mixture_of_a_candidate_is_taken_as_a_whole() -> None:
    text = SMALL + "    - {name: more, kind: text, path: /data/more}\n"
    mixed = "train.mixture={docs: {weight: 1, max_epochs: 2}, more: {}}"
    found = read(text, mixed, "train.candidates=[{mixture: {docs: {weight: 3}, more: {}}}]").train.recipes()

    assert found[0].mixture["docs"].max_epochs is None


def test_the_licence_of_a_source_bears_no_identity() -> None:
    named = read(SMALL + "      license: cc-by-4.0\n")

    assert named.ingest.sources[0].license == "cc-by-4.0"
    assert named.recipe("ingest") == read(SMALL).recipe("ingest")


BASED = ("model.base=/models/base",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.objective=dpo",), "expected model.base beside train.objective: dpo"),
        (("train.objective=kto",), "expected model.base beside train.objective: kto"),
        (("train.lora.rank=8",), "expected model.base beside train.lora"),
        ((*BASED, "train.preference.beta=0.2"), "no preference.beta beside objective: likelihood"),
        (
            (*BASED, "train.objective=kto", "train.preference.label_smoothing=0.1"),
            "no preference.label_smoothing beside objective: kto",
        ),
        (
            (*BASED, "train.objective=dpo", "train.preference.desirable_weight=2"),
            "no preference.desirable_weight beside objective: dpo",
        ),
        ((*BASED, "train.objective=dpo", "train.preference.label_smoothing=0.5"), "less than 0.5"),
        ((*BASED, "train.lora.target_modules=[]"), "expected names of modules, or all-linear"),
        (("train.candidates=[{lora: {rank: 2}}, {}]",), "expected model.base beside train.lora"),
    ],
)
def test_what_an_objective_does_not_read_or_can_not_do_without_is_named(overrides: tuple[str, ...], said: str) -> None:
    assert any(said in line for line in errors_of(SMALL, *overrides))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_configuration_of_preferences_can_be_handed_on_to_a_job(objective: str) -> None:
    config = read(SMALL, *BASED, f"train.objective={objective}", "train.preference.beta=0.3", "train.lora.rank=4")

    assert Config.model_validate_json(config.model_dump_json()) == config
    assert config.train.lora is not None
    assert config.train.lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.decay_share=0.5", "decay_share with schedule: wsd alone"),
        ("train.guards={spike_window: 20}", "spike_window beside guards.spike_deviations alone"),
        ("train.candidates=[{}, {objective: dpo}]", "expected one objective for all candidates"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(override: str, said: str) -> None:
    assert said in "\n".join(errors_of(SMALL, *BASED, override))


def test_preferences_have_no_loss_in_pieces() -> None:
    said = errors_of(SMALL, *BASED, "train.objective=dpo", "runtime.execution.loss=pieces")

    assert "no runtime.execution.loss: pieces beside train.objective: dpo" in "\n".join(said)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("improve.trial={shares: [0.5, 0.1]}", "expected shares that rise, found [0.5, 0.1]"),
        ("improve.trial={shares: [0.1, 0.1]}", "expected shares that rise"),
        ("improve.trial={shares: [], shadow_share: 0}", "found neither; leave it out"),
    ],
)
def test_a_trial_without_steps_that_rise_is_refused(override: str, said: str) -> None:
    assert said in "\n".join(errors_of(SMALL, override))


def test_a_trial_has_its_steps_in_order() -> None:
    trial = read(SMALL, "improve.trial={shadow_share: 0.3, shares: [0.1, 1]}").improve.trial
    assert trial is not None
    assert trial.steps == (("shadow", 0.3), ("canary", 0.1), ("canary", 1.0))
    assert read(SMALL).improve.trial is None


def test_a_gate_without_a_margin_for_exact_answers_is_the_one_that_it_was_before_there_was_any() -> None:
    assert "exact_margin" not in PromoteGate().model_dump(mode="json")
    gate = PromoteGate(exact_margin=0.0)
    assert gate.model_dump(mode="json")["exact_margin"] == 0.0
    assert PromoteGate.model_validate(gate.model_dump(mode="json")) == gate


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("improve.schedule={}", "expected either interval_s or daily_at in improve.schedule, found neither"),
        ("improve.schedule={interval_s: 9, daily_at: '03:00'}", "found both; name one"),
        ("improve.schedule={interval_s: 9, timezone: Europe/Berlin}", "expected timezone beside daily_at alone"),
        ("improve.schedule={interval_s: 9, weekdays: [mon]}", "expected weekdays beside daily_at alone"),
        ("improve.schedule={daily_at: '03:00', timezone: Mars/Olympus}", "expected the IANA name of a time zone"),
        ("improve.schedule={daily_at: '24:00'}", "'improve.schedule.daily_at'"),
        ("improve.schedule={daily_at: '03:00', weekdays: [mon, mon]}", "expected each of the weekdays once"),
        ("improve.live_judge={}", "expected evaluate.judge beside improve.live_judge, found none"),
        ("promote.erosion_margin=0.01", "expected an erosion_margin of at least non_inferiority_margin (0.02)"),
        ("evaluate.lm_eval={tasks: {}}", "'evaluate.lm_eval.tasks'"),
    ],
)
def test_what_the_loop_could_not_act_on_is_refused(override: str, said: str) -> None:
    assert said in "\n".join(errors_of(SMALL, override))


@pytest.mark.parametrize("written", ["03:00", "13:30", "'13:30'", "00:05"])
def test_a_time_of_day_is_what_was_written_also_where_yaml_reads_a_number_in_sixties(written: str) -> None:
    schedule = read(SMALL + f"improve:\n  schedule:\n    daily_at: {written}\n").improve.schedule

    assert schedule is not None and schedule.daily_at == written.strip("'")


def test_what_may_be_lost_in_all_is_twice_what_one_release_may_lose_unless_it_is_said() -> None:
    assert (PromoteGate().most_eroded, PromoteGate().most_exact_eroded) == (0.04, None)
    gate = PromoteGate(erosion_margin=0.03, exact_margin=0.01)
    assert (gate.most_eroded, gate.most_exact_eroded) == (0.03, 0.02)
    assert "erosion_margin" not in PromoteGate().model_dump(mode="json")
