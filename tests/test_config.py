"""Which configuration a question gets: it exists, fits, and has a key of its own in Triton's cache."""

import dataclasses
import importlib
import itertools
import re
import sys

import pytest
import torch

from tandem_attn.device import mask, schedule, sequence
from tandem_attn.device.mask import CausalMask, FullMask, NoMask, WindowMask
from tandem_attn.device.schedule import DenseTiles, PlainTiles, VarlenTiles
from tandem_attn.device.sequence import Dense, Varlen
from tandem_attn.kernels.config import NATIVE_HEAD_DIMS, SHARED_MEMORY, ForwardConfig, forward_config
from tandem_attn.kernels.config_fp8 import TWO_UP_TO, fp8_config
from tandem_attn.spec import Window
from tandem_attn.testing.compile import forward_signature, forward_source
from tandem_attn.testing.shipped import WINDOWS, configs, fp8_configs, question, variants

DIMS = range(8, 257, 8)
USUAL = dict(
    element="bf16", head_dim=128, head_dim_v=128, Mask=CausalMask, Sequences=Dense, Schedule=DenseTiles
)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        (dict(head_dim=80), "head_dim 80"),
        (dict(head_dim_v=32), "head_dim_v 32"),
        (dict(num_consumers=5), "num_consumers=5"),
        (dict(num_consumers=1), "num_consumers=1"),
        (dict(head_dim_v=192), "o_parts=1"),
        (dict(head_dim=96, head_dim_v=96, o_parts=2), "o_parts=2"),
        (dict(num_stages=4), "shared memory"),
        (dict(head_dim=256, head_dim_v=256), "shared memory"),
        (dict(o_parts=2, o_buffers=3), "o_buffers"),  # more buffers than parts
        (
            dict(head_dim=192, head_dim_v=192, tile_n=64, o_parts=3, o_buffers=2),
            "o_buffers",
        ),  # see _store_part
        (
            dict(num_consumers=3, skip=True, head_dim=64, head_dim_v=64, tile_n=64),
            "skip",
        ),  # two blocks at once
    ],
)
def test_impossible_configurations_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        ForwardConfig(**{**USUAL, **fields})


def test_a_configuration_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ForwardConfig(**USUAL).tile_n = 64


@pytest.mark.parametrize("head_dim", DIMS)
def test_every_question_has_a_configuration_that_holds_it(head_dim):
    """All pairs of head dimensions; and nothing is reached that the compile tests do not know."""
    shipped = {torch.bfloat16: set(configs()), torch.float16: set(configs(torch.float16))}
    kinds = itertools.product(DIMS, WINDOWS.values(), (False, True), (520, 1024, 30000))
    for (head_dim_v, window, varlen, length), dtype in zip(kinds, itertools.cycle(shipped)):
        config = forward_config(
            question(head_dim, head_dim_v, length, window=window, varlen=varlen, dtype=dtype)
        )
        assert config.head_dim >= head_dim and config.head_dim_v >= head_dim_v
        assert config.element == ("bf16" if dtype == torch.bfloat16 else "fp16")
        assert config in shipped[dtype], f"{config} is reached but not in testing/shipped.py: configs()"


@pytest.mark.parametrize("config", configs(), ids=lambda c: f"{c.head_dim}-{c.head_dim_v}")
def test_shipped_configurations_fit(config):
    assert config.shared_memory + 1024 <= SHARED_MEMORY == 232448  # tiles, barriers and mail
    threads = 128 * config.num_consumers + 128  # Triton pads the producer warp to a warpgroup
    assert config.maxnreg * threads <= 65536 and config.maxnreg % 8 == 0
    assert all(n % 8 == 0 and 24 <= n <= 240 for n in config.worker_registers)
    assert config.qk_width * config.qk_chunks == config.head_dim
    assert config.v_width * config.v_chunks == config.head_dim_v
    assert config.o_width * config.o_parts == config.head_dim_v
    for width in (config.qk_width, config.v_width, config.o_width, config.tile_m, config.tile_n):
        assert width & (width - 1) == 0, "Triton wants powers of two"
    assert config.tile_rows == config.tile_m * config.num_consumers and config.tile_m == 64
    assert not config.skip or config.tile_m * (config.num_consumers - 1) <= config.tile_n


