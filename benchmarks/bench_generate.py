"""Generating one mini image at 20 steps, with and without an identity."""

from harness import report, time_in_turn

from omniid.config import load_preset
from omniid.data.synthetic import Person, View, render
from omniid.generate import GenerateDefaults, Generator
from omniid.models.encoder import load_encoder
from omniid.models.flux import load_base
from omniid.models.identity_adapter import IdentityAdapter
from omniid.weights import weights_folder

encoder = load_encoder("mini")
pipeline = load_base(weights_folder("mini") / "base")
# Time does not depend on what an adapter learned, so an untrained one serves.
adapter = IdentityAdapter.for_transformer(pipeline.transformer, encoder.config.width)
adapter.encoder_fingerprint = encoder.fingerprint()
preset = load_preset("mini").base
defaults = GenerateDefaults(
    preset.image_size, preset.num_inference_steps, preset.guidance_scale, preset.max_sequence_length
)
generator = Generator(pipeline, adapter, defaults)
size = encoder.tower_config.image_size
identity = encoder.encode_crops([render(Person.sample(7), View.sample(seed), size=size).image for seed in range(3)])


def draw(who):
    return lambda: generator.generate(who, "photo of a person, smiling", seed=0, num_inference_steps=20)


times = time_in_turn({"base alone": draw(None), "with identity": draw(identity)}, rounds=7, warmup=1)
base = times["base alone"]["median_ms"]
report(
    "generate",
    [{"case": name, **t, "of base": t["median_ms"] / base} for name, t in times.items()],
    "Target of the first release: at most 6 s on 2 cores.",
)
