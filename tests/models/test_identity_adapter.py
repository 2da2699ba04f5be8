"""The identity adapter: changes nothing untrained, follows its formula, and leaves the transformer as it was."""

import json

import pytest
import torch
from safetensors.torch import save_file

from omniid.models.flux import TextEmbedding, attention_modules
from omniid.models.identity_adapter import AdapterError, IdentityAdapter, IdentityUse, attach_identities

WIDTH, HEADS, HEAD_DIM = 24, 2, 16
TEXT, ROWS, COLUMNS = 5, 2, 3


@pytest.fixture(scope="module")
def transformer():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if "norm_k.weight" in name or "norm_q.weight" in name:
                parameter.add_(1)
    return model.requires_grad_(False)


@pytest.fixture
def adapter(transformer):
    """An adapter as after training: its values are not zero."""
    adapter = IdentityAdapter.for_transformer(transformer, WIDTH)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for to_v in adapter.to_v_id:
            to_v.weight.copy_(torch.randn(to_v.weight.shape, generator=generator) * 0.3)
    return adapter


def tokens(batch: int = 1, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, seed: int = 3) -> dict:
    from omniid.models.flux import image_ids

    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, ROWS * COLUMNS, 8, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "guidance": torch.ones(batch),
        "img_ids": image_ids(2 * ROWS, 2 * COLUMNS),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def output(transformer, uses=None, **arguments) -> torch.Tensor:
    if uses is None:
        return transformer(**arguments)[0]
    with attach_identities(transformer, uses):
        return transformer(**arguments)[0]


def test_an_untrained_adapter_changes_no_bit(transformer):
    kv = IdentityAdapter.for_transformer(transformer, WIDTH).project(tokens())
    assert torch.equal(output(transformer, [IdentityUse(kv)], **inputs()), output(transformer, **inputs()))


def test_scale_zero_and_no_identity_change_no_bit(transformer, adapter):
    plain = output(transformer, **inputs())
    kv = adapter.project(tokens())
    assert not torch.equal(output(transformer, [IdentityUse(kv)], **inputs()), plain)
    for uses in ([], [IdentityUse(kv, 0.0)], [IdentityUse(kv, torch.zeros(1, ROWS * COLUMNS))]):
        assert torch.equal(output(transformer, uses, **inputs()), plain)


def test_strength_acts_on_the_next_call(transformer, adapter):
    plain, kv = output(transformer, **inputs()), adapter.project(tokens())
    use = IdentityUse(kv)
    with attach_identities(transformer, [use]):
        use.strength = 0.0
        assert torch.equal(transformer(**inputs())[0], plain)
        use.strength = 1.0
        assert not torch.equal(transformer(**inputs())[0], plain)


def test_blocks_have_scales_of_their_own(transformer, adapter):
    plain, kv = output(transformer, **inputs()), adapter.project(tokens())
    assert torch.equal(output(transformer, [IdentityUse(kv, block_scales=[0.0] * 4)], **inputs()), plain)
    halves = output(transformer, [IdentityUse(kv, 0.5)], **inputs())
    assert torch.equal(output(transformer, [IdentityUse(kv, block_scales=[0.5] * 4)], **inputs()), halves)
    only_last = output(transformer, [IdentityUse(kv, block_scales=[0.0, 0.0, 0.0, 1.0])], **inputs())
    assert not torch.equal(only_last, plain) and not torch.equal(only_last, halves)
    with pytest.raises(ValueError, match="3 block scales for a transformer of 4 blocks"):
        output(transformer, [IdentityUse(kv, block_scales=[1.0] * 3)], **inputs())


def test_guidance_moves_away_from_the_negative_identity(transformer, adapter):
    use, other = (IdentityUse(adapter.project(tokens(seed=seed))) for seed in (2, 3))
    own, away = (output(transformer, [one], **inputs()) for one in (use, other))
    with attach_identities(transformer, [use], guidance=3.0, negative=[other]):
        guided = transformer(**inputs())[0]
    torch.testing.assert_close(guided, away + 3 * (own - away))
    with torch.no_grad(), attach_identities(transformer, [use]):  # without gradients it is added in place
        torch.testing.assert_close(transformer(**inputs())[0], own)


