"""Which sizes are measured with which contenders: on a CPU minutes are short, on a GPU memory is."""

from __future__ import annotations

from typing import NamedTuple

from zoo.bench import short_cases
from zoo.contenders import Contender
from zoo.measure import Case, Direction

TOO_LONG = "left out at this size: the largest cases are ours, open_clip's and torch's"
OURS_ALONE = "left out at this size: ours alone"
OURS_AND_RIVAL = "left out at this size: ours and inf_cl, whose memory does not grow with N M"
SAME = "left out at this size: on a CPU the same as ours"
OURS = ("ours",)
TWO_SIDED: tuple[Direction, ...] = ("both", "rows")


class Entry(NamedTuple):
    """A case and who takes part."""

    case: Case
    names: tuple[str, ...] | None = None  # None: all
    otherwise: str = ""  # why the others do not

    def left_out(self, contender: Contender) -> str | None:
        """The reason, to be listed."""
        return None if self.names is None or contender.name in self.names else self.otherwise


def rounds_of(case: Case) -> int:
    """Counted calls: enough for a median and a spread where a call is short."""
    if case.device == "cpu":
        return 5 if case.rows <= 2048 else 3 if case.rows <= 8192 else 2
    predicted = case.flops / 300e12  # seconds at a modest share of a Hopper's rate
    return max(3, min(20, int(0.5 / predicted)))


def cpu_grid() -> list[Entry]:
    """What `make bench` measures in under ten minutes on two cores."""
    small = [Entry(short._replace(backward=backward)) for short in short_cases("cpu") for backward in (True, False)]
    most = ("ours", "ours reference", "open_clip", "open_clip compiled", "torch linear_cross_entropy", "sentence-transformers cached")
    large = ("ours", "open_clip", "torch linear_cross_entropy")
    return [
        *small,
        Entry(Case(8192, 512), most, SAME),
        Entry(Case(8192, 512, direction="self"), OURS, OURS_ALONE),
        Entry(Case(16384, 512), large, TOO_LONG),
    ]


def gpu_grid(part: int) -> list[Entry]:
    """One of three parts, each for under ten minutes on an H200; no case is in two.

    1: ours over sizes. 2: all contenders. 3: the largest sizes, at 128k with the one rival that needs no N M memory; one-sided.
    """
    both_passes = (True, False)
    together = [(n, d) for n in (8192, 32768) for d in (512, 1024)]  # where all contenders meet
    if part == 1:
        sizes = [(n, d) for d in (256, 512, 768, 1024, 1536, 4096) for n in (2048, 4096, 8192, 16384, 32768, 65536)]
        alone = [Case(n, d, "bf16", backward=b, device="cuda") for n, d in sizes if (n, d) not in together for b in both_passes]
        return [Entry(case, OURS, OURS_ALONE) for case in alone]
    if part == 2:
        return [
            Entry(Case(n, d, dtype, direction, backward, device="cuda"))
            for dtype, passes in (("bf16", both_passes), ("fp32", (True,)))
            for n, d in together
            for direction in TWO_SIDED
            for backward in passes
        ]
    alone = [
        *(Case(n, d, "bf16", "self", device="cuda") for n, d in together),
        *(Case(n, 512, "bf16", backward=b, device="cuda") for n in (524288, 1048576) for b in both_passes),
        *(Case(32768, d, "bf16", scale=100.0, device="cuda") for d in (512, 1024)),
    ]
    large = [Case(131072, d, "bf16", device="cuda") for d in (512, 1024)]
    return [*(Entry(case, OURS, OURS_ALONE) for case in alone), *(Entry(case, ("ours", "inf_cl"), OURS_AND_RIVAL) for case in large)]
