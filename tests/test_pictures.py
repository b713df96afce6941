"""The report's pictures, of question types and samples in any script."""

import re
import warnings

import pandas as pd
import pytest
from conftest import make_sample
from matplotlib import pyplot as plt

from firstsight.reporting import figures, fonts
from firstsight.reporting.contact_sheet import contact_sheet

# In DejaVu Sans, which matplotlib brings, and in no font at all.
DRAWN = ["what is held", "тип", "νέο", "ید", "$x_1$"]
UNASSIGNED = "\U000e1234"
SCRIPTS = [*DRAWN, "手里", "हाथ", "손", "🖐", UNASSIGNED, "same words " * 9 + "one", "样" * 60]


@pytest.fixture
def labels(monkeypatch, tmp_path):
    """The question types as the picture has them, of types drawn without a warning."""

    def draw(kinds):
        shown = []
        monkeypatch.setattr(plt, "close", lambda figure: shown.append(figure))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row = {"variant": "teacher", "exact_match": 0.5, "low": 0.4, "high": 0.6, "questions": 3}
            figures.by_type(pd.DataFrame([{"type": kind, **row} for kind in kinds]), tmp_path / "types.png")
        return [label.get_text() for label in shown[0].axes[0].get_yticklabels()]

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_question_types_of_any_script_can_be_read(labels):
    shown = dict(zip(sorted(SCRIPTS), labels(SCRIPTS), strict=True))
    for kind in DRAWN:
        assert shown[kind] == f"{kind} (3)"
    assert shown[UNASSIGNED] == r"\U000e1234 (3)"
    assert all(len(label) <= len(" (3)") + 40 for label in shown.values())
    assert shown["same words " * 9 + "one"].startswith("same words same words")


def test_what_no_font_has_is_escaped(monkeypatch):
    monkeypatch.setattr(fonts, "families", lambda: ("DejaVu Sans",))
    assert fonts.drawable("тип 手 of 🖐") == r"тип \u624b of \U0001f590"


def test_a_contact_sheet_draws_other_scripts():
    """Two answers of which a font without their letters makes the same boxes."""
    one, other = (
        contact_sheet([make_sample("Имя", "image", 1, [("手里?", answer)])], columns=1) for answer in ("рука", "нога")
    )
    assert one.tobytes() != other.tobytes()
    assert not re.search(r"[^\x00-\x7f]", fonts.drawable(UNASSIGNED))