def test_guidance_moves_away_from_another_text_where_an_identity_acts(transformer, adapter):
    use, given, other = IdentityUse(adapter.project(tokens(2))), inputs(2), inputs(seed=5)
    nothing = TextEmbedding(other["encoder_hidden_states"], other["pooled_projections"])
    said = {"encoder_hidden_states": nothing.tokens.repeat(2, 1, 1), "pooled_projections": nothing.pooled.repeat(2, 1)}
    own, away = output(transformer, [use], **given), output(transformer, [], **(given | said))
    nobody = output(transformer, [], **given)
    with attach_identities(transformer, [use], guidance=3.0, guide_text=nothing) as attached:
        torch.testing.assert_close(transformer(**given)[0], away + 3 * (own - away))
        attached.uses[0].strength = 0.0
        assert torch.equal(transformer(**given)[0], nobody)


def test_keys_and_values_made_once_serve_every_step(transformer, adapter):
    kv = adapter.project(tokens())
    for seed in (4, 5):
        fresh = output(transformer, [IdentityUse(adapter.project(tokens()))], **inputs(seed=seed))
        assert torch.equal(output(transformer, [IdentityUse(kv)], **inputs(seed=seed)), fresh)


def test_a_batch_of_two_people_equals_two_single_runs(transformer, adapter):
    both = output(transformer, [IdentityUse(adapter.project(tokens(2)))], **inputs(2))
    for index in range(2):
        one = {
            name: value[index : index + 1] if isinstance(value, torch.Tensor) and "ids" not in name else value
            for name, value in inputs(2).items()
        }
        kv = adapter.project(tokens(2)[index : index + 1])
        torch.testing.assert_close(output(transformer, [IdentityUse(kv)], **one)[0], both[index], atol=1e-5, rtol=1e-5)


def test_one_identity_serves_a_batch_and_repeat_copies_in_a_row(transformer, adapter):
    kv = adapter.project(tokens())
    torch.testing.assert_close(
        output(transformer, [IdentityUse(kv)], **inputs(3)),
        output(transformer, [IdentityUse(kv.repeat(3))], **inputs(3)),
    )
    two = adapter.project(tokens(2)).repeat(2)
    assert torch.equal(two.keys[:, 0], two.keys[:, 1])
    assert not torch.equal(two.keys[:, 1], two.keys[:, 2])


@pytest.mark.parametrize("block", range(4))
def test_each_block_follows_the_formula(transformer, adapter, block):
    """O_img += s softmax(Q K^T / sqrt(d)) V before the output projection, in float64 from the block's own query."""
    seen = {}
    attention = attention_modules(transformer)[block]
    is_double = block < 2
    scale = torch.linspace(0.2, 1.4, ROWS * COLUMNS).unsqueeze(0)
    people = [(adapter.project(tokens(seed=6)), 0.7), (adapter.project(tokens(seed=7)), scale)]

    def keep(module, args, kwargs, result):
        seen["kwargs"], seen["result"] = kwargs, result

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    try:
        output(transformer, [IdentityUse(kv, s) for kv, s in people], **inputs())
    finally:
        hook.remove()
    # The plain block on the same input, its query and what attention gives before the projection.
    plain = _double_precision_attention(attention, **seen["kwargs"])
    image = plain["output"][:, -ROWS * COLUMNS :]
    for kv, s in people:
        q, k, v = plain["query"][:, -ROWS * COLUMNS :], kv.keys[block].double(), kv.values[block].double()
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5).softmax(-1)
        strength = s.double()[..., None, None] if isinstance(s, torch.Tensor) else s
        image = image + strength * torch.einsum("bhqk,bkhd->bqhd", weights, v)
    if is_double:
        linear = attention.to_out[0]
        expected = image.flatten(2) @ linear.weight.double().T + linear.bias.double()
        actual = seen["result"][0]
    else:
        expected = torch.cat([plain["output"][:, :TEXT], image], dim=1).flatten(2)
        actual = seen["result"]
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-4)


def _double_precision_attention(attention, hidden_states, image_rotary_emb, encoder_hidden_states=None) -> dict:
    """FLUX's joint attention in plain float64: the query after norm and rotary phase, the output before projection."""

    def project(linear, x):
        return (x.double() @ linear.weight.double().T + linear.bias.double()).unflatten(-1, (HEADS, HEAD_DIM))

    def norm(module, x):
        return x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight.double()

    def rotate(x):
        cos, sin = (part.double()[:, None] for part in image_rotary_emb)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin

    q, k, v = (project(getattr(attention, name), hidden_states) for name in ("to_q", "to_k", "to_v"))
    q, k = norm(attention.norm_q, q), norm(attention.norm_k, k)
    if encoder_hidden_states is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        tq, tk, tv = (project(getattr(attention, name), encoder_hidden_states) for name in names)
        tq, tk = norm(attention.norm_added_q, tq), norm(attention.norm_added_k, tk)
        q, k, v = torch.cat([tq, q], 1), torch.cat([tk, k], 1), torch.cat([tv, v], 1)
    q, k = rotate(q), rotate(k)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5).softmax(-1)
    return {"query": q, "output": torch.einsum("bhqk,bkhd->bqhd", weights, v)}


