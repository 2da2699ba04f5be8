"""Projection and masked L1: native and Triton forms against float64, rows without face pixels, gradients, refusals."""

import pytest
import torch

from omniid.kernels import patch_l1 as module
from omniid.kernels._native_library import library
from omniid.kernels.patch_l1 import PatchTiles, patch_l1, patch_l1_reference, patch_tiles

# rows, hidden width, values of a patch, share of rows with face pixels; the last ones cross a block of rows
SHAPES = [
    (1, 1, 1, 1.0),
    (7, 5, 3, 0.5),
    (31, 64, 12, 1.0),
    (257, 33, 129, 0.5),
    (1031, 24, 48, 1.0),
    (2100, 17, 27, 0.6),
]
NAMES = ("loss", "hidden", "weight", "bias", "pixels")


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation that runs, `request.param`."""
    if request.param == "native" and library() is None:
        pytest.skip("the native library is not built")
    if request.param == "triton" and request.getfixturevalue("triton_device") == "cuda":
        pytest.skip("tensors on the CPU need Triton's interpreter; test_triton_on_a_gpu runs on the GPU")
    monkeypatch.setenv("OMNIID_KERNELS", request.param)
    return request.param


def implementations(*names):
    return pytest.mark.parametrize("implementation", names, indirect=True)


FAST = implementations("native", "triton")


def draw(shape, generator, dtype=torch.float32, pixels_dtype=torch.float32):
    """hidden, weight, bias, pixels and face_mask."""
    rows, width, values, share = shape
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(values, width, generator=generator) * width**-0.5).to(dtype)
    bias = torch.randn(values, generator=generator).to(dtype)
    pixels = torch.randn(rows, values, generator=generator).to(pixels_dtype)
    has_face = torch.rand(rows, 1, generator=generator) < share
    return hidden, weight, bias, pixels, has_face & (torch.rand(rows, values, generator=generator) < 0.7)


def loss_and_gradients(function, *inputs, upstream=0.7):
    """The loss and the gradients of hidden, weight, bias and pixels, under an incoming gradient that is not one."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    loss = function(*leaves, inputs[4])
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(upstream, dtype=loss.dtype))


