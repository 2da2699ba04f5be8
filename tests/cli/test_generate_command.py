"""`omniid generate`: the PNG and its metadata, and one sentence for everything that cannot be."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.generate.watermark import is_marked
from omniid.identity import Identity
from omniid.models.identity_adapter import IdentityAdapter
from omniid.picture_file import read_details


def test_writes_a_picture_that_says_how_it_was_made(drawing_weights, identity, tmp_path, run):
    path = tmp_path / "out.png"
    result = run(
        "--preset", drawing_weights, "--id", identity, "--prompt", "photo of a person", "-o", path, "--seed", 3
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    with Image.open(path) as image:
        assert image.size == (32, 32)
        details = json.loads(image.text["omniid"])
        assert "digitalsourcetype/trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]
    assert details["prompt"] == "photo of a person"
    assert details["seed"] == 3
    assert details["num_inference_steps"] == 2
    assert details["identities"] == [Identity.load(identity).fingerprint()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["id.pt", "out.png"]


def test_no_metadata_leaves_only_the_mark_of_ai(drawing_weights, tmp_path, run):
    path = tmp_path / "out.png"
    assert run("--preset", drawing_weights, "--prompt", "photo", "-o", path, "--no-metadata").exit_code == 0
    with Image.open(path) as image:
        assert set(image.text) == {"XML:com.adobe.xmp"}
        assert "photo" not in image.text["XML:com.adobe.xmp"]


def test_several_images_and_json(drawing_weights, identity, tmp_path, run):
    arguments = ("--num-images", 2, "--size", "48x32", "--steps", 1, "--id-scale", 0.5, "--json")
    result = run(
        "--preset", drawing_weights, "--id", identity, "--prompt", "photo", "-o", tmp_path / "a.png", *arguments
    )
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert [one["path"] for one in written] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert [(one["width"], one["height"], one["seed"]) for one in written] == [(48, 32, 0), (48, 32, 1)]
    for one in written:
        with Image.open(one["path"]) as image:
            assert image.size == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "photo", "--steps", "0"], "0 is not in the range x>=1"),
        (["--prompt", "photo", "--size", "100x64"], "multiples of 16, got 100x64"),
        (["--prompt", "photo", "--size", "big"], "'big' is no size"),
        (["--prompt", "photo", "--id-start", "0.9", "--id-end", "0.1"], "lies before --id-start"),
        (["--prompt", "photo", "-o", "out.jpg"], "does not end in .png"),
        (["--prompt", "photo", "-o", "nowhere/out.png"], "the folder nowhere does not exist"),
        ([], "Missing option '--prompt'"),
        (["--prompt", "photo", "--id-scale", "1,x"], "'1,x' is no strength; write a number"),
        (["--prompt", "photo", "--id-scale", "nan"], "'nan' is no strength"),
        (["--prompt", "photo", "--region", "left"], "1 --region for 0 --id; give one for each"),
        (["--prompt", "photo", "--lora", "a=b"], "'b' is no weight; write FILE=WEIGHT"),
        (["--prompt", "photo", "--grid", "seed=0,1", "--num-images", "2"], "--grid seed=0,1,2, not as --num-images"),
        (["--prompt", "photo", "--precision", "int3"], "'int3' is not one of"),
        (["--prompt", "photo", "--lora", "a.safetensors=nan"], "'nan' is no weight; write FILE=WEIGHT"),
        (["--prompt", "photo", "--lora", "=0.5"], "'=0.5' names no file; write FILE=WEIGHT"),
        (["--prompt", "photo", "--pose", "nan,0,0"], "'nan,0,0' is no pose"),
        (["--prompt", "photo", "--guidance", "nan"], "--guidance: nan is no finite number"),
        (["--prompt", "photo", "--id-start", "nan"], "--id-start: nan is no finite number"),
        (["--prompt", "photo", "--id", "a.pt", "--id-scale", "1", "--id-scale", "2"], "2 --id-scale for 1 --id"),
        (["--prompt", "photo", "--grid", "seed=0,1", "--seed", "5"], "--grid seed and --seed say the same thing"),
        (["--prompt", "photo", "--grid", "steps=1,2", "--steps", "5"], "--grid steps and --steps say the same thing"),
        (
            ["--prompt", "photo", "--id", "a.pt", "--grid", "scale=0,1", "--id-scale", "1"],
            "--grid scale and --id-scale say the same thing",
        ),
        (["--prompt", "photo", "--grid", "scale=0,1"], "--grid scale is of an identity; name one with --id"),
        (["--prompt", "photo", "--grid", "guidance=1,2"], "--grid guidance is of an identity"),
        (
            ["--prompt", "photo", "--id", "a", "--id", "b", "--region", "left", "--region", "right", "--grid", "id"],
            "--grid id draws one person after the other; leave out --region",
        ),
        (
            ["--prompt", "photo", "--id", "a", "--id", "b", "--id-scale", "1", "--id-scale", "2", "--grid", "id"],
            "leave out several --id-scale",
        ),
        (
            ["--prompt", "photo", "--noise-scale", "0.5", "--image", "a.png"],
            "--noise-scale is for pictures drawn from noise alone; with --image use --image-strength",
        ),
        (["--plan", "--engine", "."], "without --engine; leave one out"),
        (["--plan", "--from", "a.png"], "without --from; leave one out"),
    ],
)
def test_wrong_usage(arguments, message, run):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("--id-scale", "0.5", "--id"),
        ("--id-guidance", "2", "--id"),
        ("--joint-guidance", None, "--id"),
        ("--id-start", "0.5", "--id"),
        ("--id-end", "0.5", "--id"),
        ("--id-blocks", "double=0", "--id"),
        ("--negative-id", "a.pt", "--id"),
        ("--region-softness", "0.1", "--region"),
        ("--landmark-scale", "0.5", "--landmarks or --pose"),
        ("--controlnet", "a", "--landmarks or --pose"),
        ("--faces", "files", "a photo as --landmarks"),
        ("--negative-scale", "3", "--negative"),
        ("--image-strength", "0.5", "--image"),
        ("--mask", "a.png", "--image"),
        ("--runtime", "onnx", "--engine"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(option, value, needed, run):
    result = run("--prompt", "photo", option, *([] if value is None else [value]))
    assert result.exit_code == 2
    assert f"{option} does nothing without {needed}; add that, or leave it out" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--id-start", 0.6, "--id-end", 0.9), "none of the 2 steps lies in 0.6 to 0.9, so the identity does nothing"),
        (("--id-scale", "1,0.5,0"), "3 strengths are more than the 2 steps: some are not used"),
    ],
)
def test_strengths_that_no_step_uses_are_said(drawing_weights, identity, tmp_path, options, words, run):
    result = run(
        "--preset", drawing_weights, "--id", identity, "--prompt", "photo", "-o", tmp_path / "out.png", *options
    )
    assert result.exit_code == 0 and words in result.stderr


def test_steps_of_a_picture_to_start_from_are_those_that_run(drawing_weights, identity, tmp_path, run):
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "start.png")
    result = run(
        *("--preset", drawing_weights, "--id", identity, "--prompt", "photo", "-o", tmp_path / "out.png"),
        *("--image", tmp_path / "start.png", "--image-strength", 0.5, "--id-start", 0.5),
    )
    assert result.exit_code == 0 and "none of the 1 steps lies in 0.5 to 1" in result.stderr


def test_guidance_of_a_base_that_takes_none_is_said(drawing_weights, tmp_path, run):
    folder = tmp_path / "weights"
    shutil.copytree(drawing_weights, folder)
    config = folder / "base" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    common = ("--preset", folder, "--prompt", "photo", "-o", tmp_path / "out.png")
    assert "this base takes no guidance: --guidance does nothing" in run(*common, "--guidance", 2).stderr
    assert "guidance" not in run(*common).stderr


def test_missing_identity_weights_and_other_encoders_are_one_sentence(drawing_weights, make_person, tmp_path, run):
    other = tmp_path / "other.pt"
    make_person(1, encoder="e" * 64).save(other)
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 32)).save(photo)
    weights = drawing_weights / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    cases = {
        ("--preset", drawing_weights, "--id", tmp_path / "none.pt"): "none.pt",
        ("--preset", tmp_path / "none"): "no trained weights",
        ("--preset", "mnii"): "neither shipped with the package (mini) nor a folder",
        ("--preset", drawing_weights, "--id", photo): "is a picture, not an identity file; make one of it with",
        ("--preset", drawing_weights, "--adapter", weights): "is no identity adapter of omniid; give the adapter.safet",
        ("--preset", drawing_weights, "--id", other): "encode the photos again",
        ("--preset", drawing_weights, "--adapter", tmp_path / "none.safetensors"): "no identity adapter at",
        ("--preset", drawing_weights, "--base", tmp_path): "cannot be loaded",
        (
            "--preset",
            drawing_weights,
            "--base",
            "nowhere",
        ): "'nowhere' cannot be loaded (it is no folder here, and the hub",
    }
    for arguments, message in cases.items():
        result = run(*arguments, "--prompt", "photo", "-o", tmp_path / "out.png")
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.pt", "photo.jpg"]


def test_strength_follows_schedules_and_blocks(draw):
    plain, _ = draw("--id-scale", 0)
    constant, _ = draw()
    falling, details = draw("--id-scale", "1,0")
    assert details["id_scale"] == [[1.0, 0.0]]
    assert (falling != constant).any() and (falling != plain).any()
    assert (draw("--id-start", 0, "--id-end", 0.5)[0] == falling).all()  # two steps: on, off
    assert (draw("--id-blocks", "double=0,single=0")[0] == plain).all()


def test_two_people_have_regions_and_strengths_of_their_own(draw, identity, other, tmp_path):
    Image.fromarray(np.repeat(np.uint8([[0] * 16 + [255] * 16]), 32, axis=0)).save(tmp_path / "mask.png")
    both, details = draw("--id", other, "--region", "left", "--region", "right")
    assert details["regions"] == ["left", "right"] and len(set(details["identities"])) == 2
    masked, details = draw("--id", other, "--region", "0,0,16,32", "--region", tmp_path / "mask.png")
    assert (masked == both).all() and details["regions"] == ["0,0,16,32", "mask.png"]
    soft, _ = draw("--id", other, "--region", "left", "--region", "right", "--region-softness", 1)
    assert (soft != both).any()
    one, _ = draw("--id", other, "--region", "left", "--region", "right", "--id-scale", 1, "--id-scale", 0)
    alone, _ = draw("--region", "left")
    assert (one == alone).all() and (one != both).any()


def test_negative_prompt_and_negative_identity(draw, other):
    plain, _ = draw()
    for options in (("--negative", "person"), ("--negative-id", other, "--id-guidance", 2)):
        pushed, details = draw(*options)
        assert (pushed != plain).any()
    assert details["negative_identity"] == Identity.load(other).fingerprint()
    assert (draw("--negative", "person", "--negative-scale", 4)[0] != draw("--negative", "person")[0]).any()
    assert draw("--negative", "")[1]["negative_prompt"] == ""


def test_joint_guidance(draw, run, identity, drawing_weights, tmp_path):
    joint, details = draw("--id-guidance", 3, "--joint-guidance")
    alone, plainly = draw("--id-guidance", 3)
    assert (joint != alone).any() and details["joint_guidance"] is True and plainly["joint_guidance"] is False
    arguments = ("--preset", drawing_weights, "--id", identity, "--prompt", "photo", "-o", tmp_path / "out.png")
    result = run(*arguments, "--joint-guidance")
    assert result.exit_code == 0 and "--joint-guidance does nothing while --id-guidance is 1" in result.stderr


def test_pictures_to_start_from(draw, drawing_weights, tmp_path, run):
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    start.save(tmp_path / "start.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    plain, _ = draw()
    Image.new("L", (32, 32), 100).save(tmp_path / "black.png")
    result = run(
        *("--preset", drawing_weights, "--prompt", "photo", "-o", tmp_path / "out.png"),
        *("--image", tmp_path / "start.png", "--mask", tmp_path / "black.png"),
    )
    assert result.exit_code == 1 and "the mask is nowhere white, so nothing would change" in result.stderr
    from_picture, details = draw("--image", tmp_path / "start.png", "--image-strength", 0.5)
    assert (draw("--image", tmp_path / "start.png", "--image-strength", 1)[0] != from_picture).any()
    inpainted, _ = draw("--image", tmp_path / "start.png", "--mask", tmp_path / "mask.png", "--image-strength", 0.5)
    assert (from_picture != plain).any() and (inpainted != plain).any()
    Image.fromarray(np.repeat(np.uint8([[0] * 16 + [255] * 16]), 32, axis=0)).save(tmp_path / "mask.png")
    half, _ = draw("--image", tmp_path / "start.png", "--mask", tmp_path / "mask.png", "--image-strength", 0.5)
    assert (half != inpainted).any()
    assert details["image"] == "start.png" and details["noise_scale"] == 1.0


def test_parts_can_be_named_and_are_recorded(draw, drawing_weights, lora_file, tmp_path, run):
    plain, _ = draw()
    parts = ("--base", drawing_weights / "base", "--adapter", drawing_weights / "adapter.safetensors")
    same, details = draw(*parts)
    assert (same == plain).all() and details["base"] == str(drawing_weights / "base")
    assert (draw("--guidance", 1)[0] != plain).any()
    smooth, details = draw("--noise-scale", 0.5)
    assert (smooth != plain).any() and details["noise_scale"] == 0.5
    adapter = IdentityAdapter.load(drawing_weights / "adapter.safetensors")
    with torch.no_grad():
        adapter.to_v_id[0].weight.mul_(-2)
    adapter.save(tmp_path / "other.safetensors")
    assert (draw("--adapter", tmp_path / "other.safetensors")[0] != plain).any()
    with_lora, details = draw("--lora", f"{lora_file}=0.5")
    assert (with_lora != plain).any() and details["loras"] == [[lora_file, 0.5]]
    assert (draw("--lora", lora_file)[0] != with_lora).any()
    result = run("--preset", drawing_weights, "--prompt", "photo", "--lora", drawing_weights / "adapter.safetensors")
    assert result.exit_code == 1 and "none of its weights is for a part of this base" in result.stderr
    assert (draw(weights=drawing_weights / "preset.toml")[0] == plain).all()
    assert draw("--precision", "fp32", "--offload", "none")[1]["precision"] == "fp32"


@pytest.mark.parametrize("axes", [("seed=0,1,2",), ("scale=0,1", "seed=3,4"), ("id", "guidance=1,2"), ("steps=1,2",)])
def test_grids_are_labelled_sheets(draw, other, axes):
    sheet, details = draw("--id", other, *(word for axis in axes for word in ("--grid", axis)))
    counts = [2 if axis == "id" else axis.count(",") + 1 for axis in axes]
    assert sheet.shape[1] == counts[0] * 38 + 6 and sheet.shape[0] > 32 * (counts[1] if len(counts) > 1 else 1)
    assert details["grid"] == list(axes)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("colour=1",), "'colour=1' is no grid axis"),
        (("seed=a",), "write numbers like seed=1,2,3"),
        (("id",), "give --id at least twice"),
        (("seed=1", "seed=2"), "one or two different axes"),
        (("scale=0,nan",), "'scale=0,nan' is no grid axis; scale takes finite numbers"),
        (("seed=-1",), "seed takes numbers of at least 0"),
        (("steps=0,5",), "steps takes numbers of at least 1"),
    ],
)
def test_grids_that_cannot_be(drawing_weights, identity, tmp_path, axes, words, run):
    options = [word for axis in axes for word in ("--grid", axis)]
    result = run("--preset", drawing_weights, "--id", identity, "--prompt", "p", "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 1 and words in result.stderr and not (tmp_path / "out.png").exists()


def test_the_watermark_survives_the_file_and_can_be_left_out(draw, tmp_path):
    pytest.importorskip("imwatermark")
    marked, details = draw("--size", "128x128", "--steps", 1)
    with Image.open(tmp_path / "drawn.png") as image:
        assert details["watermark"] and is_marked(image)
    plain, details = draw("--size", "128x128", "--steps", 1, "--no-watermark")
    with Image.open(tmp_path / "drawn.png") as image:
        assert not details["watermark"] and not is_marked(image)
    assert 0 < np.abs(marked - plain).mean() < 4
    _, details = draw("--size", "128x128", "--steps", 1, "--grid", "seed=0,1")
    with Image.open(tmp_path / "drawn.png") as image:
        assert details["watermark"] and is_marked(image)


def test_small_pictures_are_said_to_have_no_watermark(drawing_weights, tmp_path, run):
    result = run("--preset", drawing_weights, "--prompt", "photo", "-o", tmp_path / "out.png")
    assert result.exit_code == 0 and "no invisible watermark: " in result.stderr
    assert read_details(tmp_path / "out.png")["watermark"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--precision", "fp8"), "needs an NVIDIA GPU of compute capability 8.9 or newer, and this runs on cpu"),
        (("--precision", "nf4"), "needs a CUDA GPU and bitsandbytes, and this runs on cpu"),
        (("--offload", "model"), "moves weights to a GPU and back, and this runs on cpu"),
        (
            ("--compile", "max-autotune"),
            "--compile max-autotune records CUDA graphs, and this runs on cpu; use default",
        ),
        (("--lora", "none.safetensors"), "the LoRA none.safetensors does not exist"),
        (("--image", "none.png"), "the photo none.png does not exist"),
        (("--from", "none.png"), "the picture none.png does not exist"),
        (("--negative-id", "none.pt", "--id-guidance", "2"), "identity file none.pt does not exist"),
        (("--region", "up"), "'up' is no region"),
        (("--id-blocks", "x=1"), "'x=1' is no scale of blocks"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")
def test_what_this_machine_or_folder_lacks_is_one_sentence(drawing_weights, identity, tmp_path, options, words, run):
    result = run("--preset", drawing_weights, "--id", identity, "--prompt", "p", "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 1 and words in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out.png").exists()


def test_bf16_runs_on_a_cpu_too_and_is_repeated(draw, identity, tmp_path, run, drawn):
    first, details = draw("--precision", "bf16")
    assert details["precision"] == "bf16"
    again = ("--from", tmp_path / "drawn.png", "--id", identity, "-o", tmp_path / "again.png")
    assert run(*again).exit_code == 0 and (drawn(tmp_path / "again.png") == first).all()
    assert run(*again, "--precision", "fp32").exit_code == 0
    assert read_details(tmp_path / "again.png")["precision"] == "fp32"


def test_large_pictures_are_decoded_in_tiles(draw):
    options = ("--size", "1024x32", "--steps", 1)  # a tile has 512 pixels
    whole, _ = draw(*options)
    tiled, details = draw(*options, "--tiling")
    assert details["tiling"] is True and np.abs(whole - tiled).max() > 0 and np.abs(whole - tiled).mean() < 8


@pytest.mark.slow
def test_a_compiled_base_draws_the_same(draw):
    plain, _ = draw()
    compiled, details = draw("--compile", "default")
    assert details["compiled"] == "default" and np.abs(compiled - plain).max() <= 1
    torch.compiler.reset()


def test_memory_that_ends_is_one_sentence(drawing_weights, tmp_path, monkeypatch, run):
    from diffusers import FluxTransformer2DModel

    def fail(self, *args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(FluxTransformer2DModel, "forward", fail)
    result = run("--preset", drawing_weights, "--prompt", "photo", "--num-images", 2, "-o", tmp_path / "out.png")
    assert result.exit_code == 1 and not list(tmp_path.iterdir())
    assert result.stderr == (
        "Error: this machine has too little free memory for drawing; try fewer --num-images or --tiling or "
        "--precision bf16 or a smaller --size\n"
    )


def test_the_plan_of_a_base_is_told_without_drawing(drawing_weights, controlled_weights, run):
    result = run("--plan", "--preset", drawing_weights)
    assert result.exit_code == 0, result.output
    assert "one picture of 32x32 with one identity" in result.stdout
    assert "3 blocks patched; cached keys and values: 6 x 3 blocks of 2 x 16" in result.stdout
    options = ("--size", "64x48", "--num-images", 2, "--id", "a.pt", "--id", "b.pt", "--tiling")
    result = run("--plan", "--preset", controlled_weights, *options)
    assert "2 pictures at once of 64x48 with 2 identities" in result.stdout and "ControlNet" in result.stdout
    assert "decoding in tiles" in result.stdout
    plan = json.loads(run("--plan", "--preset", drawing_weights, "--json").stdout)
    assert plan["kv_shape"] == [3, 1, 6, 2, 16] and {row["precision"] for row in plan["rows"]} == {"bf16", "fp8", "nf4"}
