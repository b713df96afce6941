"""A short campaign of kills, with real DVC; `make torture` is the long one."""

import pytest

from benchmarks import torture
from benchmarks.torture import Kill
from firstsight.core.errors import UserError


@pytest.mark.system
@pytest.mark.slow
def test_a_pipeline_that_is_killed_three_times_ends_as_one_that_is_not(smoke, tmp_path):
    project = torture.new_project(tmp_path.resolve() / "project")
    kills = [
        Kill("build-egoqa-dataset", 0.2, "the stage"),
        Kill("finetune-teacher", 1.0, "DVC alone, told to end"),
        Kill("distill", 0.9, "everything"),
    ]
    seconds = dict.fromkeys([kill.stage for kill in kills], 6.0)
    # No further than the last stage that is killed.
    assert len(torture.campaign(project, kills, seconds, last="distill")) == len(kills)
    made, expected = torture.outcome(project), torture.outcome(smoke)
    assert "models/student-distilled/model.safetensors" in made
    torture.compare({name: expected.get(name) for name in made}, made)


def test_another_outcome_and_what_is_left_behind_are_found(tmp_path):
    for name in ("models/student/model.safetensors", "evaluations/student/performance.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("as it was")
    expected = torture.outcome(tmp_path)
    assert list(expected) == ["models/student/model.safetensors"]  # no timings
    (tmp_path / "models/student/model.safetensors").write_text("another")
    with pytest.raises(UserError, match=r"found others: models/student/model.safetensors"):
        torture.compare(expected, torture.outcome(tmp_path))
    (tmp_path / "models/.student.0.partial").mkdir()
    (tmp_path / ".scratch/distill-0").mkdir(parents=True)
    assert set(torture.leftovers(tmp_path)) == {"models/.student.0.partial", ".scratch/distill-0"}