@pytest.mark.parametrize("pixels_dtype", [torch.float32, torch.bfloat16], ids=["pixels fp32", "pixels bf16"])
# bf16 in Triton on a GPU only: its interpreter multiplies bf16 wrongly
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)],
    ids=["native-fp32", "native-bf16", "triton-fp32", "triton-fp16"],
    indirect=["implementation"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(implementation, shape, dtype, pixels_dtype, generator, assert_accurate):
    inputs = draw(shape, generator, dtype, pixels_dtype)
    kept = [x.clone() for x in inputs]
    exact = loss_and_gradients(patch_l1_reference, *(x.double() for x in inputs[:4]), inputs[4])
    plain = loss_and_gradients(patch_l1_reference, *inputs)
    got = loss_and_gradients(patch_l1, *inputs)
    for name, wanted, torchs, ours in zip(NAMES, exact, plain, got, strict=True):
        assert ours.dtype == torchs.dtype, name
        if implementation == "triton":  # its interpreter's products are NumPy's, which sum in an order of their own
            assert_accurate(name, ours, torchs, wanted)
            continue
        error, plain_error = ((x.double() - wanted).norm() for x in (ours, torchs))
        ulps = 1 if name == "loss" else 1 / 4  # one number may be a whole one off, many are not at once
        allowed = 1.2 * plain_error + torch.finfo(ours.dtype).eps * ulps * wanted.norm()
        assert error <= allowed, f"{name}: error {error:.3g}, torch {plain_error:.3g}, allowed {allowed:.3g}"
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("rows", [0, 5])
@FAST
def test_without_face_pixels_the_loss_and_gradients_are_zero(implementation, rows, generator):
    inputs = draw((rows, 4, 3, 0.0), generator)
    for value in loss_and_gradients(patch_l1, *inputs):
        assert not value.any()


@pytest.mark.parametrize("layout", ["unaligned", "transposed", "values apart", "repeated"])
@FAST
def test_any_layout(implementation, layout, generator):
    *floats, mask = draw((33, 20, 18, 0.6), generator)
    if layout == "unaligned":
        floats = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in floats]
        mask = torch.cat([mask.flatten()[:1], mask.flatten()])[1:].view(mask.shape)
    elif layout == "transposed":
        floats, mask = [x.t().contiguous().t() for x in floats], mask.t().contiguous().t()
    elif layout == "values apart":
        floats = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in floats]
    else:
        floats[0], floats[3], mask = (x[:1].expand_as(x) for x in (floats[0], floats[3], mask))
    expected = loss_and_gradients(patch_l1_reference, *(x.contiguous() for x in floats), mask.contiguous())
    for name, wanted, got in zip(NAMES, expected, loss_and_gradients(patch_l1, *floats, mask), strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


@FAST
def test_every_value_is_written(implementation, poisoned, generator):
    inputs = draw((1100, 8, 6, 0.5), generator)
    results = loss_and_gradients(patch_l1, *inputs)
    for name, got, wanted in zip(NAMES, results, loss_and_gradients(patch_l1_reference, *inputs), strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


@implementations("native", "triton", "reference")
def test_nan_counts_inside_the_mask_only(implementation, generator):
    *floats, mask = draw((9, 4, 6, 1.0), generator)
    mask[:, 0], mask[:, 1] = False, True
    floats[3][:, 0] = torch.nan
    assert all(x.isfinite().all() for x in loss_and_gradients(patch_l1, *floats, mask))
    floats[3][2, 1] = torch.nan
    loss, *gradients = loss_and_gradients(patch_l1, *floats, mask)
    assert loss.isnan()
    expected = loss_and_gradients(patch_l1_reference, *floats, mask)[1:]
    for name, got, wanted in zip(NAMES[1:], gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@implementations("native")
def test_a_repeated_call_is_bit_equal_and_threads_change_rounding_alone(implementation, dtype, generator):
    inputs = draw((1100, 64, 48, 0.8), generator, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(patch_l1, *inputs))
    finally:
        torch.set_num_threads(threads)
    # Our own sums are the same for any number of threads; matrix products of MKL are not on every processor.
    for name, first, again, split in zip(NAMES, *results, strict=True):
        assert torch.equal(first, again), name
        torch.testing.assert_close(split, first, rtol=1e-5, atol=float(1e-5 * first.abs().max()), msg=name)


@FAST
def test_a_second_backward_repeats_the_first(implementation, generator):
    *floats, mask = draw((40, 8, 6, 0.5), generator)
    leaves = [x.requires_grad_() for x in floats]
    loss = patch_l1(*leaves, mask)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("wanted", range(4), ids=NAMES[1:])
@FAST
def test_one_gradient_at_a_time(implementation, wanted, generator):
    inputs = draw((40, 8, 6, 0.5), generator)
    expected = loss_and_gradients(patch_l1, *inputs, upstream=1.0)[wanted + 1]
    leaf = inputs[wanted].requires_grad_()
    assert torch.equal(torch.autograd.grad(patch_l1(*inputs), leaf)[0], expected)


def test_gradcheck(generator):
    *floats, mask = draw((6, 3, 4, 0.7), generator, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: patch_l1(*x, mask), [x.requires_grad_() for x in floats])


@implementations("native")
def test_autocast_projects_in_its_dtype(implementation, generator):
    inputs = draw((50, 16, 12, 0.5), generator)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(patch_l1_reference, *inputs)
        got = loss_and_gradients(patch_l1, *inputs)
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    torch.testing.assert_close(got[0], expected[0])
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm(), name


@implementations("native")
def test_native_refuses_other_dtypes_and_auto_takes_the_reference(implementation, monkeypatch, generator):
    for dtype, pixels_dtype, wrong in (
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float16, torch.float16),
    ):
        inputs = draw((5, 4, 3, 1.0), generator, dtype, pixels_dtype)
        monkeypatch.setenv("OMNIID_KERNELS", "native")
        words = f"patch_l1 runs natively in float32 and bfloat16, got {wrong}; convert or use OMNIID_KERNELS=auto"
        with pytest.raises(ValueError, match=words):
            patch_l1(*inputs)
        monkeypatch.setenv("OMNIID_KERNELS", "auto")
        assert torch.equal(patch_l1(*inputs), patch_l1_reference(*inputs))


@FAST
def test_registrations(implementation, generator):
    *floats, mask = draw((9, 4, 6, 0.5), generator)
    torch.library.opcheck(module._forward, (*(x.requires_grad_() for x in floats), mask, implementation))
    hidden, weight = (x.detach() for x in floats[:2])
    _, signs, counts = module._forward(*floats, mask, implementation)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            module._backward,
            (torch.tensor(0.5), hidden, weight, signs, counts, *wanted, implementation),
            test_utils=("test_schema", "test_faketensor"),
        )


@FAST
def test_compile_and_export(implementation, generator):
    torch.compiler.reset()  # compiled code keeps the implementation that was chosen when it was compiled
    inputs = draw((20, 8, 6, 0.5), generator)
    expected = loss_and_gradients(patch_l1, *inputs)
    compiled = torch.compile(patch_l1, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(compiled, *inputs), expected, strict=True))

    class Loss(torch.nn.Module):
        def forward(self, *inputs):
            return patch_l1(*inputs)

    assert torch.equal(torch.export.export(Loss(), inputs).module()(*inputs), expected[0])


