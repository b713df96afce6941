"""Models from the Hugging Face hub or from a local folder: safetensors and text files of one commit, checked."""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from firstsight.acquisition import checks, egogpt_conversion
from firstsight.core.errors import UserError
from firstsight.core.faults import check_disk_space
from firstsight.core.files import link_file
from firstsight.models.loading import ADAPTER

# Folders inside a repository hold the same weights for other libraries.
SUBFOLDERS = "*/*"

PlaceFile = Callable[[Path, Path], object]


def download(repository: str, revision: str | None, folder: Path) -> str:
    """Download `repository` through the hub's own cache and make its files appear in `folder`, linked, not copied.

    With HF_HUB_OFFLINE both commit and files are the cache's. Otherwise the hub is asked, and never the cache for a
    commit that the hub did not name.

    Returns the commit that `revision` (None: the main branch) stands for.

    Raises:
        UserError: the repository or revision is missing, private or gated, or the hub cannot be reached; a file did
            not arrive as the hub has it; the disk is too small; the checkpoint is not fit to be used.
    """
    checked_token()
    with _one_line(repository, revision):
        commit = HfApi().resolve_revision(repository, revision=revision).resolved
        if is_offline_mode():
            snapshot = _cached(repository, commit)
        else:
            _confirm(repository, revision, commit)
            snapshot = _fetch(repository, commit)
    _place(snapshot, folder, repository, link_file)
    return commit


def copy(source: Path, folder: Path) -> None:
    """Copy the model in the local folder `source` to `folder`.

    DVC makes what it keeps read-only, and shares it with its cache: a link would do so to the user's own files. Files
    of EgoGPT's own layout are linked all the same, because none of them stays when they are converted.

    Raises:
        UserError: the checkpoint is not fit to be used, or the disk too small for a copy.
    """
    converted = egogpt_conversion.is_original(source / checks.CONFIG)
    _place(source, folder, str(source), link_file if converted else shutil.copyfile)


def checked_token() -> str | None:
    """The user's token for the hub, if there is one.

    Raises:
        UserError: it has characters that no header can carry; the client's own error over it would quote it.
    """
    if (token := get_token()) and not (token.isascii() and token.isprintable()):
        raise UserError("HF_TOKEN: expected printable ASCII characters, found others; copy the token again")
    return token


def _confirm(repository: str, revision: str | None, commit: str) -> None:
    """Raise unless the hub itself says that `revision` is `commit`: unreached, its client asks the cache instead."""
    if (now := HfApi().model_info(repository, revision=revision).sha) != commit:
        raise UserError(
            f"{repository}: expected {revision or 'main'} to stay at one commit, found {commit}, then {now}; "
            "run it again"
        )


def _fetch(repository: str, commit: str) -> Path:
    """Download what is wanted of a commit, and compare it with the hub's checksums. Returns the cache's folder."""
    listing = HfApi().list_repo_tree(repository, revision=commit, recursive=True)
    files = [entry.path for entry in listing if isinstance(entry, RepoFile)]
    names = [path for path in files if "/" not in path or path.startswith(f"{ADAPTER}/")]
    if checks.CONFIG not in names and checks.ADAPTER_CONFIG not in names:
        raise UserError(
            f"{repository}: expected a {checks.CONFIG} that can be read, found {names[:8]} at {commit}; name a "
            "repository of a model in transformers' layout"
        )
    # The small files first: a checkpoint that is refused costs no gigabytes.
    snapshot = _snapshot(repository, commit, checks.TEXT)
    _check_sums(repository, commit)
    weights = checks.check_texts(snapshot, names, repository)
    planned = snapshot_download(repository, revision=commit, allow_patterns=weights, dry_run=True)
    needed = sum(file.file_size or 0 for file in planned if file.will_download)
    check_disk_space(snapshot, needed, f"free some for {repository}, or point HF_HUB_CACHE to a larger disk")
    _snapshot(repository, commit, weights, None)
    _check_sums(repository, commit)
    return snapshot


def _cached(repository: str, commit: str) -> Path:
    """The cache's folder of a commit, with all that is wanted of it; there is nothing to compare checksums with."""
    snapshot = _snapshot(repository, commit, checks.TEXT)
    weights = checks.check_texts(snapshot, checks.names(snapshot), repository)
    return _snapshot(repository, commit, weights, None)


