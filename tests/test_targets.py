"""A teacher's targets: kept exactly, read by record, and the same training whichever way the teacher is known."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args
from weakref import WeakSet

import pytest
import torch
from conftest import ROOT, change, picture, run_stage
from safetensors.torch import load_file, save_file

from firstsight.caching import shards
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, write_json
from firstsight.core.params import Precision
from firstsight.distillation import teacher_answers
from firstsight.distillation.builder import TargetBuilder
from firstsight.distillation.targets import Index, SplitTargets, SplitTargetsWriter, read_head, read_index, write_index
from firstsight.distillation.teacher_answers import generate_answers
from firstsight.generation.answering import answers, generated_answers
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.pack import collate, encode, encode_answers, pack
from firstsight.records.parquet import Split, SplitWriter

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
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2000)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (60,), generator=generator).tolist()
    written = [
        (torch.randn(length, 16, generator=generator), torch.randint(500, (length,), generator=generator))
        for length in lengths
    ]
    writer = SplitTargetsWriter(tmp_path, "train")
    for first in range(0, 60, 4):
        hidden, answers = (torch.cat(column) for column in zip(*written[first : first + 4], strict=True))
        tensors = {"hidden": hidden, "answers": answers}
        writer.write(tensors, lengths[first : first + 4], {"1.0": 0.5})
    assert writer.close() == {"error_sums": {"1.0": 0.5 * 15}}
    head = torch.randn(500, 16, generator=generator)
    write_index(tmp_path, replace(INDEX, answer_tokens={"train": sum(lengths)}), head)
    assert len(list(tmp_path.glob("train-*.safetensors"))) > 3

    read = SplitTargets(tmp_path, "train", data="d")
    assert len(read) == 60
    for first, last in ((59, 60), (0, 1), (28, 33), (0, 60)):
        hidden = read.features(None, range(first, last))["hidden"]
        assert torch.equal(hidden, torch.cat([hidden for hidden, _ in written[first:last]]))
        assert read.answers(None, range(first, last)) == [tokens.tolist() for _, tokens in written[first:last]]
    assert torch.equal(read_head(tmp_path, "cpu"), head)
    with pytest.raises(UserError, match="expected targets made from this train split"):
        SplitTargets(tmp_path, "train", data="another")


def trained(folder, **settings):
    """Weights of the student that these targets make, from the smoke run's teacher and data."""
    change(folder, "targets", **settings)
    run_stage(folder, "cache_teacher_targets")
    run_stage(folder, "distill")
    return load_file(folder / "models/student-distilled/model.safetensors")


@pytest.mark.system
def test_online_and_hidden_train_to_the_same_weights(smoke, smoke_copy):
    hidden = load_file(smoke / "models/student-distilled/model.safetensors")
    online = trained(smoke_copy, kind="online")
    assert [path.name for path in (smoke_copy / "data/teacher-targets").iterdir()] == ["answers.json", "index.json"]
    for name, weight in hidden.items():
        torch.testing.assert_close(online[name], weight, atol=2e-5, rtol=1e-4)


@pytest.mark.system
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


@pytest.mark.system
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
    with pytest.raises(
        UserError, match=r"data/teacher-targets: expected .* MB free on the file system .*, found 0\.0 MB; .*kind"
    ):
        run_stage(smoke_copy, "cache_teacher_targets")


@pytest.mark.system
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_a_damaged_shard_of_an_interrupted_cache_is_made_again(smoke_copy, monkeypatch, damage):
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 40)
    change(smoke_copy, "targets", batch_size=4)
    run_stage(smoke_copy, "cache_teacher_targets")
    expected = contents(smoke_copy)
    monkeypatch.setattr("stages.cache_teacher_targets.write_index", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        run_stage(smoke_copy, "cache_teacher_targets")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 40)
    first, second, *_ = sorted((smoke_copy / ".scratch").rglob("train-*.safetensors"))
    second.write_bytes(damage(second.read_bytes()))
    kept = first.stat().st_ino
    run_stage(smoke_copy, "cache_teacher_targets")
    assert contents(smoke_copy) == expected
    assert (smoke_copy / "data/teacher-targets" / first.name).stat().st_ino == kept


def without_answers(path, samples, folder) -> Split:
    """The first samples of a split, without the answers of their records, as a split of its own."""
    split = Split(path)
    with SplitWriter(folder / "unanswered.parquet") as writer:
        for sample in map(split.__getitem__, range(samples)):
            writer.write(replace(sample, records=[replace(one, answer="", answers=()) for one in sample.records]))
    return Split(folder / "unanswered.parquet")


