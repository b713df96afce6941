"""Evaluation: batches answer as single questions do, what is measured, what is left out, and what is refused."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import change, make_sample, run_stage
from transformers import GenerationConfig

from firstsight.acquisition.initialise import build_model
from firstsight.core.errors import UserError
from firstsight.core.stage import log
from firstsight.core.variants import LEFT_OUT
from firstsight.evaluation.answer_limit import answer_limit
from firstsight.generation import answering
from firstsight.generation.answering import answers, model_inputs
from firstsight.generation.order import by_length
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.footprint import token_bytes
from firstsight.profiling import cost
from firstsight.profiling.peak_memory import PeakMemory
from firstsight.records.parquet import SplitWriter
from firstsight.records.sample import Record
from stages import evaluate

ASKED = [("What is in your left hand?", "a cup"), ("How many?", "two"), ("Is there anything blue, or green?", "no")]
SAMPLES = [
    make_sample("image", "image", 1, ASKED),
    make_sample("frames", "frames", 3, ASKED[:1]),
    make_sample("video", "video", 4, ASKED),
    make_sample("text", "none", 0, ASKED[:2]),
]


def generated(model, processor, question, tokens=6):
    """The answer to one question alone, by transformers."""
    found = answering.generate(model, model_inputs(processor, [question], "cpu"), max_new_tokens=tokens)
    return processor.batch_decode(found, skip_special_tokens=True)[0].strip()


def test_a_batch_of_questions_about_shared_media_is_answered_as_each_alone_by_transformers(model, processor):
    questions = [(sample, record) for sample in SAMPLES for record in sample.records]
    alone = [generated(model, processor, question) for question in questions]
    assert len(set(alone)) > 3  # they do not all say the same
    for size in (1, 2, 5, len(questions)):
        assert list(answers(model, processor, questions, size, 6)) == alone
    # A sample's questions may also lie apart.
    apart = [*range(0, len(questions), 2), *range(1, len(questions), 2)]
    assert list(answers(model, processor, [questions[n] for n in apart], 5, 6)) == [alone[n] for n in apart]


@pytest.mark.parametrize("static", [False, True])
def test_an_answer_ends_where_the_model_says_so_or_the_tokenizer(model, processor, monkeypatch, static):
    questions = [(sample, record) for sample in SAMPLES[:2] for record in sample.records]
    whole = [answering._decode(model, processor, [question], 6, static)[0][0] for question in questions]
    first, second = whole[0][1], whole[1][2]
    ended = [
        tokens[: min((tokens.index(end) + 1 for end in (first, second) if end in tokens), default=6)]
        for tokens in whole
    ]
    assert ended != whole
    monkeypatch.setattr(model.generation_config, "eos_token_id", [first])
    processor = copy.deepcopy(processor)
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(second)
    tokens, states = answering._decode(model, processor, questions, 6, static)
    assert tokens == ended
    assert list(map(len, states)) == list(map(len, tokens))
    contents = [one[:-1] if one[-1] in (first, second) else one for one in ended]
    assert answering.answer_texts(model, processor, tokens) == [
        text.strip() for text in processor.batch_decode(contents, skip_special_tokens=True)
    ]


def test_decoding_is_greedy_whatever_a_model_asks_for(model, processor, monkeypatch):
    questions = [(sample, record) for sample in SAMPLES for record in sample.records]
    before = list(answers(model, processor, questions, 4, 12))
    ends = model.generation_config.eos_token_id
    asked = GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=3.0, num_beams=3, eos_token_id=ends)
    monkeypatch.setattr(model, "generation_config", asked)
    said = []
    monkeypatch.setattr(answering.log, "info", lambda text, *values: said.append(text % values))
    answering._say_ignored.cache_clear()
    assert list(answers(model, processor, questions, 4, 12)) == before
    assert list(answers(model, processor, questions[:1], 1, 12)) == before[:1]
    (line,) = said
    assert line.endswith("generation_config.json's num_beams 3, repetition_penalty 3.0, do_sample True")
    assert [generated(model, processor, question, 12) for question in questions] == before
    assert model.generation_config is asked


def test_the_longest_questions_are_asked_first_and_answered_in_their_own_order(model, processor, settings, tmp_path):
    questions = [(sample, record) for sample in SAMPLES for record in sample.records]
    order = by_length(questions)
    assert [questions[number][0].id for number in order] == ["video"] * 3 + ["frames"] + ["image"] * 3 + ["text"] * 2
    assert order[:3] == [4, 5, 6]
    wanted = settings.evaluate.model_copy(update={"batch_size": 4, "max_new_tokens": 6})
    found = evaluate.answer("teacher", PyTorchModel(model, processor, "float32"), questions, wanted, tmp_path)
    assert found == [generated(model, processor, question) for question in questions]


def test_speed_is_measured_on_the_answers_asked_for(model, processor, settings, monkeypatch):
    made, clock = [], [0.0]

    generate = answering.generate

    def noted(*given, **limits):
        produced = generate(*given, **limits)
        made.append(tuple(produced.shape))
        clock[0] += 0.003 + 0.002 * produced.shape[1]
        return produced

    monkeypatch.setattr(answering, "generate", noted)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    measured = PyTorchModel(model, processor, "float32")
    wanted = settings.evaluate.model_copy(
        update={"latency_runs": 3, "latency_new_tokens": 5, "throughput_batch_sizes": [2, 7]}
    )
    questions = [(sample, sample.records[0]) for sample in SAMPLES[:2]]
    found = cost.measure_latency(measured, questions, wanted)
    rounds = 6  # one to warm up, five that count
    assert made == ([(1, 1)] * 3 + [(1, 5)] * 3) * rounds
    many = [(sample, None) for sample in [*SAMPLES[:2] * 20, SAMPLES[2], *SAMPLES[:2] * 20]]
    asked = cost.representative(many, 5)
    assert [sample.id for sample, _ in asked] == ["image", "image", "image", "frames", "video"]
    milliseconds = {"prefill_ms_p50": 5, "latency_ms_p50": 13, "latency_ms_p90": 13, "token_ms": 2}
    assert found == pytest.approx(milliseconds | {"decode_tokens_per_second": 500, "latency_spread": 0})
    made.clear()
    together = cost.measure_throughput(measured, questions, wanted, PeakMemory("cpu"))
    assert made == [(2, 5)] * rounds + [(7, 5)] * rounds
    found = {size: one["answers_per_second"] for size, one in together.items()}
    assert found == pytest.approx({"2": 2 / 0.013, "7": 7 / 0.013})


@pytest.mark.parametrize(("one_pass", "token_ms"), [(False, 2.0), (True, 16.0)])
def test_a_token_takes_as_long_as_the_answer_where_that_is_one_pass(settings, monkeypatch, one_pass, token_ms):
    monkeypatch.setattr(cost, "_timed", lambda model, inputs, tokens: 6.0 + 2 * tokens)
    wanted = settings.evaluate.model_copy(update={"latency_runs": 2, "latency_new_tokens": 5})
    questions = [(sample, sample.records[0]) for sample in SAMPLES[:2]]
    found = cost.measure_latency(SimpleNamespace(inputs=len), questions, wanted, one_pass=one_pass)
    assert (found["prefill_ms_p50"], found["latency_ms_p50"], found["token_ms"]) == (8.0, 16.0, token_ms)
    assert found["decode_tokens_per_second"] == 1000 / token_ms


def test_a_token_reads_language_model_and_head_once(model, settings, processor):
    """And no vision tower, and of an embedding that is not the head only a row."""
    language = sum(one.numel() for one in model.model.language_model.parameters())
    buffers = sum(one.nbytes for one in model.model.language_model.buffers())
    for tied in (True, False):
        init = settings.models.teacher.init.model_copy(update={"tie_word_embeddings": tied})
        made = build_model(init, processor.tokenizer)
        assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
        assert token_bytes(made) == 4 * language + buffers  # the head is as large as the embedding
        measured = PyTorchModel(made, processor, "float32")
        # At 1 TB/s and at 0.1 GB/s.
        assert measured.token_bytes / 1e9 < cost.token_limit_ms(measured) < measured.token_bytes / 1e5


def test_a_batch_that_does_not_fit_is_left_out(model, processor, settings, monkeypatch):
    def full(_, inputs, **limits):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return torch.zeros(2, 1)

    monkeypatch.setattr(answering, "generate", full)
    measured = PyTorchModel(model, processor, "float32")
    wanted = settings.evaluate.model_copy(update={"throughput_batch_sizes": [2, 4]})
    question = (SAMPLES[0], SAMPLES[0].records[0])
    assert list(cost.measure_throughput(measured, [question], wanted, PeakMemory("cpu"))) == ["2"]


def test_peak_memory_is_what_was_held_at_most_and_not_at_the_end():
    memory = PeakMemory("cpu")
    held = torch.ones(50_000_000)
    del held
    assert 190e6 < memory.peak() < 260e6
    memory.reset()
    assert memory.peak() < 100e6


def test_peak_memory_counts_tensors_that_fill_what_the_allocator_kept():
    torch.ones(4_000_000)  # once freed, glibc takes tensors up to this size from its heap instead of mapping them
    tensors = [torch.ones(3_000_000) for _ in range(20)]
    above = [torch.ones(3_000_000) for _ in range(2)]  # the heap does not shrink below these
    del tensors
    memory = PeakMemory("cpu")
    held = torch.ones(50_000_000)
    del held
    assert 190e6 < memory.peak() < 260e6
    del above


@pytest.mark.system
def test_a_method_that_is_not_asked_for_is_left_out_and_comes_when_it_is(smoke_copy):
    evaluations = smoke_copy / "evaluations"
    for name in ("teacher-int8", "teacher-nf4", "teacher-int4", "student-int8", "student-int4"):
        assert [path.name for path in (evaluations / name).iterdir()] == [LEFT_OUT]
    assert "student-int8" not in json.loads((smoke_copy / "metrics/quality.json").read_text())
    change(smoke_copy, "quantize", methods=["int8", "nf4"])
    change(smoke_copy, "evaluate", teacher_methods=["int8"])
    for stage in (
        ("quantize_student", "int8"),
        ("evaluate", "student-int8"),
        ("evaluate", "teacher-int8"),
        ("report",),
    ):
        run_stage(smoke_copy, *stage)
    performance = json.loads((smoke_copy / "metrics/performance.json").read_text())
    assert list(performance) == [
        "teacher",
        "teacher-int8",
        "student",
        "student-finetuned",
        "student-distilled",
        "student-int8",
        "student-nf4",
        "student-onnx-w4a8",
    ]
    # Loaded from the same files, and smaller.
    assert performance["teacher-int8"]["disk_bytes"] == performance["teacher"]["disk_bytes"]
    assert performance["teacher-int8"]["weights_bytes"] < performance["teacher"]["weights_bytes"]
    assert set(json.loads((smoke_copy / "metrics/quantization.json").read_text())) == {"int8", "nf4"}


@pytest.mark.system
def test_an_evaluation_that_was_ended_goes_on_where_it_was(smoke_copy, monkeypatch):
    change(smoke_copy, "evaluate", batch_size=8)
    run_stage(smoke_copy, "evaluate", "teacher")
    whole = (smoke_copy / "evaluations/teacher/predictions.json").read_bytes()
    asked = []

    def ended(model, processor, questions, batch_size, tokens):
        for answer in answers(model, processor, questions, batch_size, tokens):
            asked.append(answer)
            if len(asked) == 20:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr("firstsight.generation.answering.answers", ended)
    with pytest.raises(KeyboardInterrupt):
        run_stage(smoke_copy, "evaluate", "teacher")
    asked.clear()
    monkeypatch.setattr(
        "firstsight.generation.answering.answers", lambda *given: (asked.extend(given[2]), answers(*given))[1]
    )
    run_stage(smoke_copy, "evaluate", "teacher")
    questions = json.loads((smoke_copy / "metrics/quality.json").read_text())["teacher"]["questions"]
    assert len(asked) == questions - 16  # two batches of eight were kept
    assert (smoke_copy / "evaluations/teacher/predictions.json").read_bytes() == whole
    assert not list((smoke_copy / ".scratch").iterdir())


@pytest.mark.system
def test_answers_of_nothing_are_wrong_and_reported(smoke_copy, monkeypatch):
    monkeypatch.setattr(
        "firstsight.generation.answering.answers", lambda model, processor, questions, *_: ("" for _ in questions)
    )
    for variant in ("teacher", "student-distilled"):
        run_stage(smoke_copy, "evaluate", variant)
    run_stage(smoke_copy, "report")
    quality = json.loads((smoke_copy / "metrics/quality.json").read_text())
    assert quality["student-distilled"]["exact_match"] == 0
    assert quality["student-distilled"]["teacher_agreement"] == 1
    assert "retention" not in quality["student-distilled"]
    assert "(nothing)" in (smoke_copy / "metrics/report.html").read_text()


@pytest.fixture
def said(caplog):
    """What the stages' own log says."""
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


