"""firstsight demo: a local web page to ask models about an image or a video."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from firstsight.cli.arguments import EngineOption, check_engine

HOST = "127.0.0.1"


def demo(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="One or more model folders.")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port that the page listens on.")] = 7860,
    engine: EngineOption = None,
) -> None:
    """Serve a local web page to ask models on.

    It shows the answers of several models to a question about an image or a video side by side, or about a text where
    all of them read text alone.

    It needs gradio: pip install -r requirements-demo.txt. The page listens on this machine alone, sends nothing
    anywhere, and deletes what was uploaded when it ends. All models stay in memory.
    """
    from firstsight.asking.asked_model import AskedModel
    from firstsight.asking.folder import check_there, classes_of
    from firstsight.cli.devices import device_of
    from firstsight.core import params
    from firstsight.core.errors import UserError
    from firstsight.core.stage import log

    with tempfile.TemporaryDirectory() as uploads:
        # Read when gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        try:
            from firstsight.asking.web_page import CSS, THEME, page
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name}: expected what the page needs, found it missing; pip install -r requirements-demo.txt"
            ) from None

        loaded = params.load()
        for folder in models:
            check_there(folder)
        check_engine(engine, models)
        device = device_of(models, loaded.runtime.device)
        asked = [
            AskedModel(folder, loaded.evaluate, device, engine, classes_of(folder, loaded.data)) for folder in models
        ]
        blocks = page(asked, loaded.data)
        try:
            _, address, _ = blocks.launch(
                server_name=HOST,
                server_port=port,
                share=False,
                theme=THEME,
                css=CSS,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            raise UserError(f"--port {port}: expected a free port, found it taken; name another") from None
        log.info("%s until Ctrl-C", address)
        blocks.block_thread()
