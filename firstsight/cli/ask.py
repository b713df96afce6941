"""firstsight ask: the answers of models to a question, about an image or a video or of text alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firstsight.cli.arguments import EngineOption, check_engine

if TYPE_CHECKING:
    from firstsight.asking.asked_model import Answer
    from firstsight.core.params import Evaluate
    from firstsight.records.sample import Sample

# Characters of a text that is asked about which are printed again.
MOST_SHOWN = 400

ROW = "{:<{width}}  {:>9}  {:>8}  {}"


def ask(
    model: Annotated[Path, typer.Argument(help="A model folder, such as models/student-distilled.")],
    media: Annotated[str, typer.Argument(help="An image or a video; if no question follows, the text to ask.")],
    question: Annotated[str | None, typer.Argument(help="The question, in quotation marks.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(metavar="MODEL", help="Another model folder to ask; repeat it for more.")
    ] = None,
    engine: EngineOption = None,
) -> None:
    """Ask models about an image, a video or a text.

    The data section of params.yaml says how media are sampled and resized, the evaluate section how models are
    loaded and how long answers may be. Models are loaded one after the other; each answers twice, and the second
    answer is timed. Exported models, such as models/student-onnx, need neither torch nor transformers. One that
    tells classes apart answers with the best and its probability; a language model scores those of data.classes.
    Where questions were made by a prompt template with one column, the text fills it; with several, write them as a
    JSON object.
    """
    from firstsight.asking.folder import check_there, classes_of, template_of
    from firstsight.asking.question import question_about, question_alone, seen
    from firstsight.cli.devices import device_of
    from firstsight.core import params

    loaded = params.load()
    folders = [model, *(compare or [])]
    if question is None:
        asked = {folder: question_alone(media, template_of(folder, loaded.data)) for folder in folders}
        line = " ".join(media.split())
        about = f"question  {line[:MOST_SHOWN]}{' ...' if len(line) > MOST_SHOWN else ''}"
    else:
        sample = question_about(Path(media), question, loaded.data)
        asked = dict.fromkeys(folders, sample)
        about = f"media     {media}, {seen(sample)}\nquestion  {sample.records[0].question}"
    for folder in folders:
        check_there(folder)
    check_engine(engine, folders)
    device = device_of(folders, loaded.runtime.device)

    width = max(len("model"), *(len(str(folder)) for folder in folders))
    header = ROW.format("model", "time", "loading", "answer", width=width)
    print(f"{about}\n\n{header}\n{'-' * max(80, len(header))}", flush=True)
    for folder in folders:
        classes = classes_of(folder, loaded.data)
        answer, loading = second_answer(folder, asked[folder], loaded.evaluate, device, engine, classes)
        times = f"{1000 * answer.seconds:.0f} ms", f"{loading:.1f} s"
        print(ROW.format(str(folder), *times, answer.line(), width=width), flush=True)


def second_answer(
    folder: Path,
    sample: "Sample",
    settings: "Evaluate",
    device: str,
    engine: str | None,
    classes: Sequence[str] = (),
) -> "tuple[Answer, float]":
    """Return a model's second answer, because the first warms up, and the seconds of loading. Free the model."""
    from firstsight.asking.asked_model import AskedModel

    model = AskedModel(folder, settings, device, engine, classes)
    model.answer(sample)
    return model.answer(sample), model.load_seconds