def test_true_answers_longer_than_the_limit_are_counted(model, processor, said):
    def question(*answers, options=()):
        return Record("r", "What?", answers[0], answers, "open", options)

    def tokens(text):
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    counts = PyTorchModel(model, processor, "float32").token_counts
    short, long, longer = "cup", "a red cup on the table", "红色的杯子 in my left hand 👍🏽"
    records = [question(short), question(long), question(short, longer), question("B", options=(longer * 2, long))]
    assert tokens(short) < tokens(long) < tokens(longer)
    assert answer_limit(counts, records, tokens(longer)) == tokens(longer)
    assert said.text == ""
    assert answer_limit(counts, records, tokens(short)) == tokens(short)
    assert (
        f"2 of 4 questions with one of more than {tokens(short)} tokens, the longest of {tokens(longer)}" in said.text
    )
    # Room for an answer that is longer than all, which would else be cut to one of them.
    assert answer_limit(counts, records[:1], None) == tokens(short) + 1
    assert answer_limit(counts, records[:3], None) == tokens(longer) + 1
    assert answer_limit(counts, records, None) == tokens(f"(A) {longer * 2}") + 1


@pytest.mark.system
def test_a_model_that_knows_all_is_right_where_the_data_set_the_limit(smoke_copy, monkeypatch, said):
    def known(model, processor, questions, batch_size, tokens):
        ids = [processor.tokenizer(record.answer, add_special_tokens=False)["input_ids"] for _, record in questions]
        return iter(processor.batch_decode([one[:tokens] for one in ids]))

    monkeypatch.setattr("firstsight.generation.answering.answers", known)
    found = {}
    for limit in (1, None):
        change(smoke_copy, "evaluate", max_new_tokens=limit)
        run_stage(smoke_copy, "evaluate", "student")
        found[limit] = json.loads((smoke_copy / "evaluations/student/quality.json").read_text())["exact_match"]
        assert ("evaluate.max_new_tokens: expected room for every true answer" in said.text) == (limit == 1)
        said.clear()
    assert found[1] < found[None] == 1


