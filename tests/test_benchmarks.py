"""Benchmarks compare what computes the same."""

import pytest

from benchmarks import loss


def test_the_losses_side_by_side_agree(monkeypatch):
    monkeypatch.setattr(loss, "STUDENT", (311, 24))
    monkeypatch.setattr(loss, "TEACHER", (337, 40))
    monkeypatch.setattr(loss, "SHARED", 307)
    plain, ours = (loss.measure(name, 9, "cpu")["loss"] for name in ("plain PyTorch", "FirstSight"))
    assert ours == pytest.approx(plain, rel=1e-5)
    assert set(loss.implementations("cpu")) == {"plain PyTorch", "Liger, chunked", "FirstSight"}
