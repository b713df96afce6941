"""A teacher's targets: kept exactly, read by record, and the same training whichever way the teacher is known."""

import json

import pytest
import torch
from conftest import change, run_stage
from safetensors.torch import load_file

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files
from firstsight.distillation import targets
from firstsight.distillation.targets import Index, SplitTargets, SplitTargetsWriter, read_head, write_index

INDEX = Index(
    kind="hidden",
    teacher="t",
    precision="auto",
    data={"train": "d"},
    vocabulary="v",
    shared_vocabulary=500,
    answer_tokens={"train": 0},
    bytes_per_token=64,
    topk_error={},
)


def test_targets_read_back_equal_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_SHARD_BYTES", 2000)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (60,), generator=generator).tolist()
    written = [
        (torch.randn(length, 16, generator=generator), torch.randint(500, (length,), generator=generator))
        for length in lengths
    ]
    writer = SplitTargetsWriter(tmp_path, "train")
    for hidden, answers in written:
        writer.write({"hidden": hidden}, answers)
    assert writer.close() == sum(lengths)
    head = torch.randn(500, 16, generator=generator)
    write_index(tmp_path, INDEX, head)
    assert len(list(tmp_path.glob("train-*.safetensors"))) > 3

    read = SplitTargets(tmp_path, "train", data="d")
    assert len(read) == 60
    for first, last in ((59, 60), (0, 1), (28, 33), (0, 60)):
        answers, tensors = read.of(None, range(first, last))
        assert torch.equal(tensors["hidden"], torch.cat([hidden for hidden, _ in written[first:last]]))
        assert answers == [tokens.tolist() for _, tokens in written[first:last]]
    assert torch.equal(read_head(tmp_path, "cpu"), head)
    with pytest.raises(UserError, match="expected targets made from this train split"):
        SplitTargets(tmp_path, "train", data="another")


def trained(folder, **settings):
    """Weights of the student that these targets make, from the smoke run's teacher and data."""
    change(folder, "targets", **settings)
    run_stage(folder, "cache_teacher_targets")
    run_stage(folder, "distill")
    return load_file(folder / "models/student-distilled/model.safetensors")


def test_online_and_hidden_train_to_the_same_weights(smoke, smoke_copy):
    hidden = load_file(smoke / "models/student-distilled/model.safetensors")
    online = trained(smoke_copy, kind="online")
    assert [path.name for path in (smoke_copy / "data/teacher-targets").iterdir()] == ["index.json"]
    for name, weight in hidden.items():
        torch.testing.assert_close(online[name], weight, atol=2e-5, rtol=1e-4)


def test_top_k_of_everything_trains_as_hidden_does_and_fewer_reports_its_error(smoke, smoke_copy):
    hidden = load_file(smoke / "models/student-distilled/model.safetensors")
    whole = trained(smoke_copy, kind="topk", k=10_000)
    for name, weight in hidden.items():
        torch.testing.assert_close(whole[name], weight, atol=1e-4, rtol=1e-3)
    trained(smoke_copy, kind="topk", k=16)
    index = json.loads((smoke_copy / "data/teacher-targets/index.json").read_text())
    assert index["bytes_per_token"] == 16 * 8 + 4
    errors = [index["topk_error"][temperature] for temperature in ("1.0", "2.0", "4.0")]
    assert all(error > 0 for error in errors)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_every_divergence_trains(smoke, smoke_copy, divergence):
    before = fingerprint_files([smoke / "models/student-distilled/model.safetensors"])
    change(smoke_copy, "train", divergence=divergence)
    run_stage(smoke_copy, "distill")
    history = json.loads((smoke_copy / "models/student-distilled/history.json").read_text())
    losses = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert losses[-1] < losses[0]
    assert fingerprint_files([smoke_copy / "models/student-distilled/model.safetensors"]) != before


def test_a_disk_without_room_is_refused_before_the_teacher_runs(smoke_copy, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"data/teacher-targets: expected room for .* found 0\.0 GB free"):
        run_stage(smoke_copy, "cache_teacher_targets")
