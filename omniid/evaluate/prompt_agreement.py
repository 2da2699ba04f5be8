"""Prompt agreement: how well pictures show what their prompt says, by a CLIP model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from omniid.errors import OmniIDError


class ClipAgreement:
    """A CLIP model that compares pictures with texts."""

    def __init__(self, model: str | Path):
        """model: folder or hub name of a transformers CLIP, such as openai/clip-vit-base-patch32.

        Raises OmniIDError where it cannot be loaded.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.name = str(model)
        try:
            self._model = CLIPModel.from_pretrained(model).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(model)
            self._processor = CLIPImageProcessor.from_pretrained(model)
        except (OSError, ValueError, TypeError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0][:160].rstrip(" .:") if lines else type(error).__name__
            raise OmniIDError(
                f"the CLIP model {model} cannot be loaded ({reason}); give --clip a folder with a transformers CLIP, or a hub "
                "name while online"
            ) from error

    @torch.inference_mode()
    def cosines(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """(N,) cosine of each picture, uint8 (H, W, 3), with its prompt."""
        if len(pictures) != len(prompts):
            raise ValueError(f"need a prompt for each picture, got {len(pictures)} and {len(prompts)}")
        texts = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        images = self._processor([Image.fromarray(one) for one in pictures], return_tensors="pt")
        seen = self._model(**texts, **images)
        return (seen.image_embeds * seen.text_embeds).sum(-1).float().numpy()


def prompt_agreement(clip: ClipAgreement, pictures: np.ndarray, prompt: str) -> np.ndarray:
    """(P,) mean cosine of each person's pictures, uint8 (P, G, H, W, 3), with the prompt that all were drawn from."""
    per_person = [clip.cosines(list(some), [prompt] * len(some)).mean() for some in pictures]
    return np.array(per_person, np.float64)
