"""Check a model before it is published: each function raises UserError, with one line, if its check fails."""

import json
import subprocess
import sys
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from firstsight.acquisition import checks
from firstsight.acquisition.hub_client import checked_token
from firstsight.asking.folder import check_there
from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.engine.class_scores import open_exported
from firstsight.engine.layout import GRAPH_FILES, is_exported
from firstsight.models import egogpt
from firstsight.models.architecture import auto_class


def check_name(repository: str) -> None:
    """Raise UserError unless `repository` is a valid name of a hub repository, OWNER/NAME."""
    try:
        validate_repo_id(repository)
    except HFValidationError:
        valid = False
    else:
        valid = repository.count("/") == 1
    if not valid:
        raise UserError(f"{repository}: expected a hub repository as OWNER/NAME, found another form; correct it")


def check_committed() -> None:
    """Raise UserError unless all tracked files are committed: the commit records how the model was made."""
    changed = _printed("git", "status", "--porcelain", "--untracked-files=no").splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:3])
        raise UserError(
            f"git: expected everything committed, found changes in {names} ({len(changed)} in all); commit them"
        )


def check_measured() -> None:
    """Raise UserError unless every stage is up to date, so that the figures are those of this model."""
    printed = _printed(sys.executable, "-m", "dvc", "status", "--json")
    if stale := json.loads(printed):
        raise UserError(
            f"dvc: expected every stage up to date, found {', '.join(stale)[:200]} changed; "
            "dvc repro, and commit what it measures"
        )


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` holds a complete model and nothing else.

    That is one that transformers loads, as safetensors and text files, or one that the engine of exports opens.
    """
    check_there(folder)
    exported = is_exported(folder)
    weights, allowed = ("ONNX graphs", GRAPH_FILES) if exported else ("safetensors", ("*.safetensors",))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    other = set(names) - set(filter_repo_objects(names, allow_patterns=[*checks.TEXT, *allowed]))
    if other:
        raise UserError(
            f"{folder}: expected weights as {weights}, and text files, found {min(other)} "
            f"({len(other)} other files); dvc checkout restores what the pipeline made"
        )
    if exported:
        open_exported(folder)
        return
    checks.check_config(folder, str(folder))
    checks.check_weights(folder, str(folder))
    kind = read_json(folder / checks.CONFIG, "distill")["model_type"]
    if auto_class(kind) is None or kind == egogpt.EgoGptConfig.model_type:
        raise UserError(
            f"{folder}: expected a model that transformers loads by itself, found model_type {kind!r}; take such a "
            "student, Qwen2-VL or LLaVA-OneVision for one"
        )


def check_token() -> None:
    """Raise UserError unless a hub token is set."""
    if not checked_token():
        raise UserError("HF_TOKEN: expected a token that may write, found none; set it, or log in with hf auth login")


def _printed(*words: str) -> str:
    """Return what a command prints; raise UserError with the first line of its error output if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = (done.stderr.strip() or "nothing").splitlines()[0]
        name = "dvc" if "dvc" in words else words[0]
        raise UserError(f"{name}: expected a clone of the repository, found {complaint[:200]}; publish from one")
    return done.stdout
