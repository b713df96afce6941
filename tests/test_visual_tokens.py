"""Visual tokens made once give the loss and gradients that pixels give; others' are refused."""

import json
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import change, make_sample, picture, run_stage, workspace
from egogpt_checkpoint import save_original
from families import SAVE, save_qwen2
from safetensors.torch import load_file, save_file

from firstsight.acquisition.egogpt_conversion import convert
from firstsight.caching import shards
from firstsight.caching.visual_tokens import (
    SplitVisualTokens,
    VisualIndex,
    VisualTokensWriter,
    read_visual_index,
    without_pixels,
)
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, fingerprint_folder, write_json
from firstsight.core.params import Optimisation
from firstsight.core.variants import LEFT_OUT
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import ExpandedDataset, PackedDataset
from firstsight.packing.pack import encode_questions, expand
from firstsight.packing.vision_tower import VisionTower
from firstsight.records.parquet import Split, SplitWriter
from firstsight.records.sample import Sample
from firstsight.training.adapters import TrainableModel
from firstsight.training.distillation_model import DistillationModel

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
SAMPLES = [
    make_sample("image", "image", 1, QUESTIONS),
    replace(make_sample("wide", "image", 1, QUESTIONS[:1]), frames=(picture(3, 112, 28),)),
    make_sample("frames", "frames", 3, QUESTIONS[:2]),
    make_sample("text", "none", 0, QUESTIONS[:1]),
    make_sample("video", "video", 4, QUESTIONS),
    make_sample("last", "image", 1, QUESTIONS[1:]),
]
FAMILIES = [name for name in SAVE if name != "Qwen2ForCausalLM"] + ["egogpt"]


def save_egogpt(folder) -> None:
    for name in ("original", "converted"):
        (folder / name).mkdir()
    save_original(folder / "original", "grid")
    convert(folder / "original", folder / "converted")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of several threads may be in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(family, settings, processor, folder):
    """A tiny student of this family."""
    if family == "egogpt":
        save_egogpt(folder)
        return folder / "converted"
    SAVE[family](folder, settings, processor)
    return folder


def looked_at(folder, student, samples, monkeypatch):
    """The samples as a split, from pixels and from visual tokens that are on disk in several shards."""
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 4)
    path = folder / "train.parquet"
    with SplitWriter(path) as writer:
        for sample in samples:
            writer.write(sample)
    processor, tower = load_processor(student), VisionTower(load_model(student, "float32", "cpu"), "cpu")
    written = VisualTokensWriter(folder, "train")
    for expanded in map(ExpandedDataset(Split(path), processor).__getitem__, range(len(samples))):
        written.write(without_pixels(expanded), tower.tokens(expanded))
    tokens = written.close()["tokens"]
    index = VisualIndex("s", "float32", {"train": "d"}, {"train": written.records}, {"train": tokens})
    answered = Split(path).answered({})
    seen = SplitVisualTokens(folder, "train", index, "d")
    return PackedDataset(answered, processor), PackedDataset(answered, processor, visual=seen)


def optimisation(settings, **changes) -> Optimisation:
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    return Optimisation(**values | {"train_vision": False} | changes)


def loss_and_gradients(model, dataset, chosen):
    """The loss and the gradients of a step on these samples, by name."""
    batch = dataset.collate([dataset[one] for one in chosen])
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum())["loss"]
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_alike(model, from_pixels, from_tokens):
    """Bit for bit sample by sample, as the tower has run over them; in a batch to the rounding of its products."""
    for chosen in ([0], [2], [3], [4], [4, 3, 0, 2]):
        expected, gradients = loss_and_gradients(model, from_pixels, chosen)
        loss, found = loss_and_gradients(model, from_tokens, chosen)
        assert gradients
        assert gradients.keys() == found.keys()
        if len(chosen) == 1:
            assert loss.equal(expected)
            assert [name for name, gradient in gradients.items() if not found[name].equal(gradient)] == []
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_from_pixels(family, settings, processor, tmp_path, monkeypatch):
    """With the language model's embeddings trained, and whatever its weights: images, clips, text, several pictures."""
    student = saved(family, settings, processor, tmp_path)
    trainable = TrainableModel(student, optimisation(settings), "cpu", 10)
    sets = looked_at(tmp_path, student, SAMPLES, monkeypatch)
    assert_alike(DistillationModel(trainable.model).train(), *sets)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_so_they_are_with_adapters_and_checkpointing_and_without_the_tower(
    settings, processor, tmp_path, monkeypatch, method
):
    student = saved("Qwen2VLForConditionalGeneration", settings, processor, tmp_path)
    trainable = TrainableModel(student, optimisation(settings, method=method), "cpu", 10)
    from_pixels, from_tokens = looked_at(tmp_path, student, SAMPLES, monkeypatch)
    model = DistillationModel(trainable.model).train()
    model.student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alike(model, from_pixels, from_tokens)
    without = TrainableModel(student, optimisation(settings, method=method), "cpu", 10, without_tower=True)
    assert without.model.model.visual is None
    expected, _ = loss_and_gradients(model, from_tokens, [0])
    assert loss_and_gradients(DistillationModel(without.model).train(), from_tokens, [0])[0].equal(expected)
    (tmp_path / "merged").mkdir()
    without.save_merged(tmp_path / "merged")
    kept, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", student))
    assert kept.keys() == original.keys()
    assert [name for name in original if "visual" in name and not kept[name].equal(original[name])] == []


