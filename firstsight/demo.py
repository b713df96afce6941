"""A local page to ask models about an image or a video, side by side.

    pip install -r requirements-demo.txt
    python -m firstsight.demo models/student-distilled [models/teacher-finetuned ...]

It listens on this machine alone, sends nothing anywhere, and deletes what was uploaded when it ends. All models are
kept in memory.
"""

import argparse
import os
import tempfile
from pathlib import Path

from firstsight.asking.asked_model import AskedModel
from firstsight.asking.folder import check_there
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.stage import log, main
from firstsight.models.loading import pick_device
from firstsight.quiet import quiet_transformers

HOST = "127.0.0.1"


def run() -> None:
    parser = argparse.ArgumentParser(prog="python -m firstsight.demo", description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a model folder")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    quiet_transformers()
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
        for folder in arguments.models:
            check_there(folder)
        device = pick_device(loaded.runtime.device)
        blocks = page([AskedModel(folder, loaded.evaluate, device) for folder in arguments.models], loaded.data)
        try:
            _, address, _ = blocks.launch(
                server_name=HOST,
                server_port=arguments.port,
                share=False,
                theme=THEME,
                css=CSS,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError:
            raise UserError(f"--port {arguments.port}: expected a free port, found it taken; name another") from None
        log.info("%s until Ctrl-C", address)
        blocks.block_thread()


if __name__ == "__main__":
    main(run)
