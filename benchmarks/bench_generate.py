"""Generating one mini image: the base, with an identity, and other ways to read the same tokens.

`without cache` projects the identity's keys and values anew in every step; `unfused` adds to the output out of place;
`diffusers' own` is the IP-Adapter processor of the installed diffusers (double blocks only, keys and values projected in every
step). All read the same number of tokens, with random weights: time does not depend on what was learned.
"""

import copy

import torch
from harness import command_line, report, time_in_turn
from identity_forms import added_out_of_place, attach_ip_adapter

from omniid.config import load_preset
from omniid.generate import GenerateDefaults, Generator
from omniid.identity import Identity
from omniid.models.flux import layout_of, load_base
from omniid.models.identity_adapter import IdentityAdapter, IdentityUse, attach_identities
from omniid.weights import weights_folder

parser = command_line()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--rounds", type=int, default=7)
arguments = parser.parse_args()

preset = load_preset("mini")
pipeline = load_base(weights_folder("mini") / "base")
adapter = IdentityAdapter.for_transformer(pipeline.transformer, preset.encoder.width)
adapter.encoder_fingerprint = "0" * 64
generator = Generator(
    pipeline,
    adapter,
    GenerateDefaults(
        image_size=preset.base.image_size,
        num_inference_steps=arguments.steps,
        guidance_scale=preset.base.guidance_scale,
        id_guidance=1.0,  # one pass a step
        max_sequence_length=preset.base.max_sequence_length,
    ),
)
random = torch.Generator().manual_seed(0)
tokens = torch.randn(preset.encoder.num_queries, preset.encoder.width, generator=random)
identity = Identity(tokens=tokens, encoder="0" * 64, preset="mini", num_images=1)


def plain(**settings):
    return pipeline(
        "photo of a person, smiling",
        height=preset.base.image_size,
        width=preset.base.image_size,
        num_inference_steps=arguments.steps,
        max_sequence_length=preset.base.max_sequence_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **settings,
    )


@torch.inference_mode()
def uncached():
    """Keys and values for every step, and a sum that is a new tensor."""
    use = IdentityUse(adapter.project(tokens.unsqueeze(0)))

    def project(module, args, kwargs):
        use.kv = adapter.project(tokens.unsqueeze(0))

    hook = pipeline.transformer.register_forward_pre_hook(project, with_kwargs=True)
    try:
        with added_out_of_place(), attach_identities(pipeline.transformer, [use]):
            return plain()
    finally:
        hook.remove()


def diffusers_own():
    """A pipeline like the others', with random IP-Adapter layers in its double blocks."""
    own = copy.deepcopy(pipeline.transformer)
    attach_ip_adapter(own, preset.encoder.width, len(tokens))
    embeds = {"ip_hidden_states": [tokens.unsqueeze(0)]}

    @torch.inference_mode()
    def draw():
        before, pipeline.transformer = pipeline.transformer, own
        try:
            return plain(joint_attention_kwargs=embeds)
        finally:
            pipeline.transformer = before

    return draw


def draw(who):
    return lambda: generator.generate(who, "photo of a person, smiling", seed=0)


cases = {
    "base alone": draw(None),
    "with identity": draw(identity),
    "with identity, unfused, without cache": uncached,
    "diffusers' own, double blocks only": diffusers_own(),
}
times = time_in_turn(cases, rounds=arguments.rounds, warmup=1)
base = times["base alone"]["median_ms"]
layout = layout_of(pipeline.transformer)
report(
    "generate",
    [
        {"case": name, **t, "ms a step": t["median_ms"] / arguments.steps, "of base": t["median_ms"] / base}
        for name, t in times.items()
    ],
    f"{arguments.steps} steps at {preset.base.image_size} px, {len(tokens)} tokens, {layout.num_double_blocks} double and "
    f"{layout.num_single_blocks} single blocks, one pass a step. Target of the first release: at most 6 s on 2 cores.",
    parser,
)
