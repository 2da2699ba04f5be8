"""Generating one mini image at 20 steps, with and without an identity."""

from harness import report, time_in_turn

from omniid.data.synthetic import Person, View, render
from omniid.generate import load_generator
from omniid.models.encoder import load_encoder

encoder, generator = load_encoder("mini"), load_generator("mini")
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
