"""Encoder and identity adapter as models of the Hugging Face Hub: from_pretrained, save_pretrained, push_to_hub.

The files are those of a weights folder, so each side reads what the other wrote.
"""

import abc
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub import HfApi, ModelHubMixin, hf_hub_download
from torch import Tensor

from omniid.errors import OmniIDError
from omniid.weights import SHIPPED

CARD = """---
{{ card_data }}
---

# {{ title | default("Omni-ID", true) }}

A part of omniid, an open implementation of Omni-ID, which turns photos of a person into one identity code and draws that
person with FLUX. The encoder turns photos into codes, the identity adapter lets a FLUX transformer read them. Both belong
together: a code carries the fingerprint of its encoder, and an adapter refuses codes of another one.

```python
import omniid
from omniid.models.identity_adapter import IdentityAdapter

adapter = IdentityAdapter.from_pretrained("{{ repo_id | default('NAME', true) }}")
with adapter.drawing(pipe, omniid.Identity.load("id.pt")):  # pipe: a FluxPipeline of diffusers
    image = pipe("photo of a person smiling").images[0]
```

Codes describe faces of real people: make and use them with the consent of the person, and say of pictures that they are
generated.
"""


class HubModel(ModelHubMixin, abc.ABC):
    """A module with one weights file and methods `save(path, dtype)` and `_from_files(weights, settings)`."""

    WEIGHTS_FILE: ClassVar[str]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options):
        """From a preset with shipped weights, a weights folder or what `save_pretrained` wrote, or a hub name.

        options: as of `huggingface_hub.ModelHubMixin.from_pretrained`. Raises OmniIDError where there is nothing to load.
        """
        for folder in (SHIPPED / str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)):
            if folder.is_dir():
                return cls._from_files(folder / cls.WEIGHTS_FILE, folder)
        from huggingface_hub.errors import HFValidationError

        try:
            return super().from_pretrained(str(pretrained_model_name_or_path), **options)
        except (OSError, HFValidationError) as error:  # the Hub's and the network's errors are of OSError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OmniIDError(
                f"{str(pretrained_model_name_or_path)!r} is no preset with weights, no folder, and not to be had from the hub "
                f"({reason[:200].rstrip(' .')}); check the name"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options):
        where = {
            name: options.get(name) for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        }
        weights = hf_hub_download(model_id, cls.WEIGHTS_FILE, **where)
        settings = [hf_hub_download(model_id, name, **where) for name in cls._settings_files(model_id, where)]
        return cls._from_files(Path(weights), Path(settings[0]).parent if settings else Path(weights).parent)

    @classmethod
    def _settings_files(cls, model_id: str, where: dict) -> list[str]:
        """Files beside the weights that `_from_files` needs."""
        return []

    @classmethod
    @abc.abstractmethod
    def _from_files(cls, weights: Path, folder: Path):
        """The model of a weights file in a folder that may hold more about it."""

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / self.WEIGHTS_FILE, _narrowest(self.parameters()))

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, **options) -> str:
        """Uploads weights, settings and a model card; a new repository is private unless `private` is False.

        options: as of `huggingface_hub.ModelHubMixin.push_to_hub`. Returns the commit's address. Raises OmniIDError for a
        repository that is public already, unless `private` is False.
        """
        if private is not False and _is_public(repo_id, options.get("token")):
            raise OmniIDError(
                f"nothing was pushed, for {repo_id} is public; push with private=False, or to another repository"
            )
        card = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, private=private, model_card_kwargs=card, **options)


def _is_public(repo_id: str, token: str | None) -> bool:
    """Whether a repository of that name is there and open to all."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not HfApi(token=token).repo_info(repo_id).private
    except RepositoryNotFoundError:
        return False


def _narrowest(parameters) -> torch.dtype:
    """bfloat16 where it holds every value exactly: a fingerprint must not change by saving."""

    def is_exact(parameter: Tensor) -> bool:
        return torch.equal(parameter.to(torch.bfloat16).to(parameter.dtype), parameter)

    return torch.bfloat16 if all(is_exact(parameter.detach()) for parameter in parameters) else torch.float32
