"""The precision of models and of training follows from what the device computes."""

import logging

import pytest
import torch

from firstsight.core.errors import UserError
from firstsight.models.device import TRAINING_PRECISIONS, auto_dtype, has_bfloat16, pick_device, training_precision


@pytest.fixture
def log(caplog):
    """What stages say, which does not reach the root logger."""
    logger = logging.getLogger("firstsight")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def gpu(monkeypatch, request):
    """A GPU of the given compute capability, as far as PyTorch says what there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")


@pytest.mark.parametrize("gpu", [(8, 0), (8, 9), (9, 0), (12, 0)], indirect=True)
def test_gpus_since_ampere_compute_in_bfloat16(gpu, log):
    assert auto_dtype("cuda") == torch.bfloat16
    assert {method: training_precision(method, "cuda") for method in TRAINING_PRECISIONS} == TRAINING_PRECISIONS
    assert (pick_device("auto"), log.messages) == ("cuda", ["running on some GPU"])


@pytest.mark.parametrize("gpu", [(7, 0), (7, 5)], indirect=True)
def test_older_gpus_answer_in_float16_and_train_in_float32_with_a_line(gpu, log):
    assert (auto_dtype("cuda"), has_bfloat16("cuda")) == (torch.float16, False)
    assert {training_precision(method, "cuda") for method in ("full", "lora", "adalora")} == {"float32"}
    assert pick_device("auto") == "cuda"
    assert log.messages[1:] == ["it computes no bfloat16: precision auto is float16, and training computes in float32"]
    with pytest.raises(UserError, match=r"on some GPU, which computes no bfloat16, found qlora; set method to lora"):
        training_precision("qlora", "cuda")


def test_the_cpu_computes_in_float32():
    assert (auto_dtype("cpu"), has_bfloat16("cpu")) == (torch.float32, False)
    assert {method: training_precision(method, "cpu") for method in TRAINING_PRECISIONS} == TRAINING_PRECISIONS
