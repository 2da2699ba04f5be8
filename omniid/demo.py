"""The tour: people the model never saw, encoded, redrawn and generated, as one contact sheet with scores."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from omniid.contact_sheet import contact_sheet
from omniid.evaluate.people import as_pixels, unseen_people
from omniid.evaluate.run import Evaluation, Settings, encode_people, evaluate, identities_of, load_decoder
from omniid.files import atomic_path
from omniid.models.encoder import load_encoder
from omniid.train.mtd import hide_masked
from omniid.weights import weights_folder

NUM_SHOWN, NUM_INPUTS = 6, 3
PROMPTS = (
    "photo of a person.",
    "photo of a person, smiling",
    "photo of a person, looking to the left, blue background",
)


def run_demo(
    folder: str | Path,
    weights: str | Path = "mini",
    say: Callable[[str], None] = lambda text: None,
    settings: Settings | None = None,
) -> Evaluation:
    """Writes `contact_sheet.png` and `metrics.json` into `folder` and returns the scores, all computed in this run."""
    from omniid.generate import load_generator

    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = weights_folder(weights)
    encoder, decoder = load_encoder(source), load_decoder(source)
    has_adapter = (source / "adapter.safetensors").is_file()
    if not has_adapter:
        say("these weights hold no identity adapter: nothing is generated; train one with: omniid train flow")
    say("drawing the contact sheet")
    people = unseen_people(NUM_SHOWN, NUM_INPUTS, 1, encoder.tower_config.image_size)
    visible = decoder.draw_visible(NUM_SHOWN, 1, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        codes = encode_people(encoder, people, NUM_INPUTS)
        drawn = decoder.predict(codes, people.targets, visible)
    columns: dict[str, list[Image.Image]] = {
        **{f"photo {n + 1} (input)": _pictures(people.inputs[:, n]) for n in range(NUM_INPUTS)},
        "another photo": _pictures(people.targets[:, 0]),
        "5 % of it": _pictures(hide_masked(people.targets, visible, decoder.config.patch_size)[:, 0]),
        "redrawn from code + 5 %": _pictures(drawn[:, 0]),
    }
    generator = load_generator(source) if has_adapter else None
    for prompt in PROMPTS if generator else ():
        columns[f"generated: {prompt}"] = [
            generator.generate(identity, prompt, seed=index)[0]
            for index, identity in enumerate(identities_of(encoder, codes, NUM_INPUTS))
        ]
    with atomic_path(folder / "contact_sheet.png") as path:
        contact_sheet(columns, people.names).save(path)
    found = evaluate(source, say=say, settings=settings)
    found.scores |= {"weights": str(weights), "seconds": round(time.monotonic() - started, 1)}
    with atomic_path(folder / "metrics.json") as path:
        path.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in as_pixels(images)]
