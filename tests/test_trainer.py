"""Training through HF Trainer: which weights are kept, and what they were trained for."""

import copy
import sys

import pytest
import torch
from conftest import make_sample
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers.training_args import OptimizerNames

from firstsight.core.errors import UserError
from firstsight.core.params import Optimisation
from firstsight.models.architecture import draws_random_numbers
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import OnlineTeacher, PackedDataset
from firstsight.packing.forward import last_hidden_states
from firstsight.records.parquet import Split
from firstsight.training import fit
from firstsight.training.cuda_graphs import GraphedLanguageModel
from firstsight.training.distillation_model import DistillationModel
from firstsight.training.fit import train
from firstsight.training.optimizer import trainer_name
from firstsight.training.trainer import EpochShuffle


@pytest.fixture
def parts(smoke):
    processor = load_processor(smoke / "models/student")
    sets = [PackedDataset(Split(smoke / f"data/egoqa/{split}.parquet"), processor) for split in ("train", "validation")]
    return load_model(smoke / "models/student", "float32", "cpu"), sets


def optimisation(settings, **changes):
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    return Optimisation(**values | changes)


def validation_loss(model, dataset) -> float:
    """CE an answer token, counted here, over single-sample batches."""
    total = tokens = 0
    with torch.inference_mode():
        for batch in DataLoader(dataset, 1, collate_fn=dataset.collate):
            found = model(**batch, num_items_in_batch=torch.tensor(1))
            total, tokens = total + found["ce"].item(), tokens + found["tokens"].item()
    return total / tokens


def test_the_best_epochs_weights_are_kept_and_training_stops_early(settings, parts, tmp_path):
    student, (train_set, validation_set) = parts
    model = DistillationModel(student)
    # Far too fast: the loss soon rises.
    fast = optimisation(settings, learning_rate=0.3, epochs=8, warmup_fraction=0.5)
    history = train(model, train_set, validation_set, fast, tmp_path, early_stopping_epochs=1, device="cpu")
    losses = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert losses[-1] > min(losses)
    assert len(losses) < 8
    assert validation_loss(model.eval(), validation_set) == pytest.approx(min(losses), rel=1e-4)


class Lengths:
    """A dataset whose samples have so many characters of question, and padding samples after them."""

    def __init__(self, lengths, padded):
        self.split = [make_sample(str(n), "none", 0, [("x" * length, "y")]) for n, length in enumerate(lengths)]
        self._padded = padded

    def __len__(self):
        return self._padded


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_micro_batches_of_a_step_have_samples_of_like_length(epoch):
    lengths = [4 * (n * 7919 % 61) for n in range(61)]
    dataset = Lengths(lengths, padded=64)
    whole, parts = (EpochShuffle(dataset, 5, samples_per_step=16, micro_batch=size) for size in (16, 4))
    for shuffle in (whole, parts):
        shuffle.set_epoch(epoch)
    drawn, ordered = list(whole), list(parts)
    generator = torch.Generator().manual_seed(5 + epoch)
    assert drawn[:61] == torch.randperm(61, generator=generator).tolist() == parts.order(epoch)
    assert drawn[61:] == ordered[61:] == [61, 62, 63]
    for start in range(0, 61, 16):
        step = ordered[start : min(61, start + 16)]
        assert set(step) == set(drawn[start : min(61, start + 16)])
        assert [lengths[n] for n in step] == sorted((lengths[n] for n in step), reverse=True)


def test_a_frozen_teacher_head_is_not_saved_with_the_student(settings, parts):
    student, _ = parts
    model = DistillationModel(student, settings.train, teacher_head=torch.zeros(10, 4))
    assert not any("teacher" in name for name in model.state_dict())
    assert not any("teacher" in name for name, _ in model.named_parameters())


def test_gradient_checkpointing_changes_memory_and_nothing_else(settings, parts, tmp_path):
    student, (train_set, validation_set) = parts
    start = copy.deepcopy(student.state_dict())
    weights, calls = [], []
    for checkpointing in (False, True):
        student.load_state_dict(start)
        one_epoch = optimisation(settings, epochs=1, gradient_checkpointing=checkpointing)
        model = DistillationModel(student)
        layer = student.model.language_model.layers[0]
        hook = layer.self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        train(model, train_set, validation_set, one_epoch, tmp_path / str(checkpointing), device="cpu")
        hook.remove()
        weights.append((copy.deepcopy(student.state_dict()), sum(calls)))
        calls.clear()
    assert weights[1][1] == 2 * weights[0][1]  # computed again in the backward pass
    for name, weight in weights[0][0].items():
        torch.testing.assert_close(weights[1][0][name], weight, atol=1e-5, rtol=1e-4)


def test_with_eight_bit_moments_the_student_learns_nearly_the_same(settings, parts, tmp_path):
    student, (train_set, validation_set) = parts
    start = copy.deepcopy(student.state_dict())
    losses = {}
    for optimizer in ("adamw", "adamw_8bit"):
        student.load_state_dict(start)
        chosen = optimisation(settings, epochs=4, optimizer=optimizer)
        model = DistillationModel(student)
        history = train(model, train_set, validation_set, chosen, tmp_path / optimizer, device="cpu")
        losses[optimizer] = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert losses["adamw_8bit"] != losses["adamw"]
    assert losses["adamw_8bit"][-1] < losses["adamw"][0]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.02)