@implementations("triton")
def test_triton_refuses_what_it_cannot_take(implementation, generator):
    for dtype, pixels_dtype, words in (
        (torch.float64, torch.float32, r"patch_l1 in Triton takes float32, float16 and bfloat16, got torch.float64"),
        (torch.bfloat16, torch.float32, "interpreter multiplies bfloat16 wrongly"),
        (torch.float32, torch.float64, r"pixels of up to 4 bytes, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=words):
            patch_l1(*draw((5, 4, 3, 1.0), generator, dtype, pixels_dtype))


@pytest.mark.parametrize("num_splits", [1, 3, 16])
def test_the_splits_of_the_rows_add_up(triton_device, poisoned, num_splits, generator):
    from omniid.kernels.triton import patch_l1 as kernels

    hidden, *_, mask = (x.to(triton_device) for x in draw((100, 17, 5, 0.5), generator))
    signs = mask.to(torch.int8)
    tiles = PatchTiles(16, 16, 32, 4, 1, num_splits)
    sums, bias_sums = kernels.backward_weight(hidden, signs, mask.sum(1), tiles)
    torch.testing.assert_close(sums, signs.float().t() @ hidden)
    assert torch.equal(bias_sums, signs.sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 1280, 588, 0.45), (16384, 192, 192, 0.45)], ids=str)
def test_triton_on_a_gpu(shape, dtype, triton_device, poisoned, monkeypatch, assert_accurate, generator):
    inputs = [x.to(triton_device) for x in draw(shape, generator, dtype)]
    exact = loss_and_gradients(patch_l1_reference, *(x.double() for x in inputs[:4]), inputs[4])
    plain = loss_and_gradients(patch_l1_reference, *inputs)
    monkeypatch.setenv("OMNIID_KERNELS", "triton")
    first, second = (loss_and_gradients(patch_l1, *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name, *three in zip(NAMES, first, plain, exact, strict=True):
        assert_accurate(name, *three)


def test_tiles_follow_from_sizes():
    sizes = {"num_rows": 65536, "num_values": 588, "width": 1280, "element_size": 2}
    forward, hidden, weight = patch_tiles(**sizes, capability=(9, 0))
    assert forward == PatchTiles(64, 128, 64, 8, 3)
    assert hidden == PatchTiles(128, 64, 128, 8, 2)
    assert weight == PatchTiles(64, 128, 128, 8, 2, 5)  # 50 tiles on 132 multiprocessors
    assert patch_tiles(**sizes | {"num_rows": 300}, capability=(9, 0))[2].num_splits == 1
    assert patch_tiles(**sizes | {"element_size": 4}, capability=(9, 0))[0] == PatchTiles(64, 64, 32, 4, 2)
    assert patch_tiles(**sizes | {"num_rows": 3, "width": 1}, capability=None) == (PatchTiles(16, 512, 16, 4, 1),) * 3


def test_without_the_library_the_reference_runs(monkeypatch, generator):
    monkeypatch.setattr("omniid.kernels._native_library.library", lambda: None)
    monkeypatch.setenv("OMNIID_KERNELS", "auto")
    inputs = draw((5, 4, 3, 1.0), generator)
    assert torch.equal(patch_l1(*inputs), patch_l1_reference(*inputs))
    monkeypatch.setenv("OMNIID_KERNELS", "native")
    with pytest.raises(RuntimeError, match="patch_l1 cannot run so: the native library is not built"):
        patch_l1(*inputs)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda x: x[:, 1:], r"got hidden \(5, 3\), weight \(3, 4\)"),
        (1, lambda x: x.flatten(), r"weight \(12,\)"),
        (2, lambda x: x[1:], r"bias \(2,\)"),
        (3, lambda x: x[1:], r"pixels \(4, 3\)"),
        (4, lambda x: x[:, :1], r"face_mask \(5, 1\)"),
        (4, lambda x: x.float(), "make it bool"),
        (0, lambda x: x.int(), "hidden is torch.int32; convert it"),
        (0, lambda x: x.bfloat16(), "cast them to one dtype"),
        (3, lambda x: x.to("meta"), "pixels on meta"),
    ],
)
def test_wrong_inputs_are_refused(place, change, words, generator):
    inputs = list(draw((5, 4, 3, 1.0), generator))
    inputs[place] = change(inputs[place])
    with pytest.raises(ValueError, match=words):
        patch_l1(*inputs)
