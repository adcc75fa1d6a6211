"""Models on the Hugging Face hub: their ids, downloads and uploads. No communication between ranks.

huggingface_hub reads `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdrl_mcore.errors import ModelError

FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model")
"""The files downloaded from a model's top folder: safetensors, config and tokenizer; never code."""
IN_FOLDERS = "*/*"
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


@dataclass(frozen=True)
class HubId:
    """A model on the hub.

    Attributes:
        repo: `org/name`.
        revision: a branch, a tag or a commit; None for the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(path: str | Path) -> HubId | None:
    """The model on the hub that `path` names, or None if it is a path.

    It is a path if it or its parent folder exists here. A snapshot in the hub's cache that does not exist here (it is on
    another machine, or was removed) names the commit that it held.
    """
    text = str(path)
    if Path(text).exists():
        return None
    if snapshot := _SNAPSHOT.search(text):
        return HubId(f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"])
    found = _ID.fullmatch(text)
    return None if found is None or Path(text).parent.exists() else HubId(found["repo"], found["revision"])


def find_commit(model: HubId) -> str:
    """The commit of a model's revision, from the hub, or from the cache if the hub is offline or cannot be reached.

    Raises:
        ModelError: neither has it.
    """
    return _download(model, ("config.json",)).name


def download(model: HubId, *, weights: bool = True) -> Path:
    """The folder of a model in the hub's cache, downloaded if it is not there yet.

    Args:
        weights: whether the weights are needed, too; without them config and tokenizer are downloaded.

    Raises:
        ModelError: the model cannot be obtained, or has no safetensors.
    """
    folder = _download(model, FILES if weights else FILES[1:])
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{model} on the hub has no safetensors, the only weights that are read: convert it first")
    return folder


def push(folder: Path, repo: str) -> str:
    """Upload a model folder to a repository made by `make_repository`; returns the URL of the commit.

    Raises:
        ModelError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import upload_folder

    with _errors(f"{folder} cannot be pushed to {repo}"), _bars_on_terminals():
        done = upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=[".*"], commit_message="Upload the model")
        return done.commit_url


def make_repository(repo: str, *, private: bool) -> None:
    """Create a model repository on the hub, unless it exists already.

    Raises:
        ModelError: the name is not a repository id, or the hub refuses it or cannot be reached.
    """
    from huggingface_hub import create_repo

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ModelError(f"--push {repo} is not the id of a repository: write org/name")
    with _errors(f"{repo} cannot be created"):
        create_repo(repo, private=private, exist_ok=True)


def _download(model: HubId, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    with _errors(f"{model} is not a folder here"), _bars_on_terminals():
        found = snapshot_download(model.repo, revision=model.revision, allow_patterns=list(files), ignore_patterns=[IN_FOLDERS])
    return Path(found)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turn every error of huggingface_hub into a one-line ModelError."""
    from huggingface_hub import constants, errors

    where = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{what}, and on {where} it is gated: accept its terms there, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{what}, and {where} has no repository of this name that you may read: check the name, or set HF_TOKEN (hf auth "
            "login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{what}, and {where} has no such revision of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cache = f"{constants.HF_HUB_CACHE} does not hold all of it"
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{where} cannot be reached"
        raise ModelError(f"{what}; {why}, and {cache}: download it where there is a network (hf download)") from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{what}: {where} says {' '.join(str(error).split())}") from error
    except Exception as error:  # the network library and the file system raise their own
        raise ModelError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Disable huggingface_hub's progress bars unless stderr is a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
