"""How long a call takes: device time by CUDA events, or wall time on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch

from tandem_attn.bench.options import Settings

WARM_UP = 3
CYCLES_PER_SECOND = 2e9  # a little above any Hopper clock, so that a sleep is never shorter than asked for
LEAST_SLEEP = 5e-3  # seconds; also lets an idle card raise its clock
CLOCK_CYCLES = 1_000_000  # of the sleep that tells the clock: half a millisecond


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call over several launches."""

    median: float
    fastest: float
    slowest: float
    launches: int
    sm_clock_mhz: float | None = None  # right after the launches

    def record(self) -> dict:
        """As reports have it."""
        return {
            "median_us": self.median * 1e6,
            "fastest_us": self.fastest * 1e6,
            "slowest_us": self.slowest * 1e6,
            "launches": self.launches,
            "sm_clock_mhz": self.sm_clock_mhz,
        }


def time_call(run: Callable[[], object], device: torch.device, repeats: int, idle_ms: float) -> Timing:
    """Median of `repeats` launches after warm-up. The card first idles for `idle_ms`, the same for everyone:
    a card that comes hot from another provider's run clocks lower."""
    if device.type == "cuda":
        return _on_cuda(run, repeats, idle_ms)
    for _ in range(WARM_UP):
        run()
    time.sleep(idle_ms / 1e3)
    return _timing([_wall(run) for _ in range(repeats)])


def time_copies(
    run: Callable[[int], torch.Tensor],
    copies: int,
    calls: int,
    device: torch.device,
    settings: Settings,
) -> tuple[Timing, torch.Tensor]:
    """Time per call of `run(i)`, i going round the copies of its inputs, and what the last call returned.

    On a GPU `calls` of them are one CUDA graph, of which `launches` are replays.
    """
    if device.type == "cpu":
        turns, found = itertools.cycle(range(copies)), []
        timing = time_call(lambda: found.append(run(next(turns))), device, settings.repeats, settings.idle_ms)
        return timing, found[-1]
    graph = torch.cuda.CUDAGraph()
    run(0)  # whatever is compiled or allocated once
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(calls):
            last = run(i % copies)
    last.fill_(math.nan)  # a replay that computes nothing must not pass for a right one
    timing = time_call(graph.replay, device, settings.repeats, settings.idle_ms)
    times = (timing.median / calls, timing.fastest / calls, timing.slowest / calls)
    return Timing(*times, timing.launches, timing.sm_clock_mhz), last.clone()


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_cuda(run: Callable[[], object], repeats: int, idle_ms: float) -> Timing:
    """Each launch between two events of its own, all queued behind a sleeping kernel: the device never waits
    for the host, so no host time is in the number."""
    run()
    torch.cuda.synchronize()
    host = max(_wall(run) for _ in range(WARM_UP))
    torch.cuda.synchronize()
    time.sleep(idle_ms / 1e3)
    *events, clock = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 1)]
    sleep = max(LEAST_SLEEP, 2.0 * repeats * (host + 20e-6))
    torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
    for start, end in events:
        start.record()
        run()
        end.record()
    # a sleep spins for a number of cycles, so its time is the clock under this very load, which differs by
    # several percent between cards and hours
    clock[0].record()
    torch.cuda._sleep(CLOCK_CYCLES)
    clock[1].record()
    torch.cuda.synchronize()
    mhz = CLOCK_CYCLES / clock[0].elapsed_time(clock[1]) / 1e3
    return _timing([start.elapsed_time(end) / 1e3 for start, end in events], mhz)


def _timing(seconds: list[float], sm_clock_mhz: float | None = None) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), sm_clock_mhz)
