"""From a request to files: what `omniid generate` does once its options are read."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omniid.faces import open_photo
from omniid.generate.errors import GenerateError
from omniid.generate.grid import Axis, draw_grid
from omniid.generate.loading import load_generator
from omniid.generate.request import Request
from omniid.generate.watermark import mark, obstacle
from omniid.identity import Identity
from omniid.picture_file import save_picture

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(kw_only=True, slots=True)
class Sources:
    """Files that a request needs beside the weights; none of them goes into a picture's metadata."""

    identities: Sequence[Path] = ()
    negative_identity: Path | None = None
    image: Path | None = None
    mask: Path | None = None
    landmarks: Path | None = None
    """JSON or a photo."""
    backend: str = "offline"
    """Face analyzer for landmarks of a photo."""


@dataclass(kw_only=True, slots=True)
class Weights:
    """Arguments of `load_generator` that decide a picture, as the user gave them."""

    preset: str = "mini"
    base: str | None = None
    adapter: str | None = None
    controlnet: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    precision: str = "auto"
    tiling: bool = False
    engine: str | None = None
    """Folder of exports that draw instead of the base's transformer."""
    runtime: str | None = None
    """What runs them."""

    def load(self, offload: str, compile_mode: str | None):
        if self.engine is not None:
            return self._load_exported(offload, compile_mode)
        return load_generator(
            self.preset,
            base=self.base,
            adapter=self.adapter,
            precision=self.precision,
            offload=offload,
            controlnet=self.controlnet,
            loras=self.loras,
            compile_mode=compile_mode,
            tiling=self.tiling,
        )

    def _load_exported(self, offload: str, compile_mode: str | None):
        from omniid.generate.exported import load_exported_generator

        wrong = {
            "--lora": (self.loras, "merge it with: omniid export --lora"),
            "--controlnet": (self.controlnet, "leave one of them out"),
            "--offload": (offload not in ("auto", "none"), "an exported transformer stays where it runs"),
            "--compile": (compile_mode, "an exported transformer is not compiled again"),
            "--tiling": (self.tiling, "an exported autoencoder decodes whole pictures"),
        }
        for option, (is_given, remedy) in wrong.items():
            if is_given:
                raise GenerateError(f"{option} cannot be used with --engine; {remedy}")
        return load_exported_generator(
            self.engine, self.preset, self.base, self.adapter, runtime=self.runtime, precision=self.precision
        )


