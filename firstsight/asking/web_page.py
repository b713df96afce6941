"""Build the web page of `firstsight demo`: an upload and a question, the frames the models see, their answers.

Where all models read text alone, there are no upload and no frames.
"""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from firstsight.asking.asked_model import AskedModel
from firstsight.asking.folder import reads_text_alone
from firstsight.asking.side_by_side import COLUMNS, answered
from firstsight.core import params
from firstsight.core.errors import UserError

# System fonts, because Gradio's themes would otherwise load theirs from the network.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Frames are small and below the label: a single frame would otherwise be as wide as the page, and cut off.
CSS = """
#frames .grid-wrap { min-height: 0; max-height: none; padding-top: 2rem }
#frames .grid-container { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)) }
"""


def page(models: Sequence[AskedModel], data: params.Data) -> gr.Blocks:
    """Return the page that asks `models`; images and videos are sampled and resized as `data` says."""

    def ask(path: str | None, question: str) -> tuple[list[Image.Image], list[list[str]]]:
        try:
            return answered(models, Path(path) if path else None, question, data)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    shows = not all(reads_text_alone(model.folder) for model in models)
    about = "an image or a video" if shows else "a text"
    with gr.Blocks(title="FirstSight", analytics_enabled=False) as blocks:
        gr.Markdown(f"# FirstSight\nAsk about {about}. The first answer of each model takes longer.")
        with gr.Row():
            media = gr.File(label="Image or video", file_types=["image", "video"], visible=shows)
            with gr.Column():
                placeholder = "What is in your left hand?" if shows else None
                question = gr.Textbox(label="Question", placeholder=placeholder, lines=1 if shows else 6)
                button = gr.Button("Ask", variant="primary")
        found = gr.Dataframe(
            headers=COLUMNS, column_widths=["35%", "45%", "20%"], label="Answers", wrap=True, interactive=False
        )
        frames = gr.Gallery(
            label="What the models see",
            elem_id="frames",
            height="auto",
            object_fit="contain",
            interactive=False,
            visible=shows,
        )
        for event, name in ((button.click, "ask"), (question.submit, False)):
            event(ask, [media, question], [frames, found], api_name=name, show_progress_on=found)
    return blocks