def test_an_empty_test_split_is_refused_before_a_model_is_loaded(smoke_copy, monkeypatch):
    with SplitWriter(smoke_copy / "data/egoqa/test.parquet"):
        pass
    monkeypatch.setattr("firstsight.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"test\.parquet: expected questions, found none; raise data\.test_fraction"):
        run_stage(smoke_copy, "evaluate", "student")


def missing(folder):
    shutil.rmtree(folder / "evaluations/student-distilled")
    return "evaluations/student-distilled/quality.json: expected JSON written by evaluate@student-distilled"


def older(folder):
    path = folder / "evaluations/student/performance.json"
    path.write_text(json.dumps({"latency_ms_p50": 3.0}))
    return "evaluations/student: expected the figures of this version, found None for parameters; run dvc repro eval"


def damaged(name, figure, value):
    def damage(folder):
        path = folder / f"evaluations/student/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {figure: value}))
        return f"evaluations/student: expected the figures of this version, found {value!r} for {figure}; run dvc repro"

    damage.__name__ = f"{figure}={value}"
    return damage


def no_teacher(folder):
    shutil.rmtree(folder / "evaluations/teacher")
    (folder / "evaluations/teacher").mkdir()
    (folder / "evaluations/teacher" / LEFT_OUT).write_text('"so"')
    return "evaluations/teacher/quality.json: expected JSON written by evaluate@teacher"


def no_answer(folder):
    path = folder / "evaluations/teacher/predictions.json"
    answers = json.loads(path.read_text())
    answers[3]["answer"] = None
    path.write_text(json.dumps(answers))
    return "evaluations/teacher/predictions.json: expected answers to the 48 questions of data/egoqa/test.parquet, fou"


def other_questions(folder):
    path = folder / "evaluations/teacher/predictions.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    return "evaluations/teacher/predictions.json: expected answers to the 48 questions of data/egoqa/test.parquet, fou"


def other_answers(folder):
    path = folder / "evaluations/student/quality.json"
    quality = json.loads(path.read_text())
    path.write_text(json.dumps(quality | {"exact_match": quality["exact_match"] + 1 / 48}))
    return "evaluations/student/quality.json: expected the figures of predictions.json, "


DAMAGES = [
    missing,
    older,
    other_questions,
    no_teacher,
    no_answer,
    other_answers,
    damaged("quality", "f1", float("nan")),
    damaged("quality", "f1_low", None),
    damaged("performance", "latency_ms_p50", "fast"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_report_of_what_does_not_belong_together_is_refused(smoke_copy, damage):
    expected = damage(smoke_copy)
    before = (smoke_copy / "metrics/quality.json").read_bytes()
    with pytest.raises(UserError) as error:
        run_stage(smoke_copy, "report")
    assert expected in str(error.value)
    assert (smoke_copy / "metrics/quality.json").read_bytes() == before
