"""The batching policy: which of the waiting requests form the next batch, and on which stream it runs.

A pure function of what waits and what runs. It knows no event loop, no clock and no device, so the same requests are batched
in the same manner on every start. There is no timer: requests gather while the device is busy.

1. An idle device never waits: the oldest requests begin at once, however few they are. Fewer than two efficient batches run
   on the lone stream, where there is one: it has the cores of all streams, and nothing begins until it has ended.
2. While a batch runs, an idle stream begins another one as soon as an efficient batch waits. Fewer images are left to gather:
   many small batches cost more of a CPU's time, and more of a GPU's host, than one batch a moment later.
3. A batch takes up to a share of all images that wait or run: one share for each stream, and one for the requests that are
   being read and answered meanwhile. A batch that held every request would leave the HTTP workers idle until it ended.
   It is never cut below an efficient batch, nor below the batch that runs beside it, so that equal batches alternate and do
   not break into smaller ones; above an efficient batch it has a prepared size, so that no padding is computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batching:
    """The policy for one device.

    ``efficient_batch`` is the number of images from which on a batch takes time in proportion to its size. ``sizes`` are the
    prepared batch sizes, ascending; the last is the largest batch. With ``lone``, the last of the ``streams`` is the lone one.

    ``Batching(streams=3, efficient_batch=8, sizes=(1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 64), lone=True)``, a CPU of two
    cores, decides:

    =============  ==========  ===========  ================================================
    waiting        running     begins       because
    =============  ==========  ===========  ================================================
    -              -           -            nothing waits
    1              -           1 on 2       an idle device never waits; few images get all cores
    3 x 1          1 on 0      -            fewer than an efficient batch, and one runs
    20 x 1         1 on 2      -            the lone stream has the cores
    15 x 1         -           8 on 2       fewer than two efficient batches get all cores
    8 x 1          1 on 0      8 on 1       an efficient batch waits, and a stream is idle
    20 x 1         8 on 1      8 on 0       a share of 28 is 10, of which 8 need no padding
    20 x 1         16 on 1     16 on 0      as large as the batch beside it
    64 x 1         8, 8        -            no stream is idle
    16 x 1         -           8 on 0       a share of 16 is 6, an efficient batch 8
    48 x 1         -           16 on 0      a share of 48 is 16
    500 x 1        64 on 0     64 on 1      the largest batch
    20             -           20 on 0      a request is never divided
    9, 20          -           9 on 0       the second request exceeds the share
    20             2 on 0      20 on 1      it is an efficient batch by itself
    =============  ==========  ===========  ================================================

    ``waiting`` and ``begins`` count images: ``3 x 1`` are three requests of one image each. On a GPU ``efficient_batch`` is
    the largest batch: a second stream begins only full batches, each with all that waits.
    """

    streams: int
    efficient_batch: int
    sizes: tuple[int, ...]
    lone: bool = False

    @property
    def concurrent_streams(self) -> int:
        """Number of streams that run concurrently."""
        return self.streams - self.lone

    def choose(self, waiting: Iterable[int], waiting_images: int, running: Mapping[int, int]) -> tuple[int, int] | None:
        """Return how many of the oldest requests begin now and on which stream, or None.

        ``waiting`` are the images of each request, the oldest first, ``waiting_images`` their sum, ``running`` the images of
        the batch on each busy stream.
        """
        streams = self.concurrent_streams
        if not waiting_images or len(running) == streams or (self.lone and streams in running):
            return None
        if running and waiting_images < self.efficient_batch:
            return None
        lone = self.lone and not running and waiting_images < 2 * self.efficient_batch
        room = self._batch_size(waiting_images, running.values())
        count = 0
        for images in waiting:
            if count and images > room:
                break
            room -= images
            count += 1
        return count, streams if lone else min(set(range(streams)) - running.keys())

    def _batch_size(self, waiting_images: int, running: Collection[int]) -> int:
        share = math.ceil((waiting_images + sum(running)) / (self.concurrent_streams + 1))
        size = min(waiting_images, self.sizes[-1], max(self.efficient_batch, share, *running))
        if size <= self.efficient_batch:
            return size
        return max(prepared for prepared in self.sizes if prepared <= size)
