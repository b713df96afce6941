"""Mistakes in params.yaml are met before any work, in one line."""

import copy
import re

import pytest
from conftest import ROOT
from dvc.utils.serialize import YAMLError, parse_yaml
from ruamel.yaml import YAML

from firstsight.core import params, yaml12
from firstsight.core.errors import UserError

DEFAULT = YAML(typ="safe", pure=True).load(ROOT / "presets/smoke.yaml")


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
        ("train.optimizer", "adamw8bit", "train.optimizer: expected one of 'adamw' or 'adamw_8bit', found 'adamw8bit'"),
        ("quantize.methods", ["int3"], "quantize.methods.0: expected one of 'int8', 'nf4' or 'int4', found 'int3'"),
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
            "data.source: expected one of 'synthetic', 'hub', 'jsonl', 'csv', 'llava', 'egoschema', 'openeqa', "
            "'egotempo' or 'text', found 'json'",
        ),
        ("data.benchmark.source", "hub", "data.benchmark.source: expected one of 'none', 'jsonl', 'csv', "),
        (
            "targets.precision",
            "fp8",
            "expected one of 'auto', 'float32', 'bfloat16', 'float16', 'int8', 'nf4' or 'int4'",
        ),
        ("data.path", None, "data.path: expected text, found None"),
        ("data.max_pixels", 3000, "data.max_pixels: expected at least 3136, found 3000"),
        ("train.temperature", 1e200, "train.temperature: expected at most 1000, found 1e+200"),
        ("train.weight_decay", float("inf"), "train.weight_decay: expected a finite number, found inf"),
        ("models.student.init.hidden_size", 100, "models.student.init: expected hidden_size to be a multiple of"),
        ("models.teacher.init", None, "models.teacher: expected sizes under init"),
        ("train.batch_size", 10**30, "train.batch_size: expected at most 65536, found 1000"),
        ("train.epochs", 1e308, "train.epochs: expected at most 10000, found 1e+308"),
        ("models.student.init.hidden_size", 10**12, "models.student.init.hidden_size: expected at most 1e+09, found"),
        ("models.teacher.source", "", "models.teacher.source: expected text that is not empty, found ''"),
        ("train.adapter.target_modules", [], "train.adapter.target_modules: expected a list of at least 1, found []"),
        (
            "evaluate.engine",
            "onnxruntime-cuda",
            "evaluate.engine: expected one of 'onnxruntime' or 'openvino', found 'onnxruntime-cuda'",
        ),
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


def under_the_old_name(values: dict, old: str) -> list[str]:
    """Give the renamed key its old name in each section of that name; returns the paths of the old keys."""
    parent, key = old.split(".")
    paths = []

    def walk(section: dict, path: str) -> None:
        for name, value in section.items():
            if name == parent and isinstance(value, dict):
                value[key] = value.pop(params.RENAMED[old])
                paths.append(f"{path}{name}.{key}")
            elif isinstance(value, dict):
                walk(value, f"{path}{name}.")

    walk(values, "")
    return paths


@pytest.mark.parametrize("old", params.RENAMED)
def test_an_old_name_is_refused_with_its_new_one(tmp_path, old):
    values = copy.deepcopy(DEFAULT)
    first, second = under_the_old_name(values, old)
    new, key = params.RENAMED[old], old.split(".")[1]
    line = f"{tmp_path / 'params.yaml'}: {first}: expected {new}, its new name, found {key}; rename it (and 1 more)"
    assert message(tmp_path, values) == line
    assert second != first


def test_a_file_of_old_names_counts_each_once(tmp_path):
    values = copy.deepcopy(DEFAULT)
    old = [path for name in params.RENAMED for path in under_the_old_name(values, name)]
    assert len(old) == 2 * len(params.RENAMED)
    assert message(tmp_path, values).endswith(f"; rename it (and {len(old) - 1} more)")


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
    assert f"{section}: expected a value, found none" in message(tmp_path, values)


