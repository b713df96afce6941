"""Push a folder to the hub in one commit, so that a repository never holds part of a model."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from firstsight.core.errors import UserError
from firstsight.engine.layout import GRAPH_FILES, LAYOUT

# Files by which a folder is taken for a model of one kind or another.
_OF_A_MODEL = ("*.safetensors*", *GRAPH_FILES, LAYOUT)
_REMEDIES = {
    401: "correct HF_TOKEN, or log in again with hf auth login",
    403: "use a token with write access to it",
    409: "another commit was pushed meanwhile: run it again",
}


def push(folder: Path, repository: str) -> str:
    """Commit the files of `folder` to the repository, which is created as private if it does not exist.

    The same commit deletes weights of earlier commits that the folder does not have, and what describes exported ones;
    other files stay.

    Returns the URL of the commit.

    Raises:
        UserError: the hub refuses the commit, or cannot be reached.
    """
    api = HfApi()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        earlier = [name for name in api.list_repo_files(repository) if any(fnmatch(name, one) for one in _OF_A_MODEL)]
        additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
        deletions = [CommitOperationDelete(name) for name in earlier if name not in names]
        done = api.create_commit(repository, [*additions, *deletions], commit_message="Publish from FirstSight")
    # The client raises ValueError for a model card that the hub refuses or an answer that is not JSON, and RuntimeError
    # around an error in the transfer of a large file.
    except (HTTPError, OSError, ValueError, RuntimeError) as raised:
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        found = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = _REMEDIES.get(status, "check the network, and run it again")
        raise UserError(f"{repository}: expected the hub to accept the commit, found {found}; {remedy}") from None
    return done.commit_url
