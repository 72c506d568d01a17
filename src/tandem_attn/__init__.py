"""FlashAttention-3 for Hopper GPUs in Python and Gluon, and the same functions everywhere else.

The names, arguments and defaults are those of FlashAttention-3's `flash_attn_interface`. Nothing happens on
import: torch is loaded when a function is first touched, Triton when a CUDA tensor first asks for it.
"""

from typing import TYPE_CHECKING

from tandem_attn._version import __version__

if TYPE_CHECKING:
    from tandem_attn.api import explain, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
    from tandem_attn.api_decode import (
        SCALE_BLOCK,
        decode_workspace,
        explain_with_kvcache,
        flash_attn_combine,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
        merge_attention_states,
    )
    from tandem_attn.api_fp8 import (
        Fp8Recipe,
        Fp8Tensors,
        flash_attn_fp8_func,
        flash_attn_fp8_varlen_func,
        flash_attn_quantized_func,
        quantize_qkv,
    )
    from tandem_attn.cache import PagedKVCache, PoolExhausted

__all__ = [
    "SCALE_BLOCK",
    "Fp8Recipe",
    "Fp8Tensors",
    "PagedKVCache",
    "PoolExhausted",
    "__version__",
    "decode_workspace",
    "explain",
    "explain_with_kvcache",
    "flash_attn_combine",
    "flash_attn_fp8_func",
    "flash_attn_fp8_varlen_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_quantized_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_attention_states",
    "quantize_qkv",
]


def __getattr__(name: str):
    if name in __all__:
        from tandem_attn import api, api_decode, api_fp8, cache

        home = next(module for module in (api, api_decode, api_fp8, cache) if hasattr(module, name))
        globals()[name] = found = getattr(home, name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
