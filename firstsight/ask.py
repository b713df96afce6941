"""Ask a model about an image or a video, or several models side by side.

    python -m firstsight.ask models/student-distilled scene.jpg "What is in your left hand?"
    python -m firstsight.ask models/student-distilled clip.mp4 "What did I pick up?" --compare models/teacher-finetuned

Media are sampled and resized by `data`, models loaded and answers limited by `evaluate` of params.yaml.
"""

import argparse
from pathlib import Path

from firstsight.asking.model import AskedModel, question_about
from firstsight.core import params
from firstsight.core.stage import main
from firstsight.models.loading import pick_device


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.ask", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder, such as models/student-distilled")
    parser.add_argument("media", type=Path, help="an image or a video; - for a question about neither")
    parser.add_argument("question")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="MODEL", help="ask these too")
    arguments = parser.parse_args()

    loaded = params.load()
    media = None if arguments.media == Path("-") else arguments.media
    sample = question_about(media, arguments.question, loaded.data)
    device = pick_device(loaded.runtime.device)
    folders = [arguments.model, *arguments.compare]
    width = max(len(str(folder)) for folder in folders)
    for folder in folders:
        model = AskedModel(folder, loaded.evaluate, device)
        model.answer(sample)  # the first one warms up
        answer = model.answer(sample)
        times = f"{1000 * answer.seconds:6.0f} ms, loaded in {model.load_seconds:.1f} s"
        print(f"{str(folder).ljust(width)}  {times}  {answer.text or '(nothing)'}", flush=True)


if __name__ == "__main__":
    main(run)