def test_the_states_of_generating_are_those_of_running_over_the_answers(smoke_copy, settings, tmp_path):
    teacher = smoke_copy / "models/teacher-finetuned"
    model, processor = load_model(teacher, "auto", "cpu"), load_processor(teacher)
    split = without_answers(smoke_copy / "data/egoqa/train.parquet", 8, tmp_path)
    questions = [(sample, record) for sample in split for record in sample.records]
    (tmp_path / "topk").mkdir()
    given = generate_answers(model, processor, [split], settings.targets, tmp_path)
    builder = TargetBuilder(model, settings.targets, SharedVocabulary(500))
    compared = []
    for sample, record in questions:
        answered = replace(record, answer=given.texts[record.id])
        tokens = encode_answers(processor, [answered])
        if not given.has_states([answered], tokens):
            continue
        packed = pack(processor, sample, encode(processor, sample, [answered]))
        with torch.inference_mode():
            (expected,) = builder.states(collate([packed], processor.tokenizer.pad_token_id))
        torch.testing.assert_close(given.states([answered]), expected, rtol=1e-4, atol=1e-5)
        assert not given.has_states([answered], [[*tokens[0], 1]])  # encoded otherwise than it was generated
        assert not given.has_states([replace(answered, id="another")], tokens)  # answered in the data
        compared.append(answered)
    assert len(compared) > len(questions) / 2
    top_k = generate_answers(
        model, processor, [split], settings.targets.model_copy(update={"kind": "topk"}), tmp_path / "topk"
    )
    assert top_k.texts == given.texts
    assert not any(top_k.has_states([one], encode_answers(processor, [one])) for one in compared)
    both = torch.cat([given.states([one]) for one in compared[:2]])
    assert torch.equal(given.states(compared[:2]), both)


def test_samples_are_let_go_once_they_are_answered(smoke, settings, model, processor, tmp_path, monkeypatch):
    """So that a data set of unanswered clips need not fit into memory."""
    split = without_answers(smoke / "data/egoqa/train.parquet", 9, tmp_path)
    read, alive, most = Split.__getitem__, WeakSet(), []

    def noting(self, index):
        sample = read(self, index)
        alive.add(sample)
        return sample

    def generating(model, processor, questions, *rest):
        most.append((len(alive), len({sample.id for sample, _ in questions})))
        return generated_answers(model, processor, questions, *rest)

    monkeypatch.setattr(Split, "__getitem__", noting)
    monkeypatch.setattr(teacher_answers, "generated_answers", generating)
    wanted = settings.targets.model_copy(update={"batch_size": 2})
    assert len(generate_answers(model, processor, [split], wanted, tmp_path).texts) == sum(split.record_counts())
    assert [asked for _, asked in most] == [2, 2, 2, 2, 1]
    assert max(held for held, _ in most) <= 4  # a batch, and the one before it


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_answers_of_an_interrupted_cache_are_kept_unless_they_are_damaged(
    smoke_copy, settings, model, processor, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 1)
    splits = [without_answers(smoke_copy / "data/egoqa/train.parquet", 4, tmp_path)]
    settings = settings.targets.model_copy(update={"batch_size": 1})
    expected = generate_answers(model, processor, splits, settings, tmp_path)
    first, second, *later = sorted(tmp_path.rglob("*.safetensors"))
    content, written = [one.read_bytes() for one in (first, second, *later)], first.stat().st_mtime_ns
    second.write_bytes(damage(second.read_bytes()))
    assert generate_answers(model, processor, splits, settings, tmp_path).texts == expected.texts
    assert [one.read_bytes() for one in (first, second, *later)] == content
    assert first.stat().st_mtime_ns == written


@pytest.mark.system
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_an_interrupted_cache_goes_on_and_ends_the_same(smoke_copy, monkeypatch, kind):
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 40)
    change(smoke_copy, "targets", kind=kind, batch_size=4)
    folder, scratch = smoke_copy / "data/teacher-targets", smoke_copy / ".scratch"
    run_stage(smoke_copy, "cache_teacher_targets")
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not list(scratch.iterdir())

    write, calls = SplitTargetsWriter.write, []

    def write_some(self, *batch):
        calls.append(batch)
        if len(calls) == 7:
            raise InterruptedError
        write(self, *batch)

    monkeypatch.setattr(SplitTargetsWriter, "write", write_some)
    with pytest.raises(InterruptedError):
        run_stage(smoke_copy, "cache_teacher_targets")
    assert expected == {path.name: path.read_bytes() for path in folder.iterdir()}  # untouched
    monkeypatch.setattr(SplitTargetsWriter, "write", lambda self, *batch: calls.append(batch) or write(self, *batch))
    run_stage(smoke_copy, "cache_teacher_targets")
    batches = 9 + 2  # of 33 and 7 samples
    assert 7 < len(calls) < 7 + batches  # some were not done again
    assert expected == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not list(scratch.iterdir())


