"""Presets: what is read, what is refused and how."""

import pytest

from omniid.config import ConfigError, load_preset, preset_to_toml


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_presets_survive_a_round_trip(name, tmp_path):
    preset = load_preset(name)
    path = tmp_path / "copy.toml"
    path.write_text(preset_to_toml(preset), encoding="utf-8")
    assert load_preset(path) == preset


def test_overrides_of_every_type():
    changed = load_preset(
        "mini",
        [
            "train.mtd.lr=1e-4",
            "train.mtd.num_inputs=[2, 5]",
            "base.path=some/folder",
            "train.mtd.steps=7",
            "encoder.mlp_ratio=2",
        ],
    )
    assert changed.train.mtd.lr == 1e-4
    assert changed.train.mtd.num_inputs == (2, 5)
    assert changed.base.path == "some/folder"
    assert changed.train.mtd.steps == 7
    assert changed.encoder.mlp_ratio == 2.0


def test_targets_keep_enough_tokens_to_read_the_pose():
    decoder = load_preset("mini").decoder
    assert decoder.num_patches == 256 and decoder.num_visible == 13


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.mtd.learning_rate=1", "unknown key 'train.mtd.learning_rate'"),
        ("train.mtd.warmup=1", "did you mean warmup_steps"),
        ("train.mtd.steps=many", "train.mtd.steps must be of type int, got 'many'"),
        ("train.mtd.steps=0", "steps must be at least 1"),
        ("train.mtd.num_inputs=[3, 1]", "num_inputs must be a range"),
        ("train.mtd.num_inputs=3", "must be a list of 2"),
        ("train.mtd.precision=fp16", "precision must be auto, fp32 or bf16"),
        ("tower.patch_size=17", "not a multiple of tower.patch_size"),
        ("decoder.mask_ratio=1.0", "mask_ratio must lie between"),
        ("encoder.num_heads=5", "not a multiple of encoder.num_heads"),
        ("base.sizes.head_dim=20", "must sum to head_dim"),
        ("base.noise_scale=0", "base.noise_scale must be above 0, got 0"),
        ("train.control.control_double_blocks=0", "the landmark ControlNet needs a block of some kind"),
        ("name.x=3", "'name' is a value"),
        ("steps", "--set takes key=value"),
    ],
)
def test_bad_overrides_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_preset("mini", [override])


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="use one of mini, paper"):
        load_preset("maxi")


def test_bad_files(tmp_path):
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match="does not exist"):
        load_preset(path)
    path.write_text("a = = b")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_preset(path)
    path.write_text('name = "x"')
    with pytest.raises(ConfigError, match="lacks tower"):
        load_preset(path)
