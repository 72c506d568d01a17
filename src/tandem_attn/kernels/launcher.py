"""The only host file that knows how this Triton launches a kernel.

Triton's Python path rebuilds its arguments on every launch, which costs ten times the launch. 3.6 keeps the C
function it ends in within reach (private); other versions take the public path, slower and just as right.
"""

from __future__ import annotations

import types

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def tensor_descriptor(tensor: torch.Tensor, shape: list[int], strides: list[int], box: list[int], layout):
    """A host TMA descriptor over `tensor`'s storage with any shape and strides (elements)."""
    return TensorDescriptor(tensor, shape, strides, box, layout)


MAX_CACHED_ADDRESSES = 4096


class KernelLauncher:
    """One compiled kernel and what its launches have in common."""

    def __init__(self, kernel, arguments: tuple, options: dict):
        self.kernel, self.options = kernel, dict(options, enable_fp_fusion=True)
        # all but the tensor, which would be kept alive
        self.descriptors = [
            types.SimpleNamespace(
                shape=a.shape, strides=a.strides, block_shape=a.block_shape, layout=a.layout
            )
            for a in arguments
            if isinstance(a, TensorDescriptor)
        ]
        self.compiled = kernel.warmup(*arguments, grid=(1,), **self.options)
        self._c_launch = self._find_c_launch()

    def _find_c_launch(self):
        """(C function, arguments between grid and kernel arguments), or None where this Triton hides it."""
        if not triton.__version__.startswith("3.6."):
            return None
        try:
            from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

            run = self.compiled.run
            head = (run.launch_cooperative_grid, run.launch_pdl, None, None, self.compiled.packed_metadata)
            head = (self.compiled.function, *head, None, None, None)
            if not self.descriptors:  # nothing is wrapped around the C function
                return run.launch, head
            names = run.launch.__code__.co_freevars
            cells = dict(zip(names, (x.cell_contents for x in run.launch.__closure__), strict=True))
            self._encode = triton.runtime.driver.active.utils.fill_tma_descriptor
            self._encodings = [
                (
                    (m["swizzle"], m["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[m["elem_type"]], m["block_size"]),
                    (list(d.shape), list(d.strides), 0),
                    (*d.shape, *d.strides),
                )
                for m, d in zip(cells["tensordesc_meta"], self.descriptors, strict=True)
            ]
            return cells["launcher"], head
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    @property
    def fast(self) -> bool:
        """Whether launches go straight to the C function."""
        return self._c_launch is not None

    def encode(self, addresses: tuple[int, ...], tensors: tuple) -> list:
        """What `launch` wants for these addresses: encoded tensor maps, or descriptors."""
        if not self.fast:
            return [
                TensorDescriptor(t, d.shape, d.strides, d.block_shape, d.layout)
                for t, d in zip(tensors, self.descriptors, strict=True)
            ]
        flat: list = []
        for address, (before, after, sizes) in zip(addresses, self._encodings, strict=True):
            flat += (self._encode(address, *before, *after), *sizes)
        return flat

    def launch(
        self, programs: int, stream: int, maps: list, lse, pointers: tuple, numbers: tuple, config
    ) -> None:
        """Enqueue on `stream`, the current one of the current device. `pointers`: tensors, None, or tuples of
        them."""
        if not self.fast:
            self.kernel[(programs,)](*maps, lse, *pointers, *numbers, config, **self.options)
            return
        addresses = map(_address, pointers)
        function, head = self._c_launch
        function(programs, 1, 1, stream, *head, *maps, lse.data_ptr(), *addresses, *numbers, config)

    def launch_flat(self, grid: tuple[int, int, int], stream: int, maps: list, tensors: tuple, rest: tuple):
        """Enqueue with `maps` (what `encode` gave, or tensors), tensors, and what follows them: tuples of
        tensors or numbers, numbers, the config."""
        if not self.fast:
            self.kernel[grid](*maps, *tensors, *rest, **self.options)
            return
        function, head = self._c_launch
        function(*grid, stream, *head, *map(_address, maps), *map(_address, tensors), *map(_address, rest))


def encoded(launcher: KernelLauncher, maps: dict, key, tensors: tuple) -> list:
    """What `launcher.encode` makes of tensors, remembered in `maps`: allocators hand out the same addresses
    again and again. Too many are forgotten all at once."""
    if len(maps) >= MAX_CACHED_ADDRESSES:
        maps.clear()
    maps[key] = launcher.encode(tuple(x.data_ptr() for x in tensors), tensors)
    return maps[key]


def misaligned(tensors: tuple) -> int:
    """Bits, of those tensors (or None) that do not start at a multiple of 16 bytes. Kernels are compiled for
    such a pattern."""
    bits = 0
    for x in tensors:
        bits = 2 * bits + (x is not None and x.data_ptr() % 16 != 0)
    return bits


def _address(x):
    """Pointers as int skip a driver query each; tuples of tensors become tuples of them."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if type(x) is tuple and x and (x[0] is None or isinstance(x[0], torch.Tensor)):
        return tuple(None if t is None else t.data_ptr() for t in x)
    return x
