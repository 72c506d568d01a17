"""How the keys of a sequence are cut into units of work, each of which leaves one partial result.

Tiles of keys have absolute numbers: tile t of a sequence is its keys t * tile_n to (t + 1) * tile_n - 1. An
item (a sequence, or a block of its rows) needs the tiles `first` to `end` - 1. A policy cuts them into units;
the units of all items, laid end to end, are cut into equal shares, one for each program of a KV head.
Methods use only + - * // min max on numbers that are not negative, so tests call them on plain integers.
"""

from tandem_attn.device.gluon import gl, gluon, policy


@policy(absolute=False, shared=True)
class SharedSplits:
    """A unit is a tile, and a program merges its own units: splits fall where shares end.

    As many partials as there are programs, whatever the lengths: nothing to choose. Where a split falls
    depends on the whole batch, and with it the rounding.
    """

    amount: gl.tensor

    @gluon.jit
    def units(self, first, end):
        """Units of an item."""
        return end - first

    @gluon.jit
    def tile_of(self, unit, first, end):
        """First tile of a unit."""
        return first + unit

    @gluon.jit
    def stop(self, tile, first, end, left):
        """End of the segment that begins at `tile`, for a program with `left` units to go."""
        return min(end, tile + left)

    @gluon.jit
    def used(self, tile, stop):
        """Units of a segment."""
        return stop - tile

    @gluon.jit
    def unit_of(self, tile, first, end):
        """Unit that a tile belongs to."""
        return tile - first


@policy(absolute=False, shared=False)
class CountedSplits:
    """At most `amount` units of equally many tiles for each item: num_splits."""

    amount: gl.tensor

    @gluon.jit
    def size(self, first, end):
        """Tiles of a unit."""
        return max((end - first + self.amount - 1) // self.amount, 1)

    @gluon.jit
    def units(self, first, end):
        size = self.size(first, end)
        return (end - first + size - 1) // size

    @gluon.jit
    def tile_of(self, unit, first, end):
        return first + unit * self.size(first, end)

    @gluon.jit
    def stop(self, tile, first, end, left):
        return min(end, tile + self.size(first, end))

    @gluon.jit
    def used(self, tile, stop):
        return 1

    @gluon.jit
    def unit_of(self, tile, first, end):
        return (tile - first) // self.size(first, end)


@policy(absolute=True, shared=False)
class SizedSplits:
    """A unit is `amount` tiles and begins at a multiple of them: split_size.

    A row's result depends on nothing but its own sequence, and on the kind of tile: on how many queries a
    sequence may have.
    """

    amount: gl.tensor

    @gluon.jit
    def units(self, first, end):
        # an empty item has first = end = 0
        return (end + self.amount - 1) // self.amount - first // self.amount

    @gluon.jit
    def tile_of(self, unit, first, end):
        return max(first, (first // self.amount + unit) * self.amount)

    @gluon.jit
    def stop(self, tile, first, end, left):
        return min(end, (tile // self.amount + 1) * self.amount)

    @gluon.jit
    def used(self, tile, stop):
        return 1

    @gluon.jit
    def unit_of(self, tile, first, end):
        return tile // self.amount - first // self.amount
