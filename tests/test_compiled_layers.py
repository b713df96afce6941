"""Training with compiled layers gives the losses and gradients that training without them gives.

Without a GPU, layers are traced and differentiated as for one, and then computed operation by operation (PyTorch's
"aot_eager"); one test has them compiled for the CPU. On a GPU, all of them are compiled for it.
"""

import copy
import logging
import shutil

import pytest
import torch
from conftest import make_sample
from families import SAVE
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing import forward
from firstsight.packing.pack import collate, encode, pack
from firstsight.training import compiled_layers, cuda_graphs
from firstsight.training.compiled_layers import compile_layers
from firstsight.training.cuda_graphs import GraphedLanguageModel
from firstsight.training.distillation_model import DistillationModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Layers are compiled for a GPU, or traced; nothing is left from other tests."""
    torch._dynamo.reset()
    counters.clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(compiled_layers, "_BACKEND", "aot_eager")
    with torch._dynamo.config.patch(recompile_limit=8, suppress_errors=False):  # which are set back after the test
        yield
    torch._dynamo.reset()


@pytest.fixture
def make(settings, processor, tmp_path):
    """A tiny model of a family, with random weights, and batches of several shapes."""

    def made(family: str) -> tuple:
        SAVE[family](tmp_path, settings, processor)
        own = load_processor(tmp_path)
        kinds = {"none": 0} if family == "Qwen2ForCausalLM" else {"image": 1, "frames": 2}

        def batch(count: int, repeated: int = 1) -> dict[str, torch.Tensor]:
            samples = repeated * [make_sample(kind, kind, frames, QUESTIONS[:count]) for kind, frames in kinds.items()]
            packed = [pack(own, one, encode(own, one, one.records)) for one in samples]
            return {name: one.to(DEVICE) for name, one in collate(packed, own.tokenizer.pad_token_id).items()}

        return load_model(tmp_path, "float32", DEVICE).train(), [batch(3, 2), batch(1, 2)]

    return made


def adapted(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).get_base_model()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:  # which is zero at first, so that the other matrix has no gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator(DEVICE).manual_seed(number))
    return model


def steps(model, batches, rounds: int = 2) -> list:
    """Losses and gradients of optimizer steps, each of them of all batches."""
    training = DistillationModel(model)
    tokens = torch.tensor(sum(int((batch["labels"] >= 0).sum()) for batch in batches))
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(rounds):
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = training(**batch, num_items_in_batch=tokens)["loss"]
            loss.backward()
            losses.append(loss.item())
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
    return found


def assert_same(found: list, expected: list) -> None:
    for (losses, gradients), (other_losses, others) in zip(found, expected, strict=True):
        assert losses == pytest.approx(other_losses, rel=1e-4)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-5)


# Compiling takes seconds for each kind of layer, mask and batch, so the tests share what they compile.


def test_losses_and_gradients_are_the_same(make):
    model, batches = make("Qwen2VLForConditionalGeneration")
    plain = copy.deepcopy(model)
    before = torch.get_rng_state()
    assert compile_layers(model, batches[0], None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(one.grad is None for one in model.parameters())
    assert counters["stats"]["unique_graphs"]
    assert_same(steps(model, batches), steps(plain, batches))


def test_graphs_of_adapters_need_no_code_that_the_batch_before_did_not(make, monkeypatch):
    model, batches = make("Qwen2ForCausalLM")
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", batches[0]["input_ids"].shape[1])  # no padding for the first batch
    monkeypatch.setattr(forward, "_TILE", 8)  # masks of the last tokens, and of none
    plain, compiled = adapted(copy.deepcopy(model)), adapted(model)
    compiled.load_state_dict(plain.state_dict())
    assert compile_layers(compiled, batches[0], None)
    before = []

    def record(_, work):
        before.append(dict(counters["stats"]))
        work()
        assert counters["stats"] == before[-1]
        return work

    if DEVICE == "cpu":
        monkeypatch.setattr(GraphedLanguageModel, "_record_work", record)
    graphs = GraphedLanguageModel(compiled)
    assert_same(steps(compiled, batches), steps(plain, batches))
    assert len(graphs._recorded) == 2
    assert all(graphs._recorded.values())


@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_layers_compiled_for_this_processor_compute_the_same(make, monkeypatch):
    monkeypatch.setattr(compiled_layers, "_BACKEND", "inductor")
    model, batches = make("Qwen2ForCausalLM")
    plain = copy.deepcopy(model)
    assert compile_layers(model, batches[0], None)
    assert_same(steps(model, batches[:1]), steps(plain, batches[:1]))


def wrong(graph, inputs):
    """A backend whose code computes something else."""
    return lambda *arguments: tuple(one + 1 if isinstance(one, torch.Tensor) else one for one in graph(*arguments))


def missing(graph, inputs):
    raise RuntimeError("Failed to find C compiler\nand more")


@pytest.mark.parametrize(
    ("backend", "said"), [(wrong, "compiled ones compute something else"), (missing, "Failed to find C compiler")]
)
def test_layers_are_left_as_they_were_where_compiling_fails(make, monkeypatch, caplog, backend, said):
    monkeypatch.setattr(compiled_layers, "_BACKEND", backend)
    model, batches = make("Qwen2ForCausalLM")
    plain = copy.deepcopy(model)
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    assert not compile_layers(model, batches[0], None)
    logger.removeHandler(caplog.handler)
    assert "the layers are not compiled, because " in caplog.text
    assert said in caplog.text
    counters.clear()
    assert_same(steps(model, batches), steps(plain, batches))
    assert not counters["stats"]


def test_a_batch_that_cannot_be_compiled_later_is_computed_without(make, monkeypatch):
    tried = []

    def first_only(graph, inputs):
        tried.append(graph)
        if len(tried) > 1:
            raise RuntimeError("no kernel for this one")
        return graph

    monkeypatch.setattr(compiled_layers, "_BACKEND", first_only)
    model, batches = make("Qwen2ForCausalLM")
    plain = copy.deepcopy(model)
    assert compile_layers(model, batches[0], None)
    single = {name: one[:1] for name, one in batches[0].items()}
    assert_same(steps(model, [single]), steps(plain, [single]))
    assert len(tried) > 1
