"""Pictures by exported transformers: those that PyTorch draws, for every strength, place and number of people."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from omniid.cli.main import main
from omniid.export.manifest import MANIFEST
from omniid.export.onnx import ExportError
from omniid.generate import load_generator
from omniid.generate.errors import GenerateError
from omniid.generate.exported import load_exported_generator
from omniid.generate.schedule import Schedule
from omniid.identity import Identity
from omniid.models.encoder import load_encoder

pytestmark = pytest.mark.slow
PARTS = ("transformer", "adapter", "autoencoder", "clip", "t5")


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory):
    """All parts that draw, in fp32."""
    folder = tmp_path_factory.mktemp("engine")
    table = {}
    for part in PARTS:
        path = exported(part).path
        shutil.copy(path, folder)
        entries = json.loads((path.parent / MANIFEST).read_text())
        table[path.name] = entries["files"][path.name]
    (folder / MANIFEST).write_text(json.dumps(entries | {"files": table}))
    return folder


@pytest.fixture(scope="module")
def ours(trained):
    return load_generator(trained)


@pytest.fixture(scope="module")
def theirs(trained, folder):
    generator = load_exported_generator(folder, trained)
    assert not list(generator.pipeline.transformer.parameters())
    return generator


@pytest.fixture(scope="module")
def people(trained, tiny):
    fingerprint = load_encoder(trained).fingerprint()
    shape = (tiny.encoder.num_queries, tiny.encoder.width)
    tokens = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    return [Identity(tokens=one, encoder=fingerprint, preset="mini", num_images=1) for one in tokens]


def psnr(wanted, got):
    wanted, got = (np.stack([np.asarray(one, np.float64) for one in pictures]) for pictures in (wanted, got))
    return 10 * np.log10(255**2 / max(np.mean((wanted - got) ** 2), 1e-9))


SETTINGS = {
    "schedule over the steps": (1, {"id_scale": Schedule((5.0, 1.0)), "id_end": 0.9}),
    "guidance away from somebody": (1, {"id_guidance": 4.0, "negative": True, "num_images": 2}),
    "guidance by identity and prompt": (1, {"id_guidance": 4.0, "joint_guidance": True, "num_images": 2}),
    "two people in regions": (2, {"regions": ["left", "right"], "id_scale": [6.0, 3.0], "id_blocks": "double=0.5"}),
    "nobody": (0, {"negative_prompt": "a person"}),
    "a picture to start from, under a mask": (
        1,
        {
            "image": Image.linear_gradient("L").convert("RGB"),
            "mask": Image.linear_gradient("L").rotate(90),
            "image_strength": 0.9,
        },
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_picture_is_pytorchs(ours, theirs, people, case):
    count, settings = SETTINGS[case]
    settings = dict(settings)
    if settings.pop("negative", False):
        settings["negative_identity"] = people[2]
    who = people[:count] or None
    pictures = [one.generate(who, "photo of a person", seed=3, **settings) for one in (ours, theirs)]
    assert psnr(*pictures) > 60
    if who:  # or the identities' inputs would prove nothing
        assert psnr(pictures[0], ours.generate(None, "photo of a person", seed=3, num_images=len(pictures[0]))) < 50


def test_different_people_in_one_batch(ours, theirs, people):
    pictures = [one.generate_batch(people[:2], "photo of a person", seeds=[1, 2], width=48) for one in (ours, theirs)]
    assert psnr(*pictures) > 60


def test_parts_of_other_weights_are_refused(trained, folder, people, tiny_weights, theirs, tmp_path):
    with pytest.raises(GenerateError, match=r"exported from other weights.*--(base|adapter)"):
        load_exported_generator(folder, tiny_weights)
    with pytest.raises(GenerateError, match="--adapter"):
        load_exported_generator(folder, trained, adapter=tiny_weights / "adapter.safetensors")
    stranger = Identity(tokens=people[0].tokens, encoder="0" * 64, preset="mini", num_images=1)
    with pytest.raises(Exception, match="made by encoder 000000000000"):
        theirs.generate(stranger, "photo of a person")
    with pytest.raises(GenerateError, match="no landmarks"):
        theirs.generate(people[0], "photo of a person", landmarks=np.zeros((66, 2)))


def test_folders_that_cannot_draw_are_refused(trained, folder, tmp_path):
    with pytest.raises(ExportError, match=f"no {MANIFEST}"):
        load_exported_generator(tmp_path, trained)
    with pytest.raises(ExportError, match="no transformer in fp8"):
        load_exported_generator(folder, trained, precision="fp8")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with open(copy / "clip_fp32.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(ExportError, match="not the file"):
        load_exported_generator(copy, trained)
    table = json.loads((copy / MANIFEST).read_text())
    entry = table["files"]["transformer_fp32.onnx"]
    table["files"]["other.onnx"] = entry | {"file": "other.onnx"}
    (copy / MANIFEST).write_text(json.dumps(table))
    with pytest.raises(ExportError, match="several files of the transformer"):
        load_exported_generator(copy, trained)


@pytest.fixture
def draw(trained, folder, people, tmp_path):
    """Runs the command with the exports and further options."""
    people[0].save(tmp_path / "id.pt")
    arguments = ["generate", "--id", tmp_path / "id.pt", "--prompt", "photo of a person", "--preset", trained]
    arguments += ["--engine", folder, "-o", tmp_path / "out.png"]
    return lambda *more: CliRunner().invoke(main, list(map(str, [*arguments, *more])))


def test_the_command(draw, folder, people, tmp_path):
    result = draw("--json")
    assert result.exit_code == 0, result.output
    details = json.loads(result.stdout)[0]
    assert details["precision"] == "fp32" and details["engine"] == str(folder)
    first = (tmp_path / "out.png").read_bytes()
    assert draw("--runtime", "onnx", "--precision", "fp32", "--offload", "none").exit_code == 0
    with Image.open(tmp_path / "out.png") as again, Image.open(io.BytesIO(first)) as image:
        assert (np.asarray(again) == np.asarray(image)).all()
    repeated = ["generate", "--from", tmp_path / "out.png", "--id", tmp_path / "id.pt", "-o", tmp_path / "again.png"]
    result = CliRunner().invoke(main, list(map(str, repeated)))
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "again.png") as again, Image.open(io.BytesIO(first)) as image:
        assert (np.asarray(again) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lora", "a.safetensors"), "--lora cannot be used with --engine; merge it with: omniid export --lora"),
        (("--controlnet", "a", "--pose", "0,0,0"), "an exported transformer takes no --landmarks or --pose"),
        (("--pose", "0,0,0"), "an exported transformer takes no --landmarks or --pose; leave --engine out for them"),
        (("--landmarks", "face.json"), "an exported transformer takes no --landmarks or --pose"),
        (("--offload", "model"), "--offload cannot be used with --engine; an exported transformer stays where"),
        (("--offload", "sequential"), "--offload cannot be used with --engine"),
        (("--compile", "default"), "--compile cannot be used with --engine; an exported transformer is not compiled"),
        (("--tiling",), "--tiling cannot be used with --engine; an exported autoencoder decodes whole pictures"),
        (("--precision", "bf16"), "holds no transformer in bf16 for this runtime; write it with: omniid export onnx"),
    ],
)
def test_what_engines_do_not_take_is_one_sentence(draw, tmp_path, options, message):
    result = draw(*options)
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_engines_without_a_gpu_are_one_sentence(draw, tmp_path):
    result = draw("--runtime", "trt")
    assert result.exit_code == 1 and "this machine has none" in result.stderr and not (tmp_path / "out.png").exists()
