"""Mistakes in params.yaml are met before any work, in one line."""

import copy
import re

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from firstsight.core import params
from firstsight.core.errors import UserError

DEFAULT = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda p: p.name
)
def test_every_parameter_file_is_valid(path):
    params.load(path)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("train.alpha", 1.5, "train.alpha: expected at most 1, found 1.5"),
        ("train.alpha", -0.1, "train.alpha: expected at least 0, found -0.1"),
        ("train.temperature", 0, "train.temperature: expected at least 0.01, found 0"),
        ("train.temperature", float("nan"), "train.temperature: expected"),
        ("train.temperature", "warm", "train.temperature: expected a number, found 'warm'"),
        ("train.batch_size", 2.5, "train.batch_size: expected a whole number, found 2.5"),
        ("train.batch_size", True, "train.batch_size: expected a whole number, found True"),
        ("train.tempurature", 2, "train.tempurature: expected a known key, found an unknown one"),
        ("quantize.methods", ["int3"], "quantize.methods.0: expected one of 'int8' or 'nf4', found 'int3'"),
        ("quantize.methods", ["nf4", "nf4"], "quantize.methods: expected each value once, found ['nf4', 'nf4']"),
        (
            "evaluate.throughput_batch_sizes",
            [],
            "evaluate.throughput_batch_sizes: expected a list of at least 1, found []",
        ),
        ("data", None, "data: expected a section of keys, found None"),
        ("data.validation_fraction", 0.98, "data: expected validation_fraction + test_fraction below 1"),
        (
            "data.source",
            "json",
            "data.source: expected one of 'synthetic', 'hub', 'jsonl', 'csv', 'llava', 'egoschema', 'openeqa' or "
            "'egotempo', found 'json'",
        ),
        ("data.benchmark.source", "hub", "data.benchmark.source: expected one of 'none', 'jsonl', 'csv', "),
        ("targets.precision", "int4", "expected one of 'auto', 'float32', 'bfloat16', 'float16', 'int8' or 'nf4', fou"),
        ("data.path", None, "data.path: expected text, found None"),
        ("data.max_pixels", 3000, "data.max_pixels: expected at least 3136, found 3000"),
        ("train.temperature", 1e200, "train.temperature: expected at most 1000, found 1e+200"),
        ("train.weight_decay", float("inf"), "train.weight_decay: expected a finite number, found inf"),
        ("models.student.init.hidden_size", 100, "models.student.init: expected hidden_size to be a multiple of"),
        ("models.teacher.init", None, "models.teacher: expected sizes under init"),
        ("train.batch_size", 10**30, "train.batch_size: expected at most 65536, found 1000"),
        ("train.epochs", 1e308, "train.epochs: expected at most 10000, found 1e+308"),
        ("models.student.init.hidden_size", 10**12, "models.student.init.hidden_size: expected at most 1e+09, found"),
        ("models.teacher.source", "", "models.teacher.source: expected text, not nothing, found ''"),
        ("train.adapter.targets", [], "train.adapter.targets: expected a list of at least 1, found []"),
        ("evaluate.seed", -1, "evaluate.seed: expected at least 0, found -1"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(tmp_path, key, value, line):
    values = copy.deepcopy(DEFAULT)
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[last] = value
    said = message(tmp_path, values)
    assert line in said
    assert "more)" not in said


def test_a_stages_output_is_no_source_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
    written = re.findall(r"models/([\w-]+|\$\{item\})['}:\]]", str([s.get("do", s)["outs"] for s in stages.values()]))
    assert "teacher-finetuned" in written
    assert set(params.MODEL_OUTPUTS) >= {name for name in written if "$" not in name}
    for name in params.MODEL_OUTPUTS:
        for source in (f"models/{name}", f"./models/../models/{name}/", str(tmp_path / "models" / name / "adapter")):
            values = copy.deepcopy(DEFAULT)
            values["models"]["teacher"]["source"] = source
            assert f"models.teacher: expected a source outside the pipeline's own outputs, found {source}" in message(
                tmp_path, values
            )
    params.Model(source="models/mine", revision=None, init=None)


@pytest.mark.parametrize("section", DEFAULT)
def test_a_missing_section_is_named(tmp_path, section):
    values = {name: value for name, value in DEFAULT.items() if name != section}
    assert f"{section}: expected this section, found none" in message(tmp_path, values)


def test_a_missing_key_is_named(tmp_path):
    values = copy.deepcopy(DEFAULT)
    del values["train"]["alpha"]
    assert "train.alpha: expected this key, found none" in message(tmp_path, values)


@pytest.mark.parametrize("text", ["", "- a list", "train: [", "a: !!python/object:os.system {}"])
def test_no_mapping_is_one_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        params.load(path)
    assert str(error.value).startswith(f"{path}: expected")
    assert "\n" not in str(error.value)


def test_no_file_says_where_to_find_one(tmp_path):
    with pytest.raises(UserError, match=r"expected a parameter file, found none"):
        params.load(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_writes_them(tmp_path):
    """1e-4 is text to a YAML 1.1 reader."""
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text().replace("learning_rate: 1.5e-3", "learning_rate: 1e-4")
    path.write_text(text)
    assert params.load(path).finetune_teacher.learning_rate == 1e-4


def message(folder, values) -> str:
    path = folder / "params.yaml"
    with path.open("w") as file:
        YAML().dump(values, file)
    with pytest.raises(UserError) as error:
        params.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_names_data_that_is_there_and_whole_commits_or_branches(path):
    loaded = params.load(path)
    for model in (loaded.models.teacher, loaded.models.student):
        assert model.revision in (None, "main") or re.fullmatch("[0-9a-f]{40}", model.revision)
    assert (ROOT / loaded.data.path).is_file()