@pytest.fixture
def run(settings, processor, tmp_path):
    """A workspace with a student and both splits, in which the stage can run."""
    folder = workspace(tmp_path)
    change(folder, "train", train_vision=False)
    (folder / "models/student").mkdir(parents=True)
    (folder / "data/egoqa").mkdir(parents=True)
    saved("Qwen2VLForConditionalGeneration", settings, processor, folder / "models/student")
    for split, samples in (("train", SAMPLES), ("validation", SAMPLES[:3])):
        write_split(folder, split, samples)
    return folder


def write_split(folder, split, samples):
    with SplitWriter(folder / f"data/egoqa/{split}.parquet") as writer:
        for sample in samples:
            writer.write(sample)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data/visual-tokens").iterdir())}


def read(folder, precision="float32"):
    """Both splits' visual tokens, as the trainings read them."""
    with chdir(folder):
        index = read_visual_index(Path("data/visual-tokens"), fingerprint_folder(Path("models/student")), precision)
        return [
            SplitVisualTokens(
                Path("data/visual-tokens"), split, index, fingerprint_files([Path(f"data/egoqa/{split}.parquet")])
            )
            for split in ("train", "validation")
        ]


def test_a_killed_stage_goes_on_and_ends_the_same(run, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_RECORDS", 2)
    run_stage(run, "cache_visual_tokens")
    expected = contents(run)
    assert [name for name in expected if "train" in name] == [f"train-0000{number}.safetensors" for number in range(3)]
    assert not list((run / ".scratch").iterdir())
    write, left, begun = VisualTokensWriter.write, [5], []

    def interrupted(self, *arguments):
        left[0] -= 1
        if not left[0]:
            raise InterruptedError
        write(self, *arguments)

    monkeypatch.setattr(VisualTokensWriter, "write", interrupted)
    with pytest.raises(InterruptedError):
        run_stage(run, "cache_visual_tokens")
    assert contents(run) == expected  # untouched
    monkeypatch.setattr(VisualTokensWriter, "write", lambda self, *one: begun.append(self.records) or write(self, *one))
    run_stage(run, "cache_visual_tokens")
    assert begun == [4, 5, 0, 1, 2]
    assert contents(run) == expected
    assert not list((run / ".scratch").iterdir())
    assert list(map(len, read(run))) == [6, 3]


def spoil_weights(folder):
    path = folder / "models/student/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "visual" in name)
    save_file(weights | {name: weights[name] + 1}, path, metadata={"format": "pt"})


def spoil_processor(folder):
    path = folder / "models/student/processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    write_json(path, values)


def spoil_data(folder):
    write_split(folder, "validation", SAMPLES[1:4])


def spoil_index(folder):
    (folder / "data/visual-tokens/index.json").unlink()


def spoil_shard(folder):
    path = folder / "data/visual-tokens/train-00000.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (spoil_weights, r"visual-tokens: expected visual tokens made by the weights and the processor in models/stu"),
        (spoil_processor, r"visual-tokens: expected visual tokens made by the weights and the processor in models/stu"),
        (spoil_data, r"visual-tokens: expected visual tokens made from this validation split \(\w+\), found those"),
        (spoil_index, r"index\.json: expected JSON written by cache-visual-tokens, found"),
        (spoil_shard, r"train-00000.safetensors: expected the file as it was written \(SHA-256 \w+\), found"),
    ],
)
def test_those_of_another_student_processor_or_data_and_damaged_ones_are_refused(run, spoil, found):
    run_stage(run, "cache_visual_tokens")
    read(run)
    spoil(run)
    with pytest.raises(UserError, match=f"{found}.*; run cache-visual-tokens again"):
        read(run)


def test_those_of_another_precision_are_refused(run):
    """Adapters train over 16-bit weights on CUDA, `method: full` over 32-bit ones."""
    run_stage(run, "cache_visual_tokens")
    with pytest.raises(UserError, match=r"of a student loaded as auto, as train\.method says, found"):
        read(run, "auto")