def test_text_tokens_of_the_first_block_do_not_see_the_identity(transformer, adapter):
    kept = []
    hook = transformer.transformer_blocks[0].attn.register_forward_hook(lambda m, a, result: kept.append(result[1]))
    try:
        output(transformer, **inputs())
        output(transformer, [IdentityUse(adapter.project(tokens()))], **inputs())
    finally:
        hook.remove()
    assert torch.equal(*kept)


def test_afterwards_the_transformer_is_as_before_even_after_an_error(transformer, adapter):
    processors, plain = [m.processor for m in attention_modules(transformer)], output(transformer, **inputs())
    kv = adapter.project(tokens())
    with pytest.raises(RuntimeError, match="stop"), attach_identities(transformer, [IdentityUse(kv)]):
        raise RuntimeError("stop")
    assert [m.processor for m in attention_modules(transformer)] == processors
    assert not transformer._forward_pre_hooks
    assert torch.equal(output(transformer, **inputs()), plain)


def test_gradients_reach_tokens_and_every_weight(transformer, adapter):
    code = tokens().requires_grad_()
    output(transformer, [IdentityUse(adapter.project(code))], **inputs()).square().sum().backward()
    assert code.grad.abs().sum() > 0
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_untrained_values_get_gradients(transformer):
    adapter = IdentityAdapter.for_transformer(transformer, WIDTH)
    output(transformer, [IdentityUse(adapter.project(tokens()))], **inputs()).square().sum().backward()
    assert all(to_v.weight.grad.abs().sum() > 0 for to_v in adapter.to_v_id)


def test_key_norms_start_as_the_blocks_own(transformer):
    adapter = IdentityAdapter.for_transformer(transformer, WIDTH)
    for norm, attention in zip(adapter.norm_k_id, attention_modules(transformer), strict=True):
        assert torch.equal(norm.weight, attention.norm_k.weight)


def test_flux_dev_has_57_blocks_and_448_million_parameters():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        adapter = IdentityAdapter.for_transformer(flux, 1280)
    assert len(attention_modules(flux)) == adapter.num_blocks == 57
    assert round(sum(parameter.numel() for parameter in adapter.parameters()) / 1e6) == 448
    assert sum(parameter.numel() for parameter in flux.parameters()) == pytest.approx(11.90e9, rel=1e-3)


def test_saved_and_loaded_it_is_the_same(transformer, adapter, tmp_path):
    adapter.encoder_fingerprint = "abc"
    adapter.save(tmp_path / "adapter.safetensors", torch.float32)
    loaded = IdentityAdapter.load(tmp_path / "adapter.safetensors")
    assert loaded.encoder_fingerprint == "abc"
    assert torch.equal(loaded.project(tokens()).keys, adapter.project(tokens()).keys)
    assert torch.equal(loaded.project(tokens()).values, adapter.project(tokens()).values)


def test_another_base_is_refused():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        other = FluxTransformer2DModel(num_layers=1, num_single_layers=2)
    with pytest.raises(AdapterError, match="trained for another base model: it has 4 blocks of 2 heads"):
        IdentityAdapter(WIDTH, 4, HEADS, HEAD_DIM).check_base(other)


def test_tokens_of_another_width_are_refused(adapter):
    with pytest.raises(ValueError, match=r"must be \(B, L, 24\), got \(1, 7, 25\)"):
        adapter.project(torch.zeros(1, 7, 25))


def test_unusable_files_are_named(adapter, tmp_path):
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterError, match="there is no identity adapter at"):
        IdentityAdapter.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(AdapterError, match="is no identity adapter"):
        IdentityAdapter.load(path)
    adapter.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="is damaged"):
        IdentityAdapter.load(path)
    sizes = {"format_version": 99, "width": 1, "num_blocks": 1, "num_heads": 1, "head_dim": 1, "encoder": ""}
    save_file({"x": torch.zeros(1)}, path, metadata={"omniid_adapter": json.dumps(sizes)})
    with pytest.raises(AdapterError, match="format 99"):
        IdentityAdapter.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"omniid_adapter": json.dumps(sizes | {"format_version": 1})})
    with pytest.raises(AdapterError, match="lacks weights"):
        IdentityAdapter.load(path)
