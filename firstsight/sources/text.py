"""Files of annotations as text and JSON, read whole: the largest in use have tens of megabytes."""

import json
from pathlib import Path
from typing import Any

from firstsight.core.errors import UserError
from firstsight.core.params import Data


def media_root(data: Data) -> Path:
    """The folder that media are looked for in."""
    return Path(data.media_root) if data.media_root else Path(data.path).parent


def read_text(path: Path, what: str) -> str:
    """
    Raises:
        UserError: the file is missing, or no UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: expected {what} in UTF-8, found {path} ({error}); correct the path") from None
    if not text.strip():
        raise UserError(f"{path}: expected {what}, found an empty file; data.path names another?")
    return text


def read_json(path: Path, what: str) -> Any:
    """
    Raises:
        UserError: the file is missing, or no JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected {what}, found {str(error)[:120]}; correct it") from None
