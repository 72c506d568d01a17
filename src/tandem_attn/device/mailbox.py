"""How the producer tells the consumers which tile comes next.

One slot per Q buffer; the slot is written before the producer arrives on that buffer's `full` barrier and
read before the consumer arrives on `empty`, so the two barriers of Q order the mail as well.
"""

from tandem_attn.device.gluon import aggregate, gl, gluon

MAIL_FIELDS = gl.constexpr(8)  # 0: m_start, negative at the end; 1: head; 2 to 6: the sequence
END_OF_TILES = gl.constexpr(-1)


@aggregate
class Mailbox:
    """A few integers per slot, from the producer to the consumers."""

    smem: gl.shared_memory_descriptor  # int32 [slots * MAIL_FIELDS, 1]

    @gluon.jit
    def send(self, slot, field: gl.constexpr, value):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        self.smem.index(slot * MAIL_FIELDS + field).store(gl.zeros([1], gl.int32, layout) + value)

    @gluon.jit
    def receive(self, slot, field: gl.constexpr):
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return gl.sum(self.smem.index(slot * MAIL_FIELDS + field).load(layout), 0)


@gluon.jit
def make_mailbox(slots: gl.constexpr):
    """A mailbox in shared memory."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Mailbox(gl.allocate_shared_memory(gl.int32, [slots * MAIL_FIELDS, 1], layout))