@pytest.mark.parametrize(
    "head_dims, tile",
    [
        ((8, 8), (64, 64)),
        ((64, 64), (64, 64)),
        ((72, 72), (96, 96)),
        ((96, 64), (96, 96)),
        ((128, 64), (128, 128)),
        ((64, 128), (128, 128)),
        ((192, 128), (192, 128)),  # DeepSeek
        ((136, 128), (192, 128)),
        ((160, 160), (192, 192)),
        ((96, 192), (192, 192)),
        ((256, 256), (256, 256)),
        ((200, 8), (256, 256)),
    ],
)
def test_tiles_waste_little(head_dims, tile):
    config = forward_config(question(*head_dims))
    assert (config.head_dim, config.head_dim_v) == tile


@pytest.mark.parametrize(
    "asked, policies",
    [
        (dict(), (NoMask, Dense, PlainTiles)),
        (dict(seqlen_k=1000), (FullMask, Dense, PlainTiles)),
        (dict(window=Window(-1, 0)), (CausalMask, Dense, DenseTiles)),
        (
            dict(window=Window(-1, 0), seqlen_q=1, seqlen_k=1024),
            (NoMask, Dense, PlainTiles),
        ),  # one row sees all
        (dict(window=Window(128, 0)), (WindowMask, Dense, PlainTiles)),
        (dict(window=Window(-1, 7)), (WindowMask, Dense, PlainTiles)),
        (dict(varlen=True), (FullMask, Varlen, VarlenTiles)),
        (dict(varlen=True, window=Window(-1, 0)), (CausalMask, Varlen, VarlenTiles)),
        (dict(varlen=True, window=Window(5, 5)), (WindowMask, Varlen, VarlenTiles)),
    ],
)
def test_policies_follow_the_question(asked, policies):
    config = forward_config(question(**asked))
    assert (config.Mask, config.Sequences, config.Schedule) == policies
    assert forward_config(question(**asked, softcap=30.0)) == dataclasses.replace(config, softcap=True)


def test_the_choice_depends_on_the_question_alone(monkeypatch):
    """Not on what was asked before, on the environment, on strides or on the device."""
    spec = question(window=Window(-1, 0))
    first = forward_config(spec)
    forward_config(question(64, 128, varlen=True))
    monkeypatch.setenv("TANDEM_LOG", "1")
    assert forward_config(dataclasses.replace(spec)) == first
    elsewhere = dict(
        device=torch.device("cuda", 3), q_stride=(0, 256, 128, 1), sm_margin=8, softmax_scale=0.5
    )
    assert forward_config(dataclasses.replace(spec, **elsewhere)) == first
    assert hash(forward_config(spec)) == hash(first)


@pytest.mark.parametrize("window", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("seqlen", [512, TWO_UP_TO, TWO_UP_TO + 1, 4096, 2**17])
def test_fp8_sums_are_exact_over_many_keys(seqlen, head_dim, window):
    """wgmma alone may add up what it hardly harms (docs/kernels/fp8.md)."""
    config = fp8_config(question(head_dim, seqlen_q=seqlen, window=WINDOWS[window]), copies_operands=False)
    assert config.block_sums or seqlen <= TWO_UP_TO


@pytest.mark.parametrize("variant", variants()[::7], ids=lambda v: v.name)
def test_text_for_people(variant):
    text = str(variant.config)
    assert "\n" not in text and len(text) < 200 and "<class" not in text
    for part in (variant.config.element, f"{variant.config.tile_n} keys", variant.config.Mask.__name__, "KB"):
        assert part in text


def test_names_of_variants_are_unique():
    names = [v.name for v in variants()]
    assert len(set(names)) == len(names) >= 70
    assert all(re.fullmatch(r"[\w-]+", name) for name in names)


# What Triton's disk cache goes by. Two kernels with one key: the first one compiled is used for both.


def test_every_variant_has_a_cache_key_of_its_own():
    keys = [forward_source(v.config, v.seqused, v.adds_mean).hash() for v in variants()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ForwardConfig)])
