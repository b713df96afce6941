"""Measure one variant: answer the test questions, score the answers, and measure the model's size and speed.

Of texts, it is measured how improbable the model finds them, and how it continues some of them.

    python -m stages.evaluate student-distilled

Where answers are classes, the model scores all of them, and its answer is the best; nothing is generated.

reads  the variant's model folder and data/egoqa/test.parquet, by `evaluate` in params.yaml, and a teacher's
       `targets.class_scores`
writes evaluations/{variant}/{predictions,quality,performance}.json; for a variant that params.yaml does not ask for,
       left-out.json with the reason
"""

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstsight.core import params, scratch
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, fingerprint_folder, whole_folder, write_json
from firstsight.core.processes import (
    all_cores,
    collected,
    from_main,
    is_main_process,
    share,
    shared,
    use_all_gpus,
    wait_for_all,
)
from firstsight.core.progress import progress
from firstsight.core.stage import log, main
from firstsight.core.variants import TEACHER, VARIANTS, Variant, leave_out, reason_left_out

if TYPE_CHECKING:
    from firstsight.profiling.cost import Question
    from firstsight.records.parquet import Split
    from firstsight.records.text_loss import TextLoss

TEST = Path("data/egoqa/test.parquet")


def run(name: str) -> None:
    loaded = params.load()
    reason = left_out(name, loaded.evaluate)
    if reason is None:
        evaluate(name, loaded)
        return
    leave_out(Path("evaluations") / name, reason)


def evaluate(name: str, loaded: params.Params) -> None:
    """Measure a variant and have it answer, and write its files.

    The main process measures alone, as the only one would; then all processes share the questions.
    """
    from firstsight.engine.layout import is_exported

    variant, settings = VARIANTS[name], loaded.evaluate
    if not (onnx := is_exported(variant.model)):
        use_all_gpus(loaded.runtime.device)
    # Imported here, because they take seconds, and a variant that is left out needs none of them.
    from firstsight.evaluation.answer_limit import answer_limit
    from firstsight.records.parquet import Split
    from firstsight.records.sample import Text, as_asked

    split = Split(TEST)
    records = [(sample, record) for sample in split for record in sample.records]
    questions = [(sample, as_asked(record)) for sample, record in records]
    texts = records if records and isinstance(records[0][1], Text) else []
    if not questions:
        raise UserError(f"{TEST}: expected questions, found none; raise data.test_fraction or data.test_samples")
    device, load = exported(variant, settings.engine) if onnx else in_pytorch(variant, loaded, split)
    model, performance = None, {}
    if is_main_process():
        model, performance = measure(variant, load, device, questions, settings, one_pass=bool(split.classes))
    wait_for_all()
    if model is None:
        model = load()
    if split.classes:
        predicted = classify(name, model, questions, settings.batch_size)
        if is_main_process():
            write(name, *of_classes(questions, predicted, split.classes, settings), performance)
        return
    losses = []
    if texts:
        losses = read(name, model, texts, settings.batch_size)
        questions = spread(questions, settings.continuations)
    if texts:  # the rest of a text may be longer than any continuation
        tokens = settings.asked_tokens()
    else:
        tokens = answer_limit(model.token_counts, [record for _, record in questions], settings.max_new_tokens)
    settings = settings.model_copy(update={"max_new_tokens": tokens})
    work = {}
    if is_main_process():  # for all, because large files are read
        work = {
            "model": fingerprint_folder(variant.model),
            "test": fingerprint_files([TEST]),
            "settings": settings.model_dump(),
            "device": device,
        }
    with shared(scratch.kept_folder(f"evaluate-{name}", work)) as kept:
        predicted = answer(name, model, questions, settings, kept)
    if is_main_process():
        scored = of_texts(texts, losses, questions, predicted, settings) if texts else None
        write(name, *(scored or of_answers(questions, predicted, settings)), performance)