def test_a_tower_that_gives_nan_is_refused(run):
    path = run / "models/student/model.safetensors"
    weights = load_file(path)
    next(one for name, one in weights.items() if name.endswith("merger.mlp.2.bias"))[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="train split: expected finite visual tokens from the student, found NaN"):
        run_stage(run, "cache_visual_tokens")
    assert not (run / "data/visual-tokens").exists()


def test_a_disk_without_room_is_refused_before_the_tower_runs(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"data/visual-tokens: expected .* MB free .*, or set train\.visual_tokens"):
        run_stage(run, "cache_visual_tokens")


def test_a_model_of_an_unknown_family_is_refused(settings, processor, tmp_path):
    save_qwen2(tmp_path, settings, processor)
    with pytest.raises(UserError, match=r"expected a model of one of the types qwen2_vl, .*, found qwen2; set"):
        VisionTower(load_model(tmp_path, "float32", "cpu"), "cpu")


def test_a_processor_that_makes_room_for_more_than_the_tower_gives_is_refused(settings, processor, tmp_path):
    student = saved("Qwen2VLForConditionalGeneration", settings, processor, tmp_path)
    tower, image = VisionTower(load_model(student, "float32", "cpu"), "cpu"), SAMPLES[0]
    expanded = expand(processor, image, encode_questions(processor, image, image.records))
    expanded["prefix"] = torch.cat([expanded["prefix"], torch.tensor([processor.image_token_id])])
    with pytest.raises(UserError, match="expected a visual token for each of 10 placeholders, found 9; take processor"):
        tower.tokens(expanded)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"train_vision": True}, "train.train_vision is true"),
        ({"visual_tokens": "computed"}, "train.visual_tokens is computed"),
    ],
)
def test_it_is_left_out_where_the_tower_is_trained_or_runs_in_every_epoch(tmp_path, values, reason):
    folder = workspace(tmp_path)
    change(folder, "train", **{"train_vision": False} | values)
    run_stage(folder, "cache_visual_tokens")
    (note,) = (folder / "data/visual-tokens").iterdir()
    assert (note.name, json.loads(note.read_text())) == (LEFT_OUT, reason)


def test_records_that_are_left_out_leave_the_stored_prefix_as_it_is(processor, settings, tmp_path, monkeypatch):
    """Prompts of fewer records have more in common; what they share beyond the stored prefix is text."""
    student = saved("Qwen2VLForConditionalGeneration", settings, processor, tmp_path)
    same = [replace(one, question=f"What is the colour of the {one.id}?") for one in SAMPLES[4].records]
    sample = replace(SAMPLES[4], records=(*same[:2], replace(same[2], answer="", answers=())))
    other = replace(sample, id="other", records=(same[0], replace(SAMPLES[4].records[1], answer="", answers=())))
    from_pixels, from_tokens = looked_at(tmp_path, student, [sample, other], monkeypatch)
    for one in range(2):
        packed, seen = from_pixels[one], from_tokens[one]
        assert packed.keys() - seen.keys() == {"pixel_values_videos"}
        assert seen.keys() - packed.keys() == {"visual_tokens"}
        for name in packed.keys() & seen.keys():
            assert seen[name].equal(packed[name]), name
            assert seen[name].dtype == packed[name].dtype, name


def weights(folder, name):
    return load_file(folder / f"models/{name}/model.safetensors")


@pytest.mark.system
@pytest.mark.parametrize("kind", ["hidden", "online"])
def test_trainings_on_visual_tokens_process_no_pixels_and_end_as_those_from_pixels(smoke_copy, monkeypatch, kind):
    change(smoke_copy, "train", train_vision=False, visual_tokens="computed", batch_size=1, epochs=0.5, alpha=0.0)
    change(smoke_copy, "targets", kind=kind)
    for stage in ("cache_teacher_targets", "cache_visual_tokens", "distill"):
        run_stage(smoke_copy, stage)
    expected = weights(smoke_copy, "student-distilled")
    change(smoke_copy, "train", visual_tokens="cached")
    run_stage(smoke_copy, "cache_visual_tokens")
    if kind == "hidden":  # an online teacher sees by itself
        monkeypatch.setattr(Sample, "images", None)
    run_stage(smoke_copy, "distill")
    assert expected.keys() == weights(smoke_copy, "student-distilled").keys()
    for name, weight in weights(smoke_copy, "student-distilled").items():
        assert weight.equal(expected[name]), name
    # The control reads the same tokens; with alpha 0 it is the same training.
    run_stage(smoke_copy, "finetune_student")
    for name, weight in weights(smoke_copy, "student-finetuned").items():
        assert weight.equal(expected[name]), name