@pytest.mark.system
def test_a_cache_of_other_data_is_not_gone_on_with(smoke_copy, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 1)
    monkeypatch.setattr(SplitTargetsWriter, "close", lambda self: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        run_stage(smoke_copy, "cache_teacher_targets")
    monkeypatch.undo()
    change(smoke_copy, "data", seed=5)
    run_stage(smoke_copy, "build_egoqa_dataset")
    run_stage(smoke_copy, "cache_teacher_targets")
    data = fingerprint_files([smoke_copy / "data/egoqa/train.parquet"])
    assert len(SplitTargets(smoke_copy / "data/teacher-targets", "train", data)) == len(
        [record for sample in Split(smoke_copy / "data/egoqa/train.parquet") for record in sample.records]
    )


def test_a_teacher_that_gives_nan_is_refused(smoke_copy):
    path = smoke_copy / "models/teacher-finetuned/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("norm.weight") and "layers" not in name)
    weights[name][0] = float("nan")
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match="train split: expected finite values from the teacher, found NaN or infinity in hidden of record 0",
    ):
        run_stage(smoke_copy, "cache_teacher_targets")


def rewrite(path, **changes):
    """The shard with some of its tensors replaced."""
    tensors = load_file(path)
    path.unlink()
    save_file(tensors | {name: function(tensors[name]) for name, function in changes.items()}, path)


def trust(path):
    """Have the index say that the file was written as it is now."""
    index = json.loads((path.parent / "index.json").read_text())
    index["files"] |= {path.name: fingerprint_files([path])} if path.exists() else {}
    if not path.exists():
        del index["files"][path.name]
    write_json(path.parent / "index.json", index)


def spoil_shard(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_values(path):
    rewrite(path, hidden=lambda hidden: hidden.fill_(float("inf")))


def spoil_count(path):
    path.unlink()


def spoil_answers(path):
    rewrite(path, answers=lambda answers: answers + 1)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (spoil_shard, r"teacher-targets: expected the train targets, found"),
        (spoil_count, r"teacher-targets: expected the train targets, found 0 of \d+ answer tokens"),
        (spoil_values, r"teacher-targets: expected the train targets, found values that are not finite, at record \d+"),
        (spoil_answers, r"record scene-\d+-[a-z-]+: expected the teacher's answer tokens, where token 0 is \d+ \('"),
    ],
)
def test_damaged_targets_stop_the_run(smoke_copy, spoil, found):
    path = smoke_copy / "data/teacher-targets/train-00000.safetensors"
    copy = path.read_bytes()
    path.unlink()
    path.write_bytes(copy)
    spoil(path)
    with pytest.raises(UserError, match=rf"{path.name}: expected the file as it was written \(SHA-256 \w+\), found"):
        run_stage(smoke_copy, "distill")
    trust(path)
    with pytest.raises(UserError, match=found):
        run_stage(smoke_copy, "distill")


@pytest.mark.parametrize("name", ["head.safetensors", "validation-00000.safetensors", "answers.json"])
def test_a_flipped_byte_stops_the_run(smoke_copy, name):
    path = smoke_copy / "data/teacher-targets" / name
    content = bytearray(path.read_bytes())
    path.unlink()
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: expected the file as it was written"):
        run_stage(smoke_copy, "distill")


@pytest.mark.parametrize(
    "changes",
    [{"kind": "foo"}, {"data": None}, {"answer_tokens": None}, {"shared_vocabulary": "432"}, {"precision": "foo"},
     {"more": 1}, {"files": [1]}],
)  # fmt: skip
def test_a_wrong_index_is_one_line(smoke_copy, changes):
    path = smoke_copy / "data/teacher-targets/index.json"
    write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(UserError, match=r"index\.json: .*expected .*, found .*; run cache") as error:
        run_stage(smoke_copy, "distill")
    assert next(iter(changes)) in str(error.value)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_an_index_holds_every_precision_that_parameters_may_ask_for(tmp_path, precision):
    write_index(tmp_path, replace(INDEX, precision=precision), None)
    assert read_index(tmp_path).precision == precision


