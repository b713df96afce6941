"""Read what a model folder says of itself, and report one that cannot be used."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from firstsight.core.errors import UserError

RESTORE_REMEDY = "make it again (dvc repro) or restore it (dvc checkout)"


def read_config(folder: Path) -> PretrainedConfig:
    """Return the folder's config. Raises UserError where it is missing, broken or of an unknown architecture."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever libraries raise over a damaged file
        raise folder_error(folder, error) from None


def folder_error(folder: Path | str, found: Any, remedy: str = RESTORE_REMEDY) -> UserError:
    """Return the error of a folder that is not what loading it takes, for what was `found` in its place."""
    first_line = " ".join(str(found).split())[:200]
    return UserError(f"{folder}: expected a complete Hugging Face model folder, found {first_line}; {remedy}")