def measure(
    variant: Variant,
    load: Callable[[], Any],
    device: str,
    questions: list["Question"],
    settings: params.Evaluate,
    *,
    one_pass: bool,
) -> tuple[Any, dict[str, Any]]:
    """Load a variant, and measure its size, latency, throughput and memory. Returns the model and the figures.

    `one_pass` says whether the model answers by one pass, as `measure_latency` takes it.
    """
    from firstsight.profiling import cost  # as in `evaluate`
    from firstsight.profiling.peak_memory import PeakMemory

    with all_cores():
        memory = PeakMemory(device)
        started = time.perf_counter()
        model = load()
        load_seconds = time.perf_counter() - started
        # Batch 1 first: memory that larger batches leave in the process would otherwise count.
        memory.reset()
        latency = cost.measure_latency(model, questions, settings, one_pass=one_pass)
        return model, {
            "parameters": model.parameters,
            "disk_bytes": cost.folder_bytes(variant.model),
            "weights_bytes": model.weights_bytes,
            "peak_bytes": memory.peak(),
            "load_seconds": load_seconds,
            **latency,
            "throughput": cost.measure_throughput(model, questions, settings, memory),
            "token_limit_ms": cost.token_limit_ms(model),  # after the peaks of memory, to which its buffers add
            **model.environment(),
        }


