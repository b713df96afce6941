"""Training by replayed passes gives the losses and gradients that training without them gives.

Without a GPU nothing can be recorded: what a graph would replay is computed again instead, over the same tensors. What
is padded, where gradients are summed and when a shape is recorded is then tested; on a GPU, the graphs are too.
"""

import copy
import logging
import math

import pytest
import torch
from conftest import make_sample
from families import SAVE
from training_steps import DEVICE, adapted, assert_same, steps

from firstsight.models.cuda_graph import is_out_of_memory, record
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing import forward
from firstsight.packing.forward import attention_mask
from firstsight.packing.pack import collate, encode, pack
from firstsight.training import cuda_graphs
from firstsight.training.cuda_graphs import GraphedLanguageModel
from firstsight.training.distillation_model import DistillationModel

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
FAMILIES = ["Qwen2VLForConditionalGeneration", "Qwen2ForCausalLM", "LlavaOnevisionForConditionalGeneration"]
pytestmark = pytest.mark.gpu


@pytest.fixture(params=FAMILIES)
def parts(request, settings, processor, tmp_path):
    """A tiny model with random weights, and three batches, two of them of one shape."""
    SAVE[request.param](tmp_path, settings, processor)
    own = load_processor(tmp_path)
    kinds = {"none": 0} if request.param == "Qwen2ForCausalLM" else {"none": 0, "image": 1, "frames": 2}

    def batch(count: int) -> dict[str, torch.Tensor]:
        samples = [make_sample(kind, kind, frames, QUESTIONS[:count]) for kind, frames in kinds.items()]
        packed = collate([pack(own, one, encode(own, one, one.records)) for one in samples], own.tokenizer.pad_token_id)
        return {name: tensor.to(DEVICE) for name, tensor in packed.items()}

    model = load_model(tmp_path, "float32", DEVICE)
    return model.train(), [batch(3), batch(1), batch(3)]


@pytest.fixture
def recorded(monkeypatch):
    """What is recorded; without a GPU, functions that are called again."""
    works = []

    def record(_, work):
        works.append(work)
        work()
        return work

    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 48)
    if DEVICE == "cpu":
        monkeypatch.setattr(GraphedLanguageModel, "_record_work", record)
    return works


@pytest.mark.parametrize("how", ["full", "lora", "full, with checkpointing", "lora, with checkpointing"])
def test_losses_and_gradients_are_the_same(parts, recorded, how):
    model, batches = parts
    plain, graphed = copy.deepcopy(model), model
    if "lora" in how:
        plain, graphed = adapted(plain), adapted(graphed)
        graphed.load_state_dict(plain.state_dict())
    if "checkpointing" in how:
        graphed.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    replayed = GraphedLanguageModel(graphed)
    assert_same(steps(graphed, batches, 4), steps(plain, batches, 4))
    shapes = [value for value in replayed._recorded.values() if value is not None]
    assert len(shapes) == len({-(-batch["input_ids"].shape[1] // 48) for batch in batches})
    if DEVICE == "cpu":
        assert len(recorded) == 2 * len(shapes)


def test_masks_of_the_last_tokens_alone_are_padded_too(parts, recorded, monkeypatch):
    model, batches = parts
    expected = steps(copy.deepcopy(model), batches, 4)
    monkeypatch.setattr(forward, "_TILE", 8)
    some, none, _ = (attention_mask(model, one["segment_ids"]).shape for one in batches)
    assert 0 == none[2] < some[2] < some[3]
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, batches, 4), expected)
    assert all(recording is not None for recording in replayed._recorded.values())


def test_evaluation_and_answers_are_passed_on(parts, recorded):
    model, batches = parts
    replayed = GraphedLanguageModel(model)
    for _ in range(3):
        with torch.no_grad():
            DistillationModel(model)(**batches[0], num_items_in_batch=torch.tensor(1))
    model.eval()
    for _ in range(3):
        DistillationModel(model).eval()(**batches[0], num_items_in_batch=torch.tensor(1))
    assert not replayed._recorded
    assert not replayed._weights  # and gradients, memory that an encoder would never use


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_graphs_are_not_used_where_one_computes_something_else(parts, recorded, monkeypatch, caplog, broken):
    model, batches = parts
    plain = copy.deepcopy(model)
    right = getattr(cuda_graphs._Recording, broken)
    wrong = {
        "forward": lambda self, inputs: -right(self, inputs),
        "backward": lambda self, gradient: right(self, 2 * gradient),
    }[broken]
    monkeypatch.setattr(cuda_graphs._Recording, broken, wrong)
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, batches, 4), steps(plain, batches, 4))
    logger.removeHandler(caplog.handler)
    assert "without CUDA graphs, because recording failed: a graph computes something else" in caplog.text
    assert not any(replayed._recorded.values())


@pytest.mark.parametrize("why", ["released", "moved"])
def test_released_graphs_are_recorded_anew_and_those_of_weights_that_have_moved(parts, recorded, why):
    model, batches = parts
    plain = copy.deepcopy(model)
    replayed = GraphedLanguageModel(model)
    found = steps(model, batches, 2)
    if why == "released":
        replayed.clear()
    else:
        for one in model.parameters():
            one.data = one.data.clone()
    found += steps(model, batches, 2)
    assert any(replayed._recorded.values())
    assert_same(found, steps(plain, batches, 4))


def shapes_in_turn(batches):
    """Of two shapes, the first of which is met again after the other has been recorded."""
    return [batches[0], batches[2], batches[1], batches[0], batches[1]]


