"""Every way to train a model learns, saves, reloads and merges to the same outputs."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import change, run_stage
from safetensors.torch import load_file, save_file

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_folder
from firstsight.core.params import Optimisation
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import PackedDataset
from firstsight.packing.forward import last_hidden_states
from firstsight.records.parquet import Split
from firstsight.training.adapters import TrainableModel
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.fit import total_steps, train

METHODS = ["full", "lora", "qlora", "adalora"]


def optimisation(settings, **changes) -> Optimisation:
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    return Optimisation(**values | {"epochs": 2.0, "learning_rate": 5e-3} | changes)


@pytest.fixture
def sets(smoke):
    processor = load_processor(smoke / "models/student")
    return [PackedDataset(Split(smoke / f"data/egoqa/{split}.parquet"), processor) for split in ("train", "validation")]


def tuned(smoke, settings, sets, scratch: Path) -> tuple[TrainableModel, list[float]]:
    """The smoke run's student trained by `settings.method`, and its validation losses."""
    train_set, validation_set = sets
    trainable = TrainableModel(smoke / "models/student", settings, "cpu", total_steps(len(train_set), settings))
    model = DistillationModel(trainable.model, regularisation=trainable.regularisation)
    history = train(model, train_set, validation_set, settings, scratch, device="cpu", trainable=trainable)
    return trainable, [row["eval_objective"] for row in history if "eval_objective" in row]


@torch.inference_mode()
def states(model, dataset) -> torch.Tensor:
    batch = dataset.collate([dataset[index] for index in range(4)])
    return last_hidden_states(model.eval(), batch)[batch["labels"] != -100]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_saves_reloads_and_merges(smoke, settings, sets, tmp_path, method):
    trainable, losses = tuned(
        smoke, optimisation(settings, method=method, train_vision=False), sets, tmp_path / "scratch"
    )
    assert losses[-1] < losses[0]
    trained = states(trainable.model, sets[1])
    for save in ("save", "save_merged"):
        folder = tmp_path / save
        folder.mkdir()
        getattr(trainable, save)(folder)
        load_processor(smoke / "models/student").save_pretrained(folder)
        # QLoRA's adapter belongs to NF4 weights.
        precision = "nf4" if (save, method) == ("save", "qlora") else "float32"
        found = states(load_model(folder, precision, "cpu"), sets[1])
        torch.testing.assert_close(found, trained, atol=2e-4, rtol=1e-3)
    assert (tmp_path / "save/adapter").is_dir() == (method != "full")
    assert not (tmp_path / "save_merged/adapter").exists()
    before, after = (load_file(path / "model.safetensors") for path in (smoke / "models/student", folder))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved
    assert not any("visual" in name for name in moved)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_vision_tower_is_trained_by_choice(smoke, settings, method):
    for vision in (False, True):
        trainable = TrainableModel(
            smoke / "models/student", optimisation(settings, method=method, train_vision=vision), "cpu", 10
        )
        names = [name for name, parameter in trainable.model.named_parameters() if parameter.requires_grad]
        assert any("visual" in name for name in names) == vision
        assert any("language_model" in name for name in names)


def test_the_seed_decides_an_adapters_first_weights(smoke, settings):
    first, again, other = (
        TrainableModel(smoke / "models/student", optimisation(settings, method="lora", seed=seed), "cpu", 10).model
        for seed in (1, 1, 2)
    )
    name = next(name for name, _ in first.named_parameters() if "lora_A" in name)
    assert first.get_parameter(name).equal(again.get_parameter(name))
    assert not first.get_parameter(name).equal(other.get_parameter(name))


def test_qlora_trains_over_nf4_weights_of_the_language_model_alone(smoke, settings):
    trainable = TrainableModel(
        smoke / "models/student", optimisation(settings, method="qlora", train_vision=False), "cpu", 10
    )
    quantized = [name for name, module in trainable.model.named_modules() if isinstance(module, Linear4bit)]
    assert quantized
    assert all("language_model" in name for name in quantized)
    assert all("lora" in name for name, parameter in trainable.model.named_parameters() if parameter.requires_grad)


