"""A pytest plugin that runs diffusers' own tests with an identity adapter attached at scale 0.

From a checkout of diffusers at the installed version (`pip show diffusers`), with `pip install parameterized requests-mock`:

    PYTHONPATH=OMNIID/tests/generate pytest -p diffusers_with_adapter -n 0 -k "not compile" \
        tests/models/transformers/test_models_transformer_flux.py tests/pipelines/flux

Every call of a `FluxTransformer2DModel` whose attention is plain gets an adapter for that call: nothing that the tests
look at may differ. The tests run the diffusers that is installed, not the checkout's `src`. The two text encoders that
they fetch from the hub have the mini base's form here and random weights. `--without-adapter` replaces only these: what
fails there too is not the adapter's doing. `--min-peft 0.21` lowers the version of PEFT that transformers asks for.
"""

import collections
import functools

import diffusers  # before the checkout's conftest.py puts its own source first
import pytest
import torch
import transformers.integrations.peft
from diffusers import FluxTransformer2DModel
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, T5Config, T5TokenizerFast

from omniid.models.flux import FluxLayout, attention_modules, layout_of
from omniid.models.identity_adapter import IdentityAdapter, IdentityKV, IdentityUse, attach_identities
from omniid.models.mini_base import build_clip_tokenizer, build_t5_tokenizer

WORDS = ("a", "painting", "of", "squirrel", "eating", "burger", "photo", "cat", "dog")
MAX_LENGTH = 77
NUM_TOKENS, WIDTH = 4, 8

calls: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-adapter", action="store_true", help="Replace only the files of the hub.")
    parser.addoption("--min-peft", help="The oldest PEFT that transformers may take, where a newer one cannot be had.")


def pytest_configure(config: pytest.Config) -> None:
    _replace_hub_files()
    if config.getoption("--min-peft"):
        transformers.integrations.peft.MIN_PEFT_VERSION = config.getoption("--min-peft")
    if not config.getoption("--without-adapter"):
        FluxTransformer2DModel.__call__ = _with_adapter(FluxTransformer2DModel.__call__)


def pytest_report_header() -> str:
    return f"diffusers {diffusers.__version__} in {diffusers.__path__[0]}"


def pytest_terminal_summary(terminalreporter) -> None:
    counts = ", ".join(f"{count} {how}" for how, count in calls.items())
    terminalreporter.write_line(f"calls of a FLUX transformer: {counts or 'none that was looked at'}")


def _with_adapter(call):
    @functools.wraps(call)
    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or any(_is_replaced(one) for one in attention_modules(self)):
            calls["without the adapter, whose place another one or a compiler has"] += 1
            return call(self, *args, **kwargs)
        calls["with the adapter"] += 1
        with attach_identities(self, [IdentityUse(_keys_values(layout_of(self)), 0.0)]):
            return call(self, *args, **kwargs)

    return __call__


def _is_replaced(attention: torch.nn.Module) -> bool:
    return type(attention.processor).__name__ != "FluxAttnProcessor"


@functools.cache
def _keys_values(layout: FluxLayout) -> IdentityKV:
    """Of a random person, without touching the random numbers that the tests draw."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        adapter = IdentityAdapter(WIDTH, layout.num_blocks, layout.num_heads, layout.head_dim)
        for to_v in adapter.to_v_id:
            torch.nn.init.normal_(to_v.weight)
        return adapter.project(torch.randn(1, NUM_TOKENS, WIDTH))


def _replace_hub_files() -> None:
    def t5_tokenizer() -> T5TokenizerFast:
        return build_t5_tokenizer(WORDS, MAX_LENGTH)

    t5, clip = "hf-internal-testing/tiny-random-t5", "hf-internal-testing/tiny-random-clip"
    sizes = {"vocab_size": len(t5_tokenizer()), "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
    _replace(AutoConfig, t5, lambda: T5Config(**sizes))
    _replace(AutoTokenizer, t5, t5_tokenizer)
    _replace(T5TokenizerFast, t5, t5_tokenizer)
    _replace(CLIPTokenizer, clip, lambda: build_clip_tokenizer(WORDS, MAX_LENGTH))


def _replace(cls: type, name: str, make) -> None:
    """`cls.from_pretrained(name)` gives what `make` makes; other names are read as before."""
    read = cls.from_pretrained

    def from_pretrained(source, *args, **kwargs):
        return make() if str(source) == name else read(source, *args, **kwargs)

    cls.from_pretrained = staticmethod(from_pretrained)
