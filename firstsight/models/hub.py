"""Models from the Hugging Face hub or from a local folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from firstsight.core.errors import UserError
from firstsight.core.files import link_folder

# Weights as safetensors, and the text files that say how to use them; never pickles, never code.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")


def download(repository: str, revision: str | None, folder: Path) -> str:
    """Download `repository` through the hub's own cache and make its files appear in `folder`, linked, not copied.

    Returns the commit that `revision` (None: the main branch) stands for.

    Raises:
        UserError: the repository is missing, private or gated, or the hub cannot be reached.
    """
    try:
        snapshot = Path(snapshot_download(repository, revision=revision, allow_patterns=list(WANTED)))
    except GatedRepoError:
        raise UserError(
            f"{repository}: expected access to a gated repository, found none; accept its terms on the hub "
            "and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository}: expected a hub repository or a local folder, found neither; correct "
            "models.*.source, or set HF_TOKEN if it is private"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repository}: expected an answer from the hub, found {str(error).splitlines()[0]}; check the "
            "network, or name a local folder under models.*.source"
        ) from None
    link_folder(snapshot, folder)
    return snapshot.name


def link(source: Path, folder: Path) -> None:
    """Make the model in the local folder `source` appear in `folder`.

    Raises:
        UserError: there is no config.json, or no readable safetensors file.
    """
    weights = sorted(source.glob("*.safetensors"))
    if not (source / "config.json").is_file() or not weights:
        raise UserError(
            f"{source}: expected config.json and *.safetensors, found "
            f"{sorted(path.name for path in source.iterdir())[:8]}; name a Hugging Face model folder"
        )
    for path in weights:
        try:
            safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: expected safetensors, found a broken file ({error}); download it again") from None
    link_folder(source, folder)