def of_answers(
    questions: list["Question"], predicted: list[str], settings: params.Evaluate
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the answers; return the figures, and the answers as they are written."""
    from firstsight.evaluation.quality import summarise  # as in `evaluate`

    records = [record for _, record in questions]
    groups = [sample.group for sample, _ in questions]
    quality = summarise(records, groups, predicted, settings.bootstrap_samples, settings.seed)
    return quality, [{"id": record.id, "answer": answer} for record, answer in zip(records, predicted, strict=True)]


def of_classes(
    questions: list["Question"],
    predicted: list[tuple[str, float]],
    classes: Sequence[str],
    settings: params.Evaluate,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Do the same where answers are classes, which are given with the probability of each; both are written."""
    from firstsight.evaluation.class_quality import summarise_classes  # as in `evaluate`

    labels, confidence = map(list, zip(*predicted, strict=True))
    quality, answers = of_answers(questions, labels, settings)
    truth, groups = [record.answer for _, record in questions], [sample.group for sample, _ in questions]
    resampling = settings.bootstrap_samples, settings.seed
    quality |= summarise_classes(classes, truth, labels, confidence, groups, *resampling)
    return quality, [one | {"confidence": share} for one, share in zip(answers, confidence, strict=True)]


def of_texts(
    texts: list["Question"],
    losses: list["TextLoss"],
    continued: list["Question"],
    continuations: list[str],
    settings: params.Evaluate,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the figures of the texts, and the loss of each as it is written, with its continuation if it has one."""
    from firstsight.evaluation.perplexity import summarise_texts  # as in `evaluate`

    given = [(sample.group, record, text) for (sample, record), text in zip(continued, continuations, strict=True)]
    groups = [sample.group for sample, _ in texts]
    quality = summarise_texts(losses, groups, given, settings.bootstrap_samples, settings.seed)
    by_id = {record.id: {"continuation": text} for _, record, text in given}
    return quality, [
        {"id": record.id, **asdict(loss), **by_id.get(record.id, {})}
        for (_, record), loss in zip(texts, losses, strict=True)
    ]


def write(name: str, quality: dict[str, Any], predictions: list[dict[str, Any]], performance: dict[str, Any]) -> None:
    """Write the files of a variant."""
    with whole_folder(Path("evaluations") / name) as folder:
        write_json(folder / "predictions.json", predictions)
        write_json(folder / "quality.json", quality)
        write_json(folder / "performance.json", performance)
    found = (
        f"perplexity {quality['perplexity']:.2f}, {quality['bits_per_byte']:.3f} bits per byte"
        if "perplexity" in quality
        else f"exact match {quality['exact_match']:.3f}, F1 {quality['f1']:.3f}"
    )
    log.info("%s: %s, %.1f ms an answer", name, found, performance["latency_ms_p50"])


def exported(variant: Variant, engine: str) -> tuple[str, Callable[[], Any]]:
    """Return the device of an exported model, and a function that loads the model in an engine, both without torch."""
    # Imported first, because that takes time which is not part of a model's load time.
    from firstsight.engine.class_scores import open_exported
    from firstsight.engine.runtimes import runtime

    runtime(engine)
    return "cpu", lambda: open_exported(variant.model, engine)


def in_pytorch(variant: Variant, loaded: params.Params, split: "Split") -> tuple[str, Callable[[], Any]]:
    """Return the device of a model in PyTorch, and a function that loads it, to score the split's classes if any."""
    # As above.
    from firstsight.generation.pytorch_model import ClassModel, PyTorchModel
    from firstsight.models.device import pick_device
    from firstsight.models.loading import load_model
    from firstsight.models.processors import load_processor
    from firstsight.models.quantized import stored_method
    from firstsight.packing.forward import normalisation

    device, processor = pick_device(loaded.runtime.device), load_processor(variant.model)
    stored = stored_method(variant.model)
    method = variant.quantized_on_loading
    quantized = stored or method
    if quantized and quantized != "int4":
        importlib.import_module("bitsandbytes")

    def load() -> PyTorchModel:
        # A checkpoint that is stored quantized keeps its precision.
        wanted = method or ("auto" if stored else loaded.evaluate.precision)
        model = load_model(variant.model, wanted, device, classes=split.classes)
        precision = method or stored or str(model.dtype).removeprefix("torch.")
        if split.classes:
            # A student is trained to score by sums.
            kind = loaded.targets.class_scores if variant.model == VARIANTS[TEACHER].model else "sum"
            return ClassModel(model, processor, precision, split.classes, normalisation(kind, model, processor, split))
        return PyTorchModel(model, processor, precision)

    return device, load


def left_out(name: str, settings: params.Evaluate) -> str | None:
    """Return the reason why the variant is not measured, or None if it is."""
    method = VARIANTS[name].quantized_on_loading
    if method and method not in settings.teacher_methods:
        return f"evaluate.teacher_methods is {settings.teacher_methods}, without {method}"
    return reason_left_out(VARIANTS[name].model)


def spread(questions: list["Question"], count: int) -> list["Question"]:
    """Return `count` of the questions, evenly spaced; all, if there are fewer."""
    count = min(count, len(questions))
    return [questions[number * len(questions) // count] for number in range(count)]


def read(name: str, model: Any, texts: list["Question"], size: int) -> list["TextLoss"]:
    """Return the model's loss of each text in the main process, `size` at a time; all processes share the batches."""
    from firstsight.generation.order import by_length  # as in `evaluate`

    order, losses = by_length(texts), []
    batches = [[texts[number] for number in order[start : start + size]] for start in range(0, len(order), size)]
    computed = (list(model.text_losses(batch, size)) for batch in share(batches))
    with progress(desc=f"evaluate {name}: texts", unit="texts", total=len(texts)) as shown:
        for found in collected(computed, len(batches)):
            losses += found
            shown.update(len(found))
    return [loss for _, loss in sorted(zip(order, losses, strict=is_main_process()), key=itemgetter(0))]


def answer(name: str, model: Any, questions: list["Question"], settings: params.Evaluate, kept: Path) -> list[str]:
    """Return the model's answers in the main process, after those that an interrupted run has saved in `kept`.

    All processes share the batches. The longest questions are asked first, so that batches are padded little, and
    memory runs out at once if it does.
    """
    from firstsight.generation.order import by_length  # as in `evaluate`

    order, size = by_length(questions), settings.batch_size
    path = kept / "answers-by-length.json"
    given = from_main(saved(name, path, len(questions)) if is_main_process() else [])
    remaining = [questions[number] for number in order[len(given) :]]
    batches = [remaining[start : start + size] for start in range(0, len(remaining), size)]
    answered = (list(model.answers(batch, size, settings.max_new_tokens)) for batch in share(batches))
    with progress(desc=f"evaluate {name}", unit="questions", total=len(questions), initial=len(given)) as shown:
        for texts in collected(answered, len(batches)):
            given += texts
            write_json(path, given)
            shown.update(len(texts))
    # Elsewhere than in the main process, no answers have come.
    return [text for _, text in sorted(zip(order, given, strict=is_main_process()))]


def classify(name: str, model: Any, questions: list["Question"], size: int) -> list[tuple[str, float]]:
    """Return the class and its confidence for each question, in the main process; all processes share the batches."""
    from firstsight.generation.order import by_length  # as in `evaluate`

    order = by_length(questions)
    batches = [[questions[number] for number in order[start : start + size]] for start in range(0, len(order), size)]
    given: list[tuple[str, float]] = []
    with progress(desc=f"evaluate {name}", unit="questions", total=len(questions)) as shown:
        for found in collected(map(model.classify, share(batches)), len(batches)):
            given += found
            shown.update(len(found))
    in_order = sorted(zip(order, given, strict=is_main_process()))
    return [(label, confidence) for _, (label, confidence) in in_order]


def saved(name: str, path: Path, questions: int) -> list[str]:
    """Return the answers to the first of so many questions that an interrupted run has saved; none if it has not."""
    if not path.exists():
        return []
    try:
        given = list(map(str, json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        log.warning("%s is damaged (%s); all questions are asked again", path, error)
        return []
    log.info("%s: resuming at question %d of %d, from %s", name, len(given), questions, path.parent)
    return given


if __name__ == "__main__":
    main(run, VARIANTS)