def test_every_field_counts_for_the_cache_key(field):
    """Also those that the text for people leaves out."""
    other = dict(
        element="fp16", head_dim=64, head_dim_v=64, Mask=FullMask, Sequences=Varlen, Schedule=PlainTiles
    )
    other |= dict(tile_m=32, tile_n=64, num_consumers=3, num_stages=1, q_stages=2, o_parts=2, o_buffers=2)
    base = ForwardConfig(**{**USUAL, "head_dim": 64, "head_dim_v": 64, "o_parts": 2})
    if field in ("block_sums", "sum_by_wgmma"):  # of e4m3, one after the other
        base = dataclasses.replace(base, element="fp8e4nv", serial=True)
    if field == "out_element":
        other["out_element"] = "fp16"
    value = other.get(field, not getattr(base, field))
    if getattr(base, field) == value:
        value = {"head_dim": 96, "head_dim_v": 128, "o_parts": 1}[field]
    changed = dataclasses.replace(base, **{field: value})
    assert changed.cache_key != base.cache_key
    assert repr(changed) != repr(base), "the key of the cache in memory"


def test_policies_carry_a_digest():
    """A class is keyed by its name: device/gluon.py puts the sources of its methods into that."""
    for config in configs():
        for cls in (config.Mask, config.Sequences, config.Schedule):
            assert re.fullmatch(r"\w+@[0-9a-f]{8}", cls.__qualname__), f"{cls.__name__} is not a @policy"
            assert cls.__qualname__ in config.cache_key
    for config in (*configs(), *fp8_configs()):
        assert re.fullmatch(r"\w+@[0-9a-f]{8}", config.Precision.__qualname__)
        assert config.Precision.__qualname__ in config.cache_key
    for module, names in ((mask, "Mask"), (schedule, "Tiles"), (sequence, "")):
        for name, cls in vars(module).items():
            if isinstance(cls, type) and cls.__module__ == module.__name__ and name.endswith(names):
                assert "@" in cls.__qualname__ or name in (
                    "DenseSequence",
                    "PackedSequence",
                    "TransposedKeys",
                )


SHIFT = """
from tandem_attn.device.gluon import gl, gluon, policy

@policy({traits})
class Shift:
    x: gl.tensor

    @gluon.jit
    def by(self, n):
        return {body}

def made(step):
    @policy()
    class Made:
        x: gl.tensor

        @gluon.jit
        def by(self, n):
            return self.x + step

    return Made
"""


@pytest.fixture
def policies(tmp_path, monkeypatch):
    """A function that writes a module with a policy and imports it afresh."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(traits="", body="self.x + n"):
        (tmp_path / "shift_policy.py").write_text(SHIFT.format(traits=traits, body=body))
        sys.modules.pop("shift_policy", None)
        importlib.invalidate_caches()
        return importlib.import_module("shift_policy")

    yield write
    sys.modules.pop("shift_policy", None)


def test_an_edited_method_changes_the_key(policies):
    before = policies().Shift.__qualname__
    assert policies().Shift.__qualname__ == before
    assert policies(body="self.x - n").Shift.__qualname__ != before
    assert policies(traits="down=True").Shift.__qualname__ != before


def test_two_classes_from_one_factory_differ(policies):
    from tandem_attn.device.gluon import gl

    made = policies().made
    assert made(gl.constexpr(1)).__qualname__ != made(gl.constexpr(2)).__qualname__
    assert made(gl.constexpr(1)).__qualname__ == made(gl.constexpr(1)).__qualname__


@pytest.mark.parametrize("variant", variants()[::9], ids=lambda v: v.name)
def test_signature_covers_every_argument(variant):
    """What a launch passes, as the compile tests spell it: pointers where there are lengths, else None."""
    signature = forward_signature(variant.config, variant.seqused)
    varlen = variant.config.Sequences is Varlen
    assert signature["cu_seqlens_q"] == ("*i32" if varlen else "constexpr")
    assert signature["seqused_k"] == ("*i32" if "k" in variant.seqused else "constexpr")
    assert signature["scale_log2"] == "fp32" and signature["num_heads"] == "i32"
    assert all("tensordesc" in signature[f"{name}_desc"] for name in "qkvo")
    assert set(NATIVE_HEAD_DIMS) >= {variant.config.head_dim, variant.config.head_dim_v}
