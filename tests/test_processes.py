"""Several processes train what one does: the same steps, the same losses, the same weights, to rounding."""

import json
import shutil

import pytest
import torch
from conftest import change, launch, run_stage
from safetensors.torch import load_file

from firstsight.core.errors import UserError
from firstsight.core.params import Optimisation
from firstsight.training.fit import micro_batches


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree(smoke_copy, processes):
    # 33 samples: steps of 8, the last of 1, for which most processes get nothing but filling.
    change(smoke_copy, "train", batch_size=4, gradient_accumulation_steps=2, epochs=2)
    run_stage(smoke_copy, "distill")
    folder = smoke_copy / "models/student-distilled"
    alone = load_file(folder / "model.safetensors")
    history = json.loads((folder / "history.json").read_text())
    shutil.rmtree(folder)
    done = launch(smoke_copy, processes, "-m", "stages.distill")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("running on the CPU") == processes
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, alone[name], atol=2e-5, rtol=1e-4)
    rows = json.loads((folder / "history.json").read_text())
    assert [row.keys() for row in rows] == [row.keys() for row in history]
    for row, expected in zip(rows, history, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    leftovers = [*(smoke_copy / "models").glob(".*"), *(smoke_copy / ".scratch").iterdir()]
    assert leftovers == []


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (8, 4, 2, (8, 2)), (8, 1, 4, (2, 1)), (6, 3, 2, (3, 3)), (2, 8, 8, (2, 1)), (1, 16, 4, (1, 4))],
)
def test_a_step_is_shared_out_evenly(settings, batch_size, accumulation, processes, expected):
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    shares = Optimisation(**values | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation})
    assert micro_batches(shares, processes) == expected


def test_a_step_that_cannot_be_shared_is_refused(settings):
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    with pytest.raises(UserError, match=r"a multiple of the 3 processes, found 4 x 2"):
        micro_batches(Optimisation(**values | {"batch_size": 4, "gradient_accumulation_steps": 2}), 3)
