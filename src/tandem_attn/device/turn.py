"""Ping-pong (arXiv 2407.08608, section 3.1): whose turn it is to give the tensor cores work.

Hardware named barriers in raw PTX rather than mbarriers: Gluon's `mbarrier.arrive` brings a partition-wide
bar.sync with it, and that version lost 2 to 10% where this one gains 1 to 9% (H200, 2026-11-22). Triton
itself uses the low named barriers (0 to 5 seen); these start at 8.
"""

from tandem_attn.device.gluon import gl, gluon


@gluon.constexpr_function
def _barrier_asm(op, barrier, threads):
    return f"{op} {barrier}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def _named_barrier(op: gl.constexpr, group: gl.constexpr):
    gl.inline_asm_elementwise(
        _barrier_asm(op, 8 + group, 256), "=r,r", [gl.program_id(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _any_barrier_asm(op, threads):
    return f"{{ .reg .pred p; setp.ne.s32 p, $2, 0; @p {op} $1, {threads}; mov.b32 $0, $1; }}"


@gluon.jit
def named_barrier(op: gl.constexpr, barrier, threads: gl.constexpr, pred=True):
    """`op` (bar.sync or bar.arrive) on a hardware barrier whose number is known at run time only."""
    gl.inline_asm_elementwise(
        _any_barrier_asm(op, threads),
        "=r,r,r",
        [barrier, gl.to_tensor(pred).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def take_turn(group: gl.constexpr):
    """Wait until the tensor cores are this consumer's."""
    _named_barrier("bar.sync", group)


@gluon.jit
def pass_turn(group: gl.constexpr, num_consumers: gl.constexpr):
    """Let the next consumer go; does not wait."""
    _named_barrier("bar.arrive", (group + 1) % num_consumers)