@pytest.mark.parametrize(("least", "checkpointing"), [(12, False), (12, True), (13, False)])
def test_layers_are_compiled_for_a_long_training(settings, parts, monkeypatch, least, checkpointing):
    student, (train_set, _) = parts
    train_set.teacher = OnlineTeacher(train_set.processor)
    asked = []
    monkeypatch.setattr(fit, "compile_layers", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(fit, "LEAST_BATCHES", least)
    changes = {"epochs": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing}
    steps = fit.total_steps(len(train_set), chosen := optimisation(settings, **changes))
    assert fit.speed_up(student.eval(), train_set, chosen) is not None
    assert 2 * steps == 12
    if least > 12:
        assert not asked
    else:
        model, batch, dtype = asked[0]
        assert model.training
        two = train_set.collate([train_set[0], train_set[1]])
        assert batch.keys() == two.keys() - {"teacher"}
        assert batch["input_ids"].equal(two["input_ids"])
        assert dtype is None
        last_hidden_states(model, batch)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"method": "qlora"}])
def test_passes_that_no_graph_can_hold_are_neither_recorded_nor_compiled(settings, parts, monkeypatch, changes):
    student, (train_set, _) = parts
    monkeypatch.setattr(fit, "LEAST_BATCHES", 0)
    monkeypatch.setattr(fit, "compile_layers", lambda *_: pytest.fail("compiled"))
    student.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    assert fit.speed_up(student, train_set, optimisation(settings, **changes)) is None


def test_where_memory_ends_beside_graphs_training_goes_on_without(settings, parts, tmp_path, monkeypatch):
    """In the second step, after graphs of the first: it begins again, and ends as one that has never had graphs."""
    student, (train_set, validation_set) = parts
    start = copy.deepcopy(student.state_dict())
    one_epoch = optimisation(settings, epochs=1)
    train(DistillationModel(student), train_set, validation_set, one_epoch, tmp_path / "plain", device="cpu")
    expected = copy.deepcopy(student.state_dict())
    student.load_state_dict(start)
    monkeypatch.setattr(GraphedLanguageModel, "_record_work", lambda self, work: (work(), work)[1])
    monkeypatch.setattr(fit, "_replays", lambda trainer: True)
    monkeypatch.setattr(fit, "_restarts", lambda optimisation, device: True)
    graphs, step = [], fit.DistillationTrainer.training_step

    def short_of_memory(self, *arguments):
        graphs.append(any(self.model.student.model.language_model.forward._recorded.values()))
        if graphs[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *arguments)

    monkeypatch.setattr(fit.DistillationTrainer, "training_step", short_of_memory)
    train(DistillationModel(student), train_set, validation_set, one_epoch, tmp_path / "graphs", device="cpu")
    assert graphs.count(True) == 1
    for name, weight in expected.items():
        torch.testing.assert_close(student.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


def test_dropout_of_layers_and_of_adapters_is_found(parts):
    student, _ = parts
    assert not draws_random_numbers(student)
    for share in (0.0, 0.1):
        adapter = LoraConfig(lora_dropout=share, target_modules=["q_proj"])
        assert draws_random_numbers(get_peft_model(copy.deepcopy(student), adapter)) == (share > 0)
    student.model.visual.blocks[0].attn.attention_dropout = 0.1
    assert draws_random_numbers(student)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layers_computed_twice_drop_the_same_and_keep_random_numbers_for_nothing_else(
    settings, parts, tmp_path, monkeypatch, dropout
):
    student, (train_set, validation_set) = parts
    for layer in student.model.language_model.layers:
        layer.self_attn.attention_dropout = dropout
    start, weights, kept = copy.deepcopy(student.state_dict()), [], []
    enable = student.gradient_checkpointing_enable
    monkeypatch.setattr(student, "gradient_checkpointing_enable", lambda how: (kept.append(how), enable(how)))
    for checkpointing in (False, True):
        student.load_state_dict(start)
        one_epoch = optimisation(settings, epochs=1, gradient_checkpointing=checkpointing)
        folder = tmp_path / str(checkpointing)
        train(DistillationModel(student), train_set, validation_set, one_epoch, folder, device="cpu")
        weights.append(copy.deepcopy(student.state_dict()))
    assert [how["preserve_rng_state"] for how in kept] == [dropout > 0]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)


def test_adamw_is_the_fused_one():
    assert trainer_name("adamw", "cuda") == trainer_name("adamw", "cpu") == OptimizerNames.ADAMW_TORCH_FUSED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eight_bit_moments_are_paged_on_a_gpu():
    assert trainer_name("adamw_8bit", "cuda") == OptimizerNames.PAGED_ADAMW_8BIT


def test_an_optimizer_that_does_not_run_is_one_line_before_training(settings, parts, tmp_path, monkeypatch):
    student, (train_set, validation_set) = parts
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as where it is not installed
    chosen = optimisation(settings, optimizer="adamw_8bit")
    with pytest.raises(UserError, match=r"optimizer: expected adamw_8bit to run on cpu, found .*; install"):
        train(DistillationModel(student), train_set, validation_set, chosen, tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_batch_without_answers_has_no_loss_and_a_graph(settings, parts):
    student, (train_set, _) = parts
    padded = train_set.padded_to_multiple(len(train_set) + 1)
    batch = padded.collate([padded[len(train_set)], padded[len(train_set) + 1]])
    model = DistillationModel(student.train())
    found = model(**batch, num_items_in_batch=torch.tensor(0))
    found["loss"].backward()
    assert found["loss"].item() == 0
    assert found["tokens"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert student.get_input_embeddings().weight.grad is not None
