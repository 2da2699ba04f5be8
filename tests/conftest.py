"""Fixtures shared by all tests: the folder of real data, a tiny preset and records to train on."""

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.config import Preset, load_preset
from omniid.faces.landmarks import NUM_LANDMARKS

if TYPE_CHECKING:
    from omniid.identity import Identity

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, by the first test that picks it: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Several processes take files in this order: the longest first, so that none is left alone at the end.
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real photos and small models; skips where it is missing."""
    folder = Path(os.environ.get("OMNIID_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder}; name its folder in OMNIID_TEST_DATA")
    return folder


TINY = [
    "tower.image_size=32", "tower.patch_size=8", "tower.width=32", "tower.num_layers=2", "tower.num_heads=2", "tower.mlp_dim=64",
    "encoder.num_queries=6", "encoder.width=32", "encoder.num_heads=2",
    "decoder.image_size=32", "decoder.patch_size=4", "decoder.width=32", "decoder.num_heads=2",
    "base.image_size=32", "base.max_sequence_length=24", "base.num_inference_steps=2",
    "base.id_guidance=1.0", "base.joint_guidance=false", "base.noise_scale=1.0", "base.landmark_scale=1.0",
    "base.sizes.num_double_blocks=1", "base.sizes.num_single_blocks=2", "base.sizes.num_heads=2", "base.sizes.head_dim=16",
    "base.sizes.axes_dims=[4, 6, 6]", "base.sizes.t5_width=16", "base.sizes.t5_layers=1", "base.sizes.t5_heads=2",
    "base.sizes.clip_width=16", "base.sizes.clip_layers=1", "base.sizes.clip_heads=2",
    *(f"train.{stage}.{setting}" for stage in ("base", "mtd", "flow", "control", "t2i", "recogniser", "faces") for setting in (
        "batch_identities=4", "num_targets=2", "warmup_steps=2", "steps=8", "save_every=3", "sample_every=4", "log_every=1",
        "precision=fp32", "mirror=0.0", "max_yaw=90.0", "timestep_shift=1.0",
    )),
    "train.base.autoencoder_steps=4", "train.flow.encoder_lr_scale=1.0",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Preset:
    """The mini preset at sizes that take milliseconds."""
    return load_preset("mini", TINY)


@pytest.fixture(scope="session")
def tiny_file(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as a file that commands take."""
    from omniid.config import preset_to_toml

    path = tmp_path_factory.mktemp("preset") / "tiny.toml"
    path.write_text(preset_to_toml(tiny), encoding="utf-8")
    return path


def make_rows(num_people: int, images_per_person: int, size: int, seed: int, split: str) -> list[dict]:
    """Identity records of blob faces: each person is a colour pattern, each image a shift of it."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, size), bool)
    mask[size // 4 : -size // 8, size // 4 : -size // 4] = True
    rows = []
    for person in range(num_people):
        pattern = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((size, size))
        shifts = rng.integers(-2, 3, (images_per_person, 2))
        images = [np.roll(np.asarray(pattern), shift, (0, 1)) for shift in shifts]
        rows.append(
            {
                "identity_id": f"{split}-{person}",
                "images": [encoded(image, "JPEG") for image in images],
                "masks": [encoded(mask, "PNG")] * images_per_person,
                "landmarks": rng.uniform(0, size, (images_per_person, NUM_LANDMARKS, 2)).tolist(),
                "pose": [[0.0, 0.0, 0.0]] * images_per_person,
                "quality": [1.0] * images_per_person,
                "captions": ["photo of a person"] * images_per_person,
                "source": "test",
                "split": split,
            }
        )
    return rows


def encoded(array: np.ndarray, kind: str) -> bytes:
    """An image array as bytes of a file of the given kind."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_rows(rows: list[dict], path: Path) -> None:
    """One Parquet shard."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small identity records with train and validation splits."""
    folder = tmp_path_factory.mktemp("records")
    write_rows(make_rows(10, 6, 32, seed=1, split="train"), folder / "train-00000.parquet")
    write_rows(make_rows(4, 6, 32, seed=2, split="validation"), folder / "validation-00000.parquet")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_weights(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of untrained tiny models, made by the stages' own exports."""
    from omniid.config import preset_to_toml
    from omniid.train.base import AutoencoderStage
    from omniid.train.flow import FlowStage
    from omniid.train.mtd import MTDStage

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    (folder / "preset.toml").write_text(preset_to_toml(tiny), encoding="utf-8")
    MTDStage(tiny).export(folder)
    AutoencoderStage(tiny).export(folder)
    FlowStage(tiny, folder).export(folder)
    return folder


DRAWING_ENCODER = "f" * 64
"""Fingerprint of the encoder whose identities the adapter of `drawing_weights` reads."""


@pytest.fixture(scope="session")
def drawing_weights(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of random tiny models, base and identity adapter, in which every part changes the picture."""
    from omniid.config import preset_to_toml
    from omniid.models.identity_adapter import IdentityAdapter
    from omniid.models.mini_base import build_base
    from omniid.train.base import save_base

    folder = tmp_path_factory.mktemp("drawing")
    pipeline = build_base(tiny.base.sizes, tiny.base.max_sequence_length, ["photo", "of", "a", "person"], seed=0)
    adapter = IdentityAdapter.for_transformer(pipeline.transformer, tiny.encoder.width)
    adapter.encoder_fingerprint = DRAWING_ENCODER
    randomise([*pipeline.transformer.parameters(), *(to_v.weight for to_v in adapter.to_v_id)], seed=0)
    save_base(pipeline, folder / "base")
    adapter.save(folder / "adapter.safetensors")
    (folder / "preset.toml").write_text(preset_to_toml(tiny))
    return folder


@pytest.fixture(scope="session")
def controlled_weights(drawing_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`drawing_weights` with a random landmark ControlNet."""
    from omniid.models.flux import load_base
    from omniid.models.landmark_controlnet import build_landmark_controlnet, save_landmark_controlnet

    folder = tmp_path_factory.mktemp("controlled") / "weights"
    shutil.copytree(drawing_weights, folder)
    controlnet = build_landmark_controlnet(load_base(folder / "base").transformer, 1, 1)
    randomise(controlnet.parameters(), seed=3)
    save_landmark_controlnet(controlnet, folder / "controlnet")
    return folder


@pytest.fixture(scope="session")
def lora_file(drawing_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA for the queries of all blocks of `drawing_weights`, in diffusers' form."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from omniid.models.flux import load_base

    transformer, folder = load_base(drawing_weights / "base").transformer, tmp_path_factory.mktemp("lora")
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
    state = get_peft_model_state_dict(transformer)
    randomise(state.values(), seed=4)
    FluxPipeline.save_lora_weights(folder, state)
    return str(folder / "pytorch_lora_weights.safetensors")


@torch.no_grad()
def randomise(parameters: Iterable[torch.Tensor], seed: int) -> None:
    """Small random values: where training starts parts at zero, nothing could be seen of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


@pytest.fixture(scope="session")
def make_person() -> Callable[..., "Identity"]:
    """Makes identities of random people that `drawing_weights` can draw."""
    from omniid.identity import Identity

    def make(seed: int, encoder: str = DRAWING_ENCODER) -> Identity:
        tokens = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
        return Identity(tokens=tokens, encoder=encoder, preset="mini", num_images=1)

    return make