def test_adalora_shares_out_its_ranks(smoke, settings, sets, tmp_path):
    adapter = settings.train.adapter.model_copy(update={"rank": 4})
    changes = {"method": "adalora", "train_vision": False, "adapter": adapter, "epochs": 6.0}
    trainable, _ = tuned(smoke, optimisation(settings, **changes), sets, tmp_path)
    values = [p for name, p in trainable.model.named_parameters() if "lora_E" in name]
    assert all(len(value) == 6 for value in values)  # begun with half as many again
    assert sum(int(value.count_nonzero()) for value in values) == 4 * len(values)
    assert trainable.regularisation() > 0


def test_a_target_that_is_no_layer_is_refused(smoke, settings):
    adapter = settings.train.adapter.model_copy(update={"target_modules": ["q_proj", "w1"]})
    with pytest.raises(
        UserError, match=r"expected a linear layer named 'w1' in the language model.*found \['down_proj'"
    ):
        TrainableModel(smoke / "models/student", optimisation(settings, method="lora", adapter=adapter), "cpu", 10)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_trained_is_refused_before_training(smoke_copy, settings, method):
    with pytest.raises(
        UserError, match="student-nf4: expected weights that can be trained, found them quantized to nf4"
    ):
        TrainableModel(smoke_copy / "models/student-nf4", optimisation(settings, method=method), "cpu", 10)
    student = smoke_copy / "models/student"
    lora = TrainableModel(student, optimisation(settings, method="lora"), "cpu", 10)
    (smoke_copy / "adapted").mkdir()
    lora.save(smoke_copy / "adapted")
    if method == "full":
        assert TrainableModel(smoke_copy / "adapted", optimisation(settings, method=method), "cpu", 10).model
        return
    with pytest.raises(UserError, match=f"a model without an adapter of its own, because method is {method}, found"):
        TrainableModel(smoke_copy / "adapted", optimisation(settings, method=method), "cpu", 10)
    adapter = settings.train.adapter.model_copy(update={"rank": 4096})
    with pytest.raises(UserError, match=r"expected adapter\.rank of at most 32, .*, found 4096"):
        TrainableModel(student, optimisation(settings, method=method, adapter=adapter, train_vision=False), "cpu", 10)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_adapter_without_all_its_weights_or_pickled_is_refused(smoke, settings, tmp_path, method):
    TrainableModel(smoke / "models/student", optimisation(settings, method=method), "cpu", 10).save(tmp_path)
    load_model(tmp_path, "auto", "cpu")
    path = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[::2]), path)
    with pytest.raises(UserError, match=r"adapter: expected a complete .*, found no weight for"):
        load_model(tmp_path, "auto", "cpu")
    path.unlink()
    torch.save(weights, path.with_suffix(".bin"))
    with pytest.raises(UserError, match="adapter: expected a complete"):
        load_model(tmp_path, "auto", "cpu")


@pytest.mark.system
def test_an_adapted_teacher_and_student_go_through_the_stages(smoke_copy):
    change(smoke_copy, "finetune_teacher", method="lora", train_vision=False)
    change(smoke_copy, "train", method="qlora", train_vision=False)
    change(smoke_copy, "targets", precision="int8")
    teacher = fingerprint_folder(smoke_copy / "models/teacher")
    for stage in ("finetune_teacher", "cache_teacher_targets", "cache_visual_tokens", "distill"):
        run_stage(smoke_copy, stage)
    run_stage(smoke_copy, "evaluate", "teacher")
    assert (smoke_copy / "models/teacher-finetuned/adapter/adapter_model.safetensors").exists()
    # It shares its weights with its base: what is written beside them is not written into the base, or DVC's cache.
    assert fingerprint_folder(smoke_copy / "models/teacher") == teacher
    history = json.loads((smoke_copy / "models/student-distilled/history.json").read_text())
    losses = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert losses[-1] < losses[0]
    load_model(smoke_copy / "models/student-distilled", "auto", "cpu")
