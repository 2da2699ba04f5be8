"""Trained weights on the Hugging Face Hub (`omniid train ... --push-to-hub`)."""

import os
import shlex
from pathlib import Path

from omniid.errors import OmniIDError


class HubError(OmniIDError):
    """Weights that cannot be pushed; what they were pushed from stays as it is."""


def check_push(repo: str) -> None:
    """Raises HubError for what would make a push fail and can be known without a network: the name and the login."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--push-to-hub {repo!r}: {error}; name a repository like somebody/omniid-mini") from error
    if get_token() is None:
        raise HubError(f"--push-to-hub {repo} needs a token of the Hugging Face Hub; log in with: hf auth login")


def push_weights(folder: str | Path, repo: str, *, public: bool = False) -> str:
    """Uploads a weights folder into the model repository `repo`, made where it is missing, and returns its address.

    A repository that is public already takes weights only with `public`. Raises HubError that says where the weights are.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(made.repo_id).private:
            raise HubError(
                f"the weights were not pushed, for {made.repo_id} is public; they are safe in {folder}: run the command "
                "again with --resume and --public, or with --resume and another repository"
            )
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Weights by omniid train",
            ignore_patterns=["*.tmp*", "*.writing/*"],  # left by a crash in the middle of an export
        )
    except HubError:
        raise
    except Exception as error:  # of the Hub, the network or the disk: whatever it is, the weights are not lost
        words = ["hf", "upload", repo, os.fspath(folder), ".", *([] if public else ["--private"])]
        raise HubError(
            f"the weights were not pushed ({error}); they are safe in {folder}, push them again with: {shlex.join(words)}"
        ) from error
    return str(made)