def test_a_missing_key_is_named(tmp_path):
    values = copy.deepcopy(DEFAULT)
    del values["train"]["alpha"]
    assert "train.alpha: expected a value, found none" in message(tmp_path, values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a list",
        "train: [",
        "a: !!python/object:os.system {}",
        "a: 1\nb: 2\na: 3",
        "a: 1\n--- {}\n",
        "a: \x00",
        "&a [*a]",
    ],
)
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


# Plain scalars and what holds them, where YAML 1.1 and 1.2 part or readers of either differ.
_TABLE = r"""
1e-4 1E-4 1e3 1.5e-3 -2e+5 .5 -.5 +.5 5. 1.e3 .5e3 .5e-3 1_000 1_000.5 1__0 1_ 0_7 0 -0 +7 000 007 010 0.10 -0.0
0o7 0o17 0O7 0x1F 0X1f -0x1f 0b101 -0b1 0o8 08 0x 1e 1e+ e3 - -. . .. ._ 7e1234 12e03a 4e-400
1:30 1:30:00 190:20:30.15 .inf -.Inf +.INF inf .nan .NaN nan 1.7976931348623157e309 9007199254740993
yes Yes no NO on On off OFF y n true True TRUE tRUE false False null Null NULL nULL ~ None none = << é
2024-01-31 2024-1-31 2024-01-31T10:00:00 10:00 12-31 1.2.3 a#b '' "" 'yes' "1e-4" 'it''s' "\u00e9\n" a:b {a:b}
"""
_SPACED = ["2024-01-31 10:00:00", "a b", "!!str 1e-4", "!!float 1", "!!int 0o7", "&a 5", "{a: 1, b: yes}"]
SCALARS = _TABLE.split() + _SPACED
LISTS = ["['a:b',c]", "[http://x]", "[1e-4,yes,~,0o7]", "[[], {}]"]


@pytest.mark.parametrize("value", SCALARS + LISTS)
def test_a_value_means_what_it_means_to_dvc(tmp_path, value):
    path = tmp_path / "params.yaml"
    for text in (f"a: {value}\n", f"a: [{value}, x]\n", *([f"{value}: 1\n"] if value in SCALARS else [])):
        path.write_text(text, encoding="utf-8")
        assert repr(read(yaml12.load, path)) == repr(read(dvc_load, path)), text


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\n",
        "a: 1\na: 2\n",
        "a: {b: 1, b: 1}\n",
        "'a': 1\na: 2\n",
        "a: |\n  b\n  c\nd: >\n  e\n  f\n",
        "a: b\n  c\n",
        "? a\n: b\n",
        "a:\n\tb: 1\n",
        "a: b: c\n",
        "a: [1, 2\n",
        "a: *b\n",
        "a: @b\n",
        "%YAML 1.2\n---\na: yes\n",
        "a: 1 # comment\n# another\n",
        "\ufeffa: 1\n",
        "a: !!set {b, c}\n",
        "a: !mine b\n",
    ],
)
def test_a_file_means_what_it_means_to_dvc(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    assert read(yaml12.load, path) == read(dvc_load, path)


def dvc_load(path):
    return parse_yaml(path.read_text("utf-8"), path)


def read(reader, path):
    """What a reader makes of a file; None where it refuses it."""
    try:
        return reader(path)
    except (UserError, YAMLError, ValueError, IndexError):
        return None


@pytest.mark.parametrize(
    "value", [*SCALARS, 1e-4, 1e-5, 1e22, 0.1, True, None, 7, "a: b", "# c", " d", "", [], {}, ["é"]]
)
def test_what_is_dumped_is_read_back(tmp_path, value):
    path = tmp_path / "params.yaml"
    path.write_text(yaml12.dump({"a": value}), encoding="utf-8")
    assert yaml12.load(path) == {"a": value}
    assert parse_yaml(path.read_text("utf-8"), path) == {"a": value}


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
    for model in filter(None, (loaded.models.teacher, loaded.models.student)):
        assert model.revision in (None, "main") or re.fullmatch("[0-9a-f]{40}", model.revision)
    assert (ROOT / loaded.data.path).is_file()
