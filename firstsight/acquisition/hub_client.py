"""Download a model from the Hugging Face hub, or copy it from a local folder, and check its files."""

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

# Folders inside a repository usually hold the same weights for other libraries.
SUBFOLDERS = "*/*"

PlaceFile = Callable[[Path, Path], object]


def download(repository: str, revision: str | None, folder: Path) -> str:
    """Download `repository` into the hub's cache, link its files into `folder`, and return the commit.

    The commit is what the hub says that `revision` (None: the main branch) is. Only with HF_HUB_OFFLINE, commit and
    files come from the cache alone.

    Raises:
        UserError: the repository or revision is missing, private or gated, the hub cannot be reached, a file does not
            match the hub's checksum, the disk is too small, or the checkpoint cannot be used.
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

    Links would not do: DVC makes outputs read-only and shares them with its cache, which would affect the user's own
    files. Files in EgoGPT's own layout are linked, because the conversion replaces them.

    Raises:
        UserError: the checkpoint cannot be used, a file differs from its checksum in the folder's SHA256SUMS (as
            sha256sum writes it), if there is one, or the disk is too small for a copy.
    """
    if (source / checks.SUMS).is_file():
        checks.check_sums(source)
    converted = egogpt_conversion.is_original(source / checks.CONFIG)
    _place(source, folder, str(source), link_file if converted else shutil.copyfile)


def checked_token() -> str | None:
    """Return the user's token for the hub, or None.

    Raises:
        UserError: the token has characters that an HTTP header cannot; the client's own error would show the token.
    """
    if (token := get_token()) and not (token.isascii() and token.isprintable()):
        raise UserError("HF_TOKEN: expected printable ASCII characters, found others; copy the token again")
    return token


def _confirm(repository: str, revision: str | None, commit: str) -> None:
    """Raise UserError unless the hub says that `revision` is `commit`, which may be from the client's cache."""
    if (now := HfApi().model_info(repository, revision=revision).sha) != commit:
        raise UserError(
            f"{repository}: expected {revision or 'main'} to stay at one commit, found {commit}, then {now}; "
            "run it again"
        )


def _fetch(repository: str, commit: str) -> Path:
    """Download a commit's text files and weights, check them by the hub's checksums, and return the cache's folder."""
    listing = HfApi().list_repo_tree(repository, revision=commit, recursive=True)
    files = [entry.path for entry in listing if isinstance(entry, RepoFile)]
    names = [path for path in files if "/" not in path or path.startswith(f"{ADAPTER}/")]
    if checks.CONFIG not in names and checks.ADAPTER_CONFIG not in names:
        raise UserError(
            f"{repository}: expected a {checks.CONFIG} that can be read, found {names[:8]} at {commit}; name a "
            "repository of a model in transformers' layout"
        )
    # The small files first: a checkpoint that cannot be used is found before gigabytes are downloaded.
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
    """Return the cache's folder of a commit, offline, with all files needed; their checksums cannot be checked."""
    snapshot = _snapshot(repository, commit, checks.TEXT)
    weights = checks.check_texts(snapshot, checks.names(snapshot), repository)
    return _snapshot(repository, commit, weights, None)


def _snapshot(repository: str, commit: str, patterns: Iterable[str], ignored: str | None = SUBFOLDERS) -> Path:
    """Return the cache's folder of a commit after downloading missing files that match `patterns`, not `ignored`."""
    return Path(snapshot_download(repository, revision=commit, allow_patterns=list(patterns), ignore_patterns=ignored))


def _check_sums(repository: str, commit: str) -> None:
    """Compare the hashes of the cached commit's files with the hub's: SHA-256 for large files, git's SHA-1 for small
    ones.

    Raises UserError if some differ, after deleting these, so that the next run does not use them.
    """
    verified = HfApi().verify_repo_checksums(repository, revision=commit)
    for wrong in verified.mismatches:
        pointer = verified.verified_path / wrong["path"]
        pointer.resolve().unlink()
        pointer.unlink(missing_ok=True)
    for wrong in verified.mismatches:
        raise UserError(
            f"{repository}/{wrong['path']}: expected {wrong['algorithm']} {wrong['expected']}, found "
            f"{wrong['actual']}; it is deleted from the cache: run it again, and if it fails again, look for a "
            "proxy or mirror on the way to the hub"
        )


def _place(source: Path, folder: Path, place: str, place_file: PlaceFile) -> None:
    """Check the checkpoint in `source`, and link or copy its text files and weights into `folder`."""
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
    """Turn any error of the hub's client into a UserError of one line with the remedy."""
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
        # The client raises these when the answer is not from the hub.
        remedy = f"expected the hub to answer in its own protocol, found {_first_line(error)}; look for a sign-in page "
        remedy += "or proxy on the way to the hub, and check HF_ENDPOINT"
    else:
        return
    raise UserError(f"{repository}: {remedy}") from None


def _unreached(error: Exception, revision: str | None) -> str:
    """Return the message for a hub that did not answer, or refused to."""
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
        "already downloaded, or name a local folder under models.*.source"
    )


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status among an error's causes: the client's outermost error is that its cache lacks the file."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error.response.status_code
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: Exception) -> str:
    words = str(error).strip()
    return words.splitlines()[0] if words and not isinstance(error, KeyError) else repr(error)