def run(
    request: Request,
    sources: Sources,
    weights: Weights,
    output: Path,
    *,
    num_images: int = 1,
    grid: Sequence[str] = (),
    offload: str = "auto",
    compile_mode: str | None = None,
    metadata: bool = True,
    watermark: bool = True,
    repeated: dict | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Draws and writes PNG files; what was written, one table for each.

    repeated: metadata of the picture that the request repeats. say: told in a sentence what the user should know.
    Raises OmniIDError for everything that cannot be, before anything is written.
    """
    identities = [Identity.load(path) for path in sources.identities]
    negative = Identity.load(sources.negative_identity) if sources.negative_identity else None
    if repeated is not None:
        _check_repeated(repeated, sources, identities, say)
    image, mask = (open_photo(path).image if path else None for path in (sources.image, sources.mask))
    axes = [Axis.parse(text, list(map(str, sources.identities))) for text in grid]
    if weights.engine is not None and (sources.landmarks or request.pose or request.landmarks):
        raise GenerateError("an exported transformer takes no --landmarks or --pose; leave --engine out for them")
    generator = weights.load(offload, compile_mode)
    if sources.landmarks or request.pose:
        generator.pipelines.check_controlnet()  # before a face is looked for
    if weights.precision == "auto" and generator.placement.precision != "fp32":
        say(f"precision {generator.placement.precision}: {generator.placement.reason}")
    asks_guidance = request.guidance_scale is not None and repeated is None
    if asks_guidance and not getattr(generator.pipeline.transformer.config, "guidance_embeds", True):
        say("this base takes no guidance: --guidance does nothing")
    asks_joint = request.joint_guidance and repeated is None and not grid
    request = request.completed(generator, sources.landmarks, sources.backend, image is not None)
    if asks_joint and request.id_guidance == 1:
        say("--joint-guidance does nothing while --id-guidance is 1")
    for remark in request.remarks(identities, image is not None):
        say(remark)
    hindrance = obstacle(request.width, request.height) if watermark else None
    facts = {
        **{name: value for name, value in dataclasses.asdict(weights).items() if value},
        "precision": generator.placement.precision,
        **({"compiled": compile_mode} if compile_mode else {}),
        "watermark": watermark and hindrance is None,
        **{name: path.name for name in ("image", "mask") if (path := getattr(sources, name))},
    }
    shared = {"negative_identity": negative, "image": image, "mask": mask}
    if grid:
        by_name = dict(zip(map(str, sources.identities), identities, strict=True))

        def draw(values: dict) -> "Image":
            one, who = _at(request, values), [by_name[values["id"]]] if "id" in values else identities
            return one.draw(generator, who, **shared)[0]

        sheet = draw_grid(axes, draw, say)
        hindrance = obstacle(*sheet.size) if watermark else None  # the mark is read from the sheet as a whole
        _tell(hindrance, say)
        facts["watermark"] = watermark and hindrance is None
        details = request.details(identities, negative, grid=list(grid), **facts)
        return [_write(_finished(sheet, facts["watermark"]), output, details, metadata)]
    pictures = request.draw(generator, identities, num_images, **shared)
    _tell(hindrance, say)
    written = []
    for index, drawn in enumerate(pictures):
        path = output if num_images == 1 else output.with_stem(f"{output.stem}-{index}")
        details = dataclasses.replace(request, seed=request.seed + index).details(identities, negative, **facts)
        written.append(_write(_finished(drawn, facts["watermark"]), path, details, metadata))
    return written


def _tell(hindrance: str | None, say: Callable[[str], None]) -> None:
    if hindrance is not None:
        say(f"no invisible watermark: {hindrance}")


def _at(request: Request, values: dict) -> Request:
    """The request at one place of a grid."""
    changes: dict = {}
    for name, value in values.items():
        changes |= {
            "seed": {"seed": value},
            "scale": {"id_scale": ((value,),)},
            "guidance": {"id_guidance": value},
            "steps": {"num_inference_steps": value},
            "id": {},
        }[name]
    return dataclasses.replace(request, **changes)


def _finished(image: "Image", watermark: bool) -> "Image":
    return mark(image) if watermark else image


def _write(image: "Image", path: Path, details: dict, metadata: bool) -> dict:
    save_picture(image, path, details if metadata else None)
    return {"path": str(path), **details, "width": image.width, "height": image.height}


def _check_repeated(details: dict, sources: Sources, identities: list[Identity], say: Callable[[str], None]) -> None:
    """Whether the files are given that the repeated picture was made from; other ones are allowed, but said."""
    if "grid" in details:
        raise GenerateError("a grid is not repeated; give --grid and its settings again")
    wanted = details.get("identities", [])
    if len(wanted) != len(identities):
        prints = ", ".join(one[:12] for one in wanted)
        raise GenerateError(
            f"the picture was made with {len(wanted)} identities ({prints}), whose files are not in it; name as many with --id"
            if wanted
            else "the picture was made without an identity; leave out --id, or do not use --from"
        )
    for option, name in (("--negative-id", "negative_identity"), ("--image", "image"), ("--mask", "mask")):
        if name in details and getattr(sources, name) is None:
            raise GenerateError(
                f"the picture was made with {option} {details[name][:40]}, which is not in it; name it again"
            )
    for one, fingerprint in zip(identities, wanted, strict=True):
        if one.fingerprint() != fingerprint:
            say(f"identity {one.fingerprint()[:12]} takes the place of {fingerprint[:12]}")