@pytest.mark.system
def test_another_config_of_the_teacher_does_not_go_on_with_what_it_left(smoke_copy, monkeypatch):
    """The weights are the same; what they compute is not."""
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 40)
    change(smoke_copy, "targets", batch_size=4)
    write, left = SplitTargetsWriter.write, [6]

    def interrupted(self, *arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(SplitTargetsWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(smoke_copy, "cache_teacher_targets")
    monkeypatch.setattr(SplitTargetsWriter, "write", write)
    path = smoke_copy / "models/teacher-finetuned/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    write_json(path, config)
    run_stage(smoke_copy, "cache_teacher_targets")
    resumed = contents(smoke_copy)
    run_stage(smoke_copy, "cache_teacher_targets")
    assert contents(smoke_copy) == resumed


def contents(folder) -> dict[str, str]:
    return {path.name: fingerprint_files([path]) for path in (folder / "data/teacher-targets").iterdir()}


@pytest.mark.system
def test_reading_leaves_the_targets_on_disk(tmp_path):
    """A process that reads every record holds none of them: memory of its own does not grow with the file."""
    count, width = 3000, 4096
    writer = SplitTargetsWriter(tmp_path, "train")
    for _ in range(count // 100):
        writer.write({"hidden": torch.randn(400, width), "answers": torch.zeros(400, dtype=torch.int64)}, [4] * 100, {})
    writer.close()
    write_index(tmp_path, replace(INDEX, answer_tokens={"train": 4 * count}), torch.zeros(1, width))
    assert sum(path.stat().st_size for path in tmp_path.glob("train-*")) > 190e6
    code = f"""
from pathlib import Path
from firstsight.distillation.targets import SplitTargets

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

read = SplitTargets(Path({str(tmp_path)!r}), "train", "d")
read.features(None, range(1))
before = own()
for record in range(len(read)):
    read.features(None, range(record, record + 1))
print(own() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 20_000  # KiB, of 192,000 read


@pytest.mark.system
@pytest.mark.parametrize("kind", ["hidden", "online"])
def test_questions_without_an_answer_get_the_teachers(smoke_copy, kind):
    """Of answered and unanswered questions about one picture, one of them with options that the teacher ignores."""
    asked = [
        {"split": split, "media": f"{split}.jpg", **values}
        for split in ("train", "validation", "test")
        for values in (
            {"id": f"{split}-known", "question": "What is in your left hand?", "answer": "a cup"},
            {"id": f"{split}-open", "question": "What is in your right hand?"},
            {"id": f"{split}-choice", "question": "Which?", "options": ["x", "y"]},
        )
    ]
    for number, split in enumerate(("train", "validation", "test")):
        (smoke_copy / f"{split}.jpg").write_bytes(picture(number))
    (smoke_copy / "qa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    change(smoke_copy, "data", source="jsonl", path="qa.jsonl", unanswered="teacher")
    change(smoke_copy, "targets", kind=kind, max_answer_tokens=6)
    for stage in (("build_egoqa_dataset",), ("finetune_teacher",), ("cache_teacher_targets",), ("distill",)):
        run_stage(smoke_copy, *stage)

    card = json.loads((smoke_copy / "data/egoqa/card.json").read_text())
    assert [card["splits"][split]["unanswered"] for split in ("train", "validation", "test")] == [2, 2, 0]
    given = json.loads((smoke_copy / "data/teacher-targets/answers.json").read_text())
    assert set(given) == {f"{split}-{what}" for split in ("train", "validation") for what in ("open", "choice")}
    teacher = smoke_copy / "models/teacher-finetuned"
    train = Split(smoke_copy / "data/egoqa/train.parquet")
    question = (train[0], train[0].records[1])
    (own,) = answers(load_model(teacher, "auto", "cpu"), load_processor(teacher), [question], 1, 6)
    assert own
    assert given["train-open"] == own
    assert given["train-choice"] in ("", "A", "B")
    (sample,) = train.answered(given)
    assert [(one.id, one.answer) for one in sample.records][:2] == [("train-known", "a cup"), ("train-open", own)]
    assert all(one.answer for one in sample.records)
    (sample,) = train.answered({})
    assert [one.id for one in sample.records] == ["train-known"]
    history = json.loads((smoke_copy / "models/student-distilled/history.json").read_text())
    assert history[-1]["step"] == 2


def test_a_teacher_is_not_finetuned_on_nothing(smoke_copy):
    path = smoke_copy / "data/egoqa/train.parquet"
    sample = Split(path)[0]
    unanswered = replace(sample, records=tuple(replace(one, answer="", answers=()) for one in sample.records))
    with SplitWriter(path) as writer:
        writer.write(unanswered)
    with pytest.raises(UserError, match="expected questions with an answer, found none"):
        run_stage(smoke_copy, "finetune_teacher")
