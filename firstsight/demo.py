"""A local page to ask models about an image or a video.

    pip install -r requirements-demo.txt
    python -m firstsight.demo models/student-distilled [models/teacher-finetuned ...]

It listens on this machine alone, and sends nothing anywhere.
"""

import argparse
import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from firstsight.asking.model import AskedModel, question_about
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.stage import main
from firstsight.models.loading import pick_device

COLUMNS = ["model", "answer", "milliseconds"]


def page(models: list[AskedModel], data: params.Data) -> gr.Blocks:
    """An upload, a question, and a row an answer."""

    def ask(path: str | None, question: str) -> list[list[str]]:
        try:
            sample = question_about(Path(path) if path else None, question, data)
        except UserError as error:
            raise gr.Error(str(error)) from None
        answers = [(model.folder, model.answer(sample)) for model in models]
        return [[str(folder), one.text or "(nothing)", f"{1000 * one.seconds:.0f}"] for folder, one in answers]

    with gr.Blocks(title="FirstSight") as blocks:
        gr.Markdown("# FirstSight\nAsk about a picture or a clip. The first answer of each model takes longer.")
        with gr.Row():
            media = gr.File(label="Image or video", file_types=["image", "video"])
            with gr.Column():
                question = gr.Textbox(label="Question", placeholder="What is in your left hand?")
                button = gr.Button("Ask", variant="primary")
        found = gr.Dataframe(headers=COLUMNS, label="Answers", wrap=True, interactive=False)
        for event in (button.click, question.submit):
            event(ask, [media, question], found, api_name="ask")
    return blocks


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.demo", description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a model folder")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    loaded = params.load()
    device = pick_device(loaded.runtime.device)
    models = [AskedModel(folder, loaded.evaluate, device) for folder in arguments.models]
    page(models, loaded.data).launch(server_name="127.0.0.1", server_port=arguments.port, share=False)


if __name__ == "__main__":
    main(run)
