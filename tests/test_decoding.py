"""Decoding over a static cache gives what decoding over one that grows gives, for every architecture."""

import logging
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import make_sample
from families import SAVE
from torch.utils._python_dispatch import TorchDispatchMode

from firstsight.generation import answering, decoding
from firstsight.generation.answering import generate, generated_answers, model_inputs
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor

ASKED = [("What is in your left hand?", "a cup"), ("How many?", "two"), ("Is there anything blue, or green?", "no")]
# What makes the CPU wait for the GPU, in the middle of which no graph can be recorded.
READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)


@pytest.fixture(scope="module", params=SAVE)
def asked(request, settings, processor, tmp_path_factory):
    """A tiny model in float32, its processor, and questions of which samples share prefixes, and some are longer."""
    folder = tmp_path_factory.mktemp(request.param)
    SAVE[request.param](folder, settings, processor)
    kinds = {"none": 0} if request.param == "Qwen2ForCausalLM" else {"none": 0, "image": 1, "video": 4}
    samples = [make_sample(kind, kind, n, ASKED[:2] if n == 1 else ASKED) for kind, n in kinds.items()]
    questions = [(sample, record) for sample in samples for record in sample.records]
    return load_model(folder, "float32", "cpu"), load_processor(folder), questions


@pytest.mark.parametrize("size", [1, 4, 8])
def test_answers_tokens_and_states_are_the_same(asked, monkeypatch, size):
    model, processor, questions = asked
    whole = list(generated_answers(model, processor, questions, size, 9, static=False))
    # Tokens in the midst of two answers end others too, so that lengths differ.
    monkeypatch.setattr(model.generation_config, "eos_token_id", [whole[0].tokens[2], whole[-1].tokens[5]])
    expected, found = (
        list(generated_answers(model, processor, questions, size, 9, static=static)) for static in (False, True)
    )
    assert len({len(answer.tokens) for answer in expected}) > 1
    for one, other in zip(expected, found, strict=True):
        assert (other.tokens, other.text) == (one.tokens, one.text)
        torch.testing.assert_close(other.states, one.states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_transformers_generates_the_same_from_questions_padded_on_the_left(asked, size):
    model, processor, questions = asked
    inputs = model_inputs(processor, questions[-size:], "cpu")
    expected, found = (generate(model, inputs, static=static, max_new_tokens=6) for static in (False, True))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("broken", [False, True])
def test_a_graph_that_answers_otherwise_is_noticed_in_the_first_batch_and_not_used(asked, monkeypatch, caplog, broken):
    """Simulated by states that are turned around from the third token on, in the place of a graph's."""
    model, processor, questions = asked
    expected = [answer.tokens for answer in generated_answers(model, processor, questions, 4, 9, static=False)]
    compute, steps = decoding.StaticDecoder.step, []

    def step(decoder, tokens, positions):
        steps.append(decoder)
        states = compute(decoder, tokens, positions)
        return -states if broken and steps.count(decoder) > 1 else states

    monkeypatch.setattr(decoding.StaticDecoder, "step", step)
    monkeypatch.setattr(answering, "records_steps", lambda model: True)
    monkeypatch.setattr(answering, "_recorded_alike", WeakKeyDictionary())
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    found = [answer.tokens for _ in range(2) for answer in generated_answers(model, processor, questions, 4, 9)]
    logger.removeHandler(caplog.handler)
    assert found == 2 * expected
    batches = -(-len(questions) // 4)
    assert len(set(steps)) == (1 if broken else 2 * batches)
    assert ("because the CUDA graph answers otherwise" in caplog.text) == broken


class NothingRead(TorchDispatchMode):
    """Fail where a tensor's value is read by the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READS
        return function(*args, **kwargs or {})


def test_a_step_can_be_recorded(asked, monkeypatch):
    """It reads no tensor's value, and changes none of the inputs' addresses."""
    model, processor, questions = asked
    compute = decoding.StaticDecoder._compute
    addresses = set()

    def watched(decoder):
        fixed = decoder._tokens, decoder._positions, decoder._mask, decoder._cache.layers[0].keys
        addresses.add(tuple(tensor.data_ptr() for tensor in fixed))
        with NothingRead():
            return compute(decoder)

    monkeypatch.setattr(decoding.StaticDecoder, "_compute", watched)
    list(generated_answers(model, processor, questions[-2:], 2, 5, static=True))
    assert len(addresses) == 1


def test_a_step_that_cannot_be_recorded_is_tried_once(asked, monkeypatch):
    model, processor, questions = asked
    tried, made = [], decoding.StaticDecoder.__init__

    def on_a_gpu(decoder, model, *arguments):
        made(decoder, model, *arguments)
        decoder._records = model not in decoding._unrecordable

    def failing(work):
        tried.append(work)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decoding, "_unrecordable", set())
    monkeypatch.setattr(decoding.StaticDecoder, "__init__", on_a_gpu)
    monkeypatch.setattr(decoding, "record", failing)
    expected, found = (
        [answer.tokens for answer in generated_answers(model, processor, questions, 2, 9, static=static)]
        for static in (False, True)
    )
    assert found == expected
    assert len(questions) > 2
    assert len(tried) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_same_answers(asked):
    model, processor, questions = asked
    model = model.to("cuda")
    try:
        assert decoding.records_steps(model)
        expected, found = (
            [answer.tokens for answer in generated_answers(model, processor, questions, 4, 9, static=static)]
            for static in (False, True)
        )
        assert found == expected
    finally:
        model.to("cpu")


def test_on_the_cpu_the_cache_grows(asked):
    model, _, _ = asked
    assert not decoding.records_steps(model)
    assert not decoding.compiles_steps(model)
