"""The benchmark of language models with published weights, at its smallest scale, with a tiny random model."""

import pytest
import torch
from text_families import TEXT_SAVE
from transformers import AutoModelForCausalLM

from benchmarks import text


@pytest.fixture
def teacher(settings, processor, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    TEXT_SAVE["qwen2-base"](folder, settings, processor)
    return folder


def test_a_student_of_half_the_layers_has_every_second_one(teacher, tmp_path):
    text.halved(teacher, tmp_path / "half")
    whole, half = (AutoModelForCausalLM.from_pretrained(one) for one in (teacher, tmp_path / "half"))
    assert len(half.model.layers) == half.config.num_hidden_layers == -(-len(whole.model.layers) // 2)
    for number, layer in enumerate(half.model.layers):
        expected = whole.model.layers[2 * number].state_dict()
        assert all(value.equal(expected[name]) for name, value in layer.state_dict().items())
    assert half.lm_head.weight.equal(whole.lm_head.weight)
    # The layers' places in a cache are their own.
    ids = torch.tensor([[5, 6, 7]])
    assert half.generate(ids, max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_students_are_compared_in_equal_steps_on_the_same_texts(teacher, tmp_path):
    for name, count in (("valid", 12), ("test", 4)):
        lines = [
            f" = {name} {n} = \n\n The cup number {n} is red , and the {name} is to its left . \n" for n in range(count)
        ]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    scale = text.Scale(
        train=8, validation=2, test=4, max_tokens=24, batch_size=2, learning_rate=1e-3, temperatures=(2.0,)
    )
    rows = list(text.wikitext(tmp_path, teacher, scale))
    assert [row["model"] for row in rows] == ["teacher", "student", "student, fine-tuned", "student, distilled"]
    assert [row["steps"] for row in rows] == [0, 0, 4, 4]
    assert {row["texts"] for row in rows} == {4}
    before, tuned, distilled = (row["perplexity"] for row in rows[1:])
    assert rows[1]["saved"] == 0
    assert rows[2]["saved"] == pytest.approx(before - tuned, abs=1e-3)
    assert rows[3]["saved"] == pytest.approx(tuned - distilled, abs=1e-3)
    assert tuned < before > distilled != tuned
    assert (rows[3]["temperature"], rows[3]["alpha"]) == (2.0, 0.5)


def test_an_unknown_part_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["text", "imagenet"])
    with pytest.raises(text.UserError, match="expected one of wikitext, found 'imagenet'"):
        text.run()
