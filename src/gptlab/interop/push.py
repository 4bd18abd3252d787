"""Upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from gptlab.errors import HubError
from gptlab.files import because


def create_repository(name: str) -> None:
    """Create a private repository of models, or find the one of this name, before time is spent on its content.

    Raises:
        HubError: a name that is none, no token, no network, or no permission.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise HubError(f"--push {name}: a repository is named USER/NAME")
    from huggingface_hub import HfApi, get_token  # importing it takes half a second

    if get_token() is None:
        raise HubError("--push needs a token that may write: `hf auth login` asks for it, or set HF_TOKEN")
    with _hub_errors(name):
        HfApi().create_repo(name, private=True, exist_ok=True)


def upload(folder: Path, name: str) -> str:
    """Upload a folder's files in one commit and return the address of the repository.

    Raises:
        HubError: as `create_repository`; the folder stays as it is.
    """
    from huggingface_hub import HfApi, constants

    with _hub_errors(name, f"; {folder} is complete, and `hf upload {name} {folder}` sends it again"):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export from gptlab")
    return f"{constants.ENDPOINT}/{name}"


@contextlib.contextmanager
def _hub_errors(name: str, then: str = "") -> Iterator[None]:
    """Turn what goes wrong while talking to the hub into one sentence."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:  # errors of the hub, the network and the disk have no common base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            why = "the hub does not know this token: `hf auth login` makes another one, or set HF_TOKEN"
        elif status in (403, 404):
            why = f"this token may not write to {name}: check the name, and that the token may write"
        elif status is None:
            why = f"talking to {constants.ENDPOINT} failed ({type(error).__name__}): {because(error)}"
        else:
            why = f"the hub answers {status}: {because(error)}"
        raise HubError(f"--push {name}: {why}{then}") from None
