"""Pushing a folder to the hub: one commit, so that a repository has the whole model or what it had before."""

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from firstsight.core.errors import UserError

_REMEDIES = {
    401: "correct HF_TOKEN, or log in again with hf auth login",
    403: "take a token that may write there, of an account that may",
    409: "somebody else wrote to it meanwhile: run it again",
}


def push(folder: Path, repository: str) -> str:
    """Commit the files of `folder` to the repository, which is created, private, if there is none.

    Weights of an earlier commit that the folder does not have are deleted with it; other files stay.

    Returns the commit's address.

    Raises:
        UserError: the hub refuses it, or does not answer.
    """
    api = HfApi()
    names = sorted(path.name for path in folder.iterdir())
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        earlier = [name for name in api.list_repo_files(repository) if fnmatch(name, "*.safetensors*")]
        additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
        deletions = [CommitOperationDelete(name) for name in earlier if name not in names]
        done = api.create_commit(repository, [*additions, *deletions], commit_message="Publish from FirstSight")
    # ValueError: the client's over a card that the hub refuses, or an answer that is no JSON. RuntimeError: its own
    # around what became of the transfer of a large file.
    except (HTTPError, OSError, ValueError, RuntimeError) as raised:
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        found = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = _REMEDIES.get(status, "check the network, and run it again")
        raise UserError(f"{repository}: expected the hub to take it, found {found}; {remedy}") from None
    return done.commit_url