def test_graphs_give_way_to_batches_of_other_shapes_and_are_recorded_anew(parts, recorded, monkeypatch):
    model, batches = parts
    plain = copy.deepcopy(model)
    asked = []
    monkeypatch.setattr(cuda_graphs, "_has_room", lambda size: asked.append(size) is not None)
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    reserved = iter(range(0, 100_000, 1000))
    monkeypatch.setattr(cuda_graphs, "_bytes_in_use", lambda: next(reserved))
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, shapes_in_turn(batches), 3), steps(plain, shapes_in_turn(batches), 3))
    tokens = [-(-one["input_ids"].shape[1] // 8) for one in batches]
    in_proportion = 2 * 1000 * tokens[1] / tokens[0]  # to the batch that has no graph
    assert [size for size in asked if size] == [in_proportion]
    assert len({id(one.grad) for one in replayed._weights.values()}) == len(replayed._weights)
    assert all(replayed._trained[name].grad is one.grad for name, one in replayed._weights.items())  # not twice
    assert all(replayed._recorded.values())
    assert len(replayed._recorded) == 2


def test_graphs_end_where_others_do_not_fit_beside_them_again_and_again(parts, recorded, monkeypatch, caplog):
    model, batches = parts
    plain = copy.deepcopy(model)
    monkeypatch.setattr(cuda_graphs, "_has_room", lambda size: False)
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    monkeypatch.setattr(cuda_graphs, "_SHAPES", 1)
    monkeypatch.setattr(cuda_graphs, "_RELEASES", 2)
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, shapes_in_turn(batches), 3), steps(plain, shapes_in_turn(batches), 3))
    logger.removeHandler(caplog.handler)
    assert "without CUDA graphs from here on" in caplog.text
    assert not any(replayed._recorded.values())


def test_longer_batches_are_recorded_before_shorter_ones(parts, recorded, monkeypatch):
    """Recorded the other way round, they would take the sum of their memory."""
    model, (long, short, _) = parts
    plain = copy.deepcopy(model)
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    monkeypatch.setattr(cuda_graphs, "_has_room", lambda size: False)
    order, record = [], GraphedLanguageModel._record
    monkeypatch.setattr(
        GraphedLanguageModel, "_record", lambda self, *what: order.append(what[0]) or record(self, *what)
    )
    replayed = GraphedLanguageModel(model)
    batches = [short, short, long, long, short, long]
    assert_same(steps(model, batches, 2), steps(plain, batches, 2))
    less, more = replayed._recorded
    assert order == [less, more, less]


def test_a_batch_whose_graph_does_not_fit_is_computed_without(parts, recorded, monkeypatch, caplog):
    model, batches = parts
    plain = copy.deepcopy(model)
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    is_right = GraphedLanguageModel._is_right

    def full(self, recording, inputs):
        if inputs["position_ids"].shape[-1] > batches[1]["input_ids"].shape[1] + 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return is_right(self, recording, inputs)

    monkeypatch.setattr(GraphedLanguageModel, "_is_right", full)
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, batches, 4), steps(plain, batches, 4))
    logger.removeHandler(caplog.handler)
    assert caplog.text.count("are not replayed: memory does not suffice") == 1
    assert len(replayed._recorded) == 1
    assert all(replayed._recorded.values())
    assert replayed._too_many < math.inf
    replayed.clear()  # as for smaller micro-batches, which are tried anew
    assert replayed._too_many == math.inf


def test_shapes_as_long_as_one_that_did_not_fit_are_not_tried(parts, recorded, monkeypatch):
    model, batches = parts
    plain = copy.deepcopy(model)
    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    replayed = GraphedLanguageModel(model)
    found = steps(model, batches[:2], 1)  # meets both shapes
    long, _ = replayed._recorded
    replayed._too_many = cuda_graphs._tokens({"position_ids": batches[0]["input_ids"]})
    found += steps(model, batches[:2], 2)
    assert_same(found, steps(plain, batches[:2], 3))
    assert [shape for shape, one in replayed._recorded.items() if one is None] == [long]


def test_gradients_that_do_not_fit_leave_none_behind(parts, recorded, monkeypatch):
    """A graph would not add to what some weights lack."""
    model, batches = parts
    plain = copy.deepcopy(model)
    made, zeros = [], torch.zeros_like

    def few(one, **options):
        made.append(one)
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(one, **options)

    monkeypatch.setattr(cuda_graphs, "_MULTIPLE", 8)
    monkeypatch.setattr(cuda_graphs.torch, "zeros_like", few)
    replayed = GraphedLanguageModel(model)
    assert_same(steps(model, shapes_in_turn(batches), 3), steps(plain, shapes_in_turn(batches), 3))
    assert any(replayed._recorded.values())
    assert all(one.grad is not None for one in replayed._weights.values())


def test_memory_errors_of_all_libraries_are_known():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: operation not permitted when stream is capturing"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_recording_that_fails_leaves_stream_and_random_numbers_as_they_were():
    stream, ones = torch.cuda.current_stream(), torch.ones(4, device=DEVICE)
    torch.manual_seed(0)
    expected = torch.rand(8, device=DEVICE)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        record(lambda: torch.rand(8, device=DEVICE).sum().item())
    assert torch.cuda.current_stream() == stream
    assert torch.rand(8, device=DEVICE).equal(expected)
    large = torch.empty(64 << 20, device=DEVICE)
    held = torch.cuda.memory_reserved()
    del large
    torch.cuda.empty_cache()  # would keep it if the allocator recorded still
    assert torch.cuda.memory_reserved() < held
    graph = record(lambda: ones.add_(1))
    graph.replay()
    assert ones.tolist() == [2] * 4
