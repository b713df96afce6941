"""Ask a model about an image or a video, or several models side by side.

    python -m firstsight.ask models/student-distilled scene.jpg "What is in your left hand?"
    python -m firstsight.ask models/student-distilled clip.mp4 "What did I pick up?" --compare models/teacher-finetuned

Media are sampled and resized by `data`, models loaded and answers limited by `evaluate` of params.yaml. Models are
loaded one after the other; each answers twice, and the second time counts.
"""

import argparse
from pathlib import Path

from firstsight.asking.asked_model import Answer, AskedModel, question_about, seen
from firstsight.asking.folder import check_there
from firstsight.core import params
from firstsight.core.stage import main
from firstsight.models.loading import pick_device
from firstsight.quiet import quiet_transformers
from firstsight.records.sample import Sample

ROW = "{:<{width}}  {:>9}  {:>8}  {}"


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.ask", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder, such as models/student-distilled")
    parser.add_argument("media", type=Path, help="an image or a video")
    parser.add_argument("question")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="MODEL", help="ask these too")
    arguments = parser.parse_args()
    quiet_transformers()

    loaded = params.load()
    sample = question_about(arguments.media, arguments.question, loaded.data)
    folders = [arguments.model, *arguments.compare]
    for folder in folders:
        check_there(folder)
    device = pick_device(loaded.runtime.device)

    width = max(len("model"), *(len(str(folder)) for folder in folders))
    header = ROW.format("model", "time", "loading", "answer", width=width)
    print(f"media     {arguments.media}, {seen(sample)}\nquestion  {sample.records[0].question}\n")
    print(f"{header}\n{'-' * max(80, len(header))}", flush=True)
    for folder in folders:
        answer, loading = ask(folder, sample, loaded.evaluate, device)
        times = f"{1000 * answer.seconds:.0f} ms", f"{loading:.1f} s"
        print(ROW.format(str(folder), *times, answer.line(), width=width), flush=True)


def ask(folder: Path, sample: Sample, settings: params.Evaluate, device: str) -> tuple[Answer, float]:
    """The model's second answer, because the first warms up; and the seconds of loading. The model is not kept."""
    model = AskedModel(folder, settings, device)
    model.answer(sample)
    return model.answer(sample), model.load_seconds


if __name__ == "__main__":
    main(run)
