"""From a name to a model folder, and from a folder to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from ..config import MODEL_TYPE, ConfigError, read_json
from .adapters import CONFIG_FILE as ADAPTER_CONFIG
from .errors import CheckpointError, HubError

_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """A model folder as it is, of a run its best checkpoint; a hub repo id (owner/name) downloaded, or from its cache.

    Args:
        revision: branch, tag or commit of the repo.

    Raises:
        CheckpointError: if it is neither, or of a run that trained adapters, or a local folder should have a revision.
        ConfigError: if a repo holds another kind of model; its weights are not downloaded.
        HubError: if the hub is not reached, or does not have it or give it.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path}: a local folder has no revision {revision!r}; leave it out")
        folder = best_checkpoint(path) or path
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{path}: holds adapters and no model; fuse them with theirs, or give them as --adapter-path"
            )
        return folder
    if path.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds it and config.json")
    if not is_repo_id(str(path_or_repo)):
        raise CheckpointError(f"{path_or_repo}: no such folder, and not a hub repo id (owner/name) either")
    return _download(str(path_or_repo), revision)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run folder with the lowest validation loss, or its last; None if it is no run folder."""
    last = last_checkpoint(run)
    if last is None:
        return None
    best = json.loads((last / "run.json").read_text())["best"]
    chosen = run / "checkpoints" / f"step-{best.get('step')}"
    return chosen if chosen.is_dir() else last


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that a run goes on from."""
    steps = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _REPO_ID.fullmatch(name) is not None


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        # Only files at the top: subfolders hold other formats or training states.
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        return Path(folder)

    with _hub_errors(repo, revision):
        folder = fetch(_SMALL_FILES)
    # Another model's weights may be a hundred gigabytes: look before they come.
    model_type = read_json(folder / "config.json", "a model repo needs one").get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        raise ConfigError(f"{repo}: model_type is {model_type!r}; this package runs {MODEL_TYPE!r} only")
    with _hub_errors(repo, revision):
        folder = fetch([*_SMALL_FILES, "*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            folder = fetch([*_SMALL_FILES, "*.bin", "*.pt", "*.pth"])
    return folder


def check_upload(repo: str) -> None:
    """Find out before a long conversion what would stop the upload after it.

    Raises:
        HubError: if the repo id is malformed or no one is logged in.
    """
    from huggingface_hub import get_token

    if not is_repo_id(repo):
        raise HubError(f"{repo}: not a hub repo id; expected owner/name")
    if get_token() is None:
        raise HubError(f"{repo}: cannot upload without a login; run `hf auth login` first, or set HF_TOKEN")


def upload(folder: Path, repo: str) -> None:
    """Publish a model folder, creating the repo if there is none.

    Raises:
        HubError: if the hub is not reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo, None, note=f"; the model is saved in {folder}"):
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload a GenLIP model for MLX")


@contextmanager
def _hub_errors(repo: str, revision: str | None, note: str = "") -> Iterator[None]:
    from huggingface_hub import errors

    # The hub's client has changed its HTTP library, and with it the class of a failed connection.
    transport = cast(tuple[type[BaseException], ...], errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(f"{repo}: gated; ask for access on its page, then log in with `hf auth login`{note}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo}: no such folder here and no such repo on the hub (a private one needs `hf auth login`){note}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo}: has no revision {revision!r}{note}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise HubError(
            f"{repo}: no such folder here, not in the hub's cache, and the hub cannot be reached{note}"
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{repo}: not a hub repo id: {_line(error)}{note}") from None
    except transport as error:
        raise HubError(f"{repo}: the hub failed: {_line(error)}{note}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
