"""Training with compiled layers gives the losses and gradients that training without them gives.

Without a GPU, layers are traced and differentiated as for one, and then computed operation by operation (PyTorch's
"aot_eager"); `tests/test_benchmarks.py` has them compiled for the CPU. On a GPU, they are compiled for it.
"""

import copy
import logging

import pytest
import torch
from conftest import make_sample
from families import SAVE
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from training_steps import DEVICE, adapted, assert_same, steps

from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing import forward
from firstsight.packing.pack import collate, encode, pack
from firstsight.training import compiled_layers, cuda_graphs
from firstsight.training.compiled_layers import compile_layers
from firstsight.training.cuda_graphs import GraphedLanguageModel
from firstsight.training.distillation_model import DistillationModel

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Layers are compiled for a GPU, or traced; nothing is left from other tests."""
    torch._dynamo.reset()
    counters.clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(compiled_layers, "_compile", lookup_backend("aot_eager"))
    cache, precision = torch.is_autocast_cache_enabled(), torch.get_float32_matmul_precision()
    with torch._dynamo.config.patch(recompile_limit=8):  # which is set back after the test
        yield
    torch.set_autocast_cache_enabled(cache)
    torch.set_float32_matmul_precision(precision)
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


# Compiling takes seconds for each kind of layer, mask and batch, so the tests share what they compile.


def test_losses_and_gradients_are_the_same(make):
    model, batches = make("Qwen2VLForConditionalGeneration")
    plain = copy.deepcopy(model)
    before = torch.get_rng_state()
    assert compile_layers(model, batches[0], None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(one.grad is None for one in model.parameters())
    assert counters["stats"]["unique_graphs"]
    assert_same(steps(model, batches, 2), steps(plain, batches, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_neither_training_nor_graphs_nor_evaluation_need_more_code(make, monkeypatch, checkpointing):
    model, batches = make("Qwen2ForCausalLM")
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", batches[0]["input_ids"].shape[1])  # no padding for the first batch
    monkeypatch.setattr(forward, "_TILE", 8)  # masks of the last tokens, and of none
    torch.set_autocast_cache_enabled(False)
    codes = []

    def record(_, work):
        codes.append(dict(counters["stats"]))
        work()
        assert counters["stats"] == codes[-1]
        return work

    if DEVICE == "cpu":
        monkeypatch.setattr(GraphedLanguageModel, "_record_work", record)
    plain, compiled = adapted(copy.deepcopy(model)), adapted(model)
    compiled.load_state_dict(plain.state_dict())
    outside = []
    if checkpointing:
        compiled.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for layer in compiled.model.layers:
            again = layer._gradient_checkpointing_func
            # Of which Dynamo would say that it compiles, if what is compiled were computed once.
            layer._gradient_checkpointing_func = lambda *what, again=again: (
                outside.append(not torch.compiler.is_compiling()) or again(*what)
            )
    graphs = GraphedLanguageModel(compiled)
    with graphs.unrecorded():
        assert compile_layers(compiled, batches[0], torch.bfloat16)
    assert not graphs._recorded
    assert all(outside)
    assert bool(outside) == checkpointing
    compiled_first = dict(counters["stats"])
    first = steps(compiled, batches[:1], 1, torch.bfloat16)
    assert counters["stats"] == compiled_first
    # Code for a GPU rounds to bfloat16 in other places; traced operations round in the same ones.
    rounded = DEVICE == "cuda"
    assert_same(first, steps(plain, batches[:1], 1, torch.bfloat16), rounded)
    assert_same(steps(compiled, batches, 2, torch.bfloat16), steps(plain, batches, 2, torch.bfloat16), rounded)
    assert len(graphs._recorded) == 2
    assert all(graphs._recorded.values())
    trained = dict(counters["stats"])
    with torch.inference_mode():
        DistillationModel(compiled).eval()(**batches[0], num_items_in_batch=torch.tensor(1))
    assert counters["stats"] == trained


def rounding(graph, inputs):
    """A backend whose code rounds to bfloat16."""
    return lambda *arguments: tuple(
        one.bfloat16().to(one.dtype) if isinstance(one, torch.Tensor) else one for one in graph(*arguments)
    )


def test_layers_that_round_otherwise_are_taken(make, monkeypatch):
    """Behind a norm of equal weights, where the states themselves would be no gradient to compare by."""
    monkeypatch.setattr(compiled_layers, "_compile", rounding)
    model, batches = make("Qwen2ForCausalLM")
    model.get_input_embeddings().weight.data *= 100  # as large as a trained model's states, beside the norm's epsilon
    assert compile_layers(adapted(model), batches[0], None)


def wrong(graph, inputs):
    """A backend whose code computes something else."""
    return lambda *arguments: tuple(one + 1 if isinstance(one, torch.Tensor) else one for one in graph(*arguments))


def missing(graph, inputs):
    raise RuntimeError("Failed to find C compiler\nand more")


@pytest.mark.parametrize(
    ("backend", "said"), [(wrong, "compiled ones compute something else"), (missing, "Failed to find C compiler")]
)
def test_layers_are_left_as_they_were_where_compiling_fails(make, monkeypatch, caplog, backend, said):
    monkeypatch.setattr(compiled_layers, "_compile", backend)
    model, batches = make("Qwen2ForCausalLM")
    plain = copy.deepcopy(model)
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    assert not compile_layers(model, batches[0], None)
    logger.removeHandler(caplog.handler)
    assert "the layers are not compiled, because " in caplog.text
    assert said in caplog.text
    counters.clear()
    assert_same(steps(model, batches, 2), steps(plain, batches, 2))
    assert not counters["stats"]


def test_a_batch_that_cannot_be_compiled_later_is_computed_without(make, monkeypatch):
    tried = []

    def first_only(graph, inputs):
        tried.append(graph)
        if len(tried) > 1:
            raise RuntimeError("no kernel for this one")
        return graph

    monkeypatch.setattr(compiled_layers, "_compile", first_only)
    model, batches = make("Qwen2ForCausalLM")
    plain = copy.deepcopy(model)
    assert compile_layers(model, batches[0], None)
    single = {name: one[:1] for name, one in batches[0].items()}
    assert_same(steps(model, [single], 2), steps(plain, [single], 2))
    assert len(tried) > 1