def _snapshot(repository: str, commit: str, patterns: Iterable[str], but: str | None = SUBFOLDERS) -> Path:
    """The cache's folder of a commit, after downloading the files that match, `but` these, and are not there yet."""
    return Path(snapshot_download(repository, revision=commit, allow_patterns=list(patterns), ignore_patterns=but))


def _check_sums(repository: str, commit: str) -> None:
    """Hash every file of the cached commit: SHA-256 of large ones, git's SHA-1 of small ones, as the hub states them.

    Raises UserError after deleting the wrong ones, which would be taken for right otherwise.
    """
    verified = HfApi().verify_repo_checksums(repository, revision=commit)
    for wrong in verified.mismatches:
        pointer = verified.verified_path / wrong["path"]
        pointer.resolve().unlink()
        pointer.unlink(missing_ok=True)
    for wrong in verified.mismatches:
        raise UserError(
            f"{repository}/{wrong['path']}: expected {wrong['algorithm']} {wrong['expected']}, found "
            f"{wrong['actual']}; it is deleted from the cache: run it again, and if that is no help, look for a proxy "
            "or mirror between here and the hub"
        )


def _place(source: Path, folder: Path, place: str, place_file: PlaceFile) -> None:
    """Check the checkpoint in `source`, and link or copy what is wanted of it into `folder`."""
    present = checks.names(source)
    large = checks.check_texts(source, present, place)
    checks.check_weights(source, place)
    texts = filter_repo_objects(present, allow_patterns=list(checks.TEXT), ignore_patterns=SUBFOLDERS)
    wanted = [*texts, *large]
    if place_file is not link_file or source.stat().st_dev != folder.stat().st_dev:
        needed = sum((source / name).stat().st_size for name in wanted)
        check_disk_space(folder, needed, f"free some for a copy of {place}")
    for name in wanted:
        (folder / name).parent.mkdir(exist_ok=True)
        place_file(source / name, folder / name)
    if not egogpt_conversion.is_original(source / checks.CONFIG):
        checks.complete_tokenizer(folder, place)


@contextmanager
def _one_line(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into a UserError with the remedy."""
    try:
        yield
    except GatedRepoError:
        remedy = f"expected access to a gated repository, found none; accept its terms at hf.co/{repository} and "
        remedy += "set HF_TOKEN to a token of that account"
    except RepositoryNotFoundError:
        remedy = "expected a hub repository or a local folder, found neither; correct models.*.source, or set "
        remedy += "HF_TOKEN if it is private"
    except RevisionNotFoundError:
        remedy = f"expected a revision {revision!r}, found none; correct models.*.revision"
    except HFValidationError:
        remedy = "expected a local folder, or a hub repository as owner/name, found neither; correct models.*.source"
    except (HTTPError, RevisionResolutionError, OSError) as error:
        remedy = _unreached(error, revision)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        # What the client raises over an answer that is not the hub's.
        remedy = f"expected the hub to answer in its own protocol, found {_first_line(error)}; look for a sign-in page "
        remedy += "or proxy between here and the hub, and at HF_ENDPOINT"
    else:
        return
    raise UserError(f"{repository}: {remedy}") from None


def _unreached(error: Exception, revision: str | None) -> str:
    """The line for a hub that did not answer, or not with a file."""
    if is_offline_mode():
        return (
            f"expected {revision or 'main'} in the hub's cache, because HF_HUB_OFFLINE is set, found it missing or "
            "incomplete; run it once with a network, or name a local folder under models.*.source"
        )
    found = _first_line(error)
    status = _status(error)
    if status == 401:
        return f"expected a token that the hub accepts, found {found}; correct HF_TOKEN, or log in again"
    if status == 403:
        return (
            "expected permission to read it, found that the hub refuses it (403); ask its owner for access, or set "
            "HF_TOKEN to a token that may read it"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"expected room in the hub's cache, found {found}; make some, or point HF_HUB_CACHE to a larger disk"
    return (
        f"expected an answer from the hub, found {found}; check the network and run it again, which keeps the files "
        "that have come, or name a local folder under models.*.source"
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: of what the client could not get, it says first that the cache has it not."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    words = str(error).strip()
    return words.splitlines()[0] if words and not isinstance(error, KeyError) else repr(error)
