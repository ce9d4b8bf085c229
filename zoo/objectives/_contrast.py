"""How an objective calls the contrastive loss: with which implementation, how exactly, and over which processes."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from zoo.errors import ZooError
from zoo.kernels.contrastive import Impl, Precision, contrastive_loss


class Contrast(NamedTuple):
    """The loss under the settings of one objective, with vectors normalised."""

    objective: str
    impl: Impl
    precision: Precision
    across_processes: bool

    def __call__(self, x: Tensor, y: Tensor | None = None, **arguments: Any) -> Tensor:
        """() the loss; ``arguments`` as in ``contrastive_loss``. In a batch in which no row counts it is 0.

        Of a batch in which no row has a negative it is 0 too, whatever the vectors are; on a CPU this is warned of.

        Raises:
            ZooError: If the implementation cannot run here.
        """
        group = self._group()
        if self.impl == "reference" and group is not None:
            raise ZooError(
                f"{self.objective}.impl: 'reference' knows the negatives of one process only, and {group.size()} train together: "
                "write impl: chunked, or across_processes: false"
            )
        how = {"impl": self.impl, "precision": self.precision, "group": group, "normalize": True, "validate": False}
        try:
            loss = contrastive_loss(x, y, **arguments, **how)
        except ValueError as error:
            raise ZooError(f"{self.objective}: {error}") from error
        if loss.device.type == "cpu" and loss.item() == 0 and _no_negatives(x, y, arguments):  # elsewhere looking would wait for the device
            warnings.warn(
                f"{self.objective}: no row of a batch of {len(x)} rows has a negative, since all are partners or the same item: its loss "
                "is 0 and teaches nothing; write a larger run.batch_size, or take more notes that are not each other's partners",
                stacklevel=2,
            )
        return loss

    def anywhere(self, claim: Tensor) -> Tensor:
        """() bool: whether ``claim``, (), holds in any of the processes that contrast together."""
        group = self._group()
        if group is None:
            return claim
        held = claim.int()
        dist.all_reduce(held, dist.ReduceOp.MAX, group=group)
        return held > 0

    def _group(self) -> Any:
        """The processes that train together, None for one alone. Asked at each call: an objective is made before they meet."""
        together = self.across_processes and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.group.WORLD if together else None


def _no_negatives(x: Tensor, y: Tensor | None, arguments: dict[str, Any]) -> bool:
    """Whether rows have partners, and none a negative: with every logit at 0 the sigmoid form costs log 2 for each of them."""
    if arguments.get("negatives") is not None:  # those are every row's
        return False
    blank, blank_y = x.new_zeros(len(x), 1), None if y is None else y.new_zeros(len(y), 1)
    given = {name: value for name, value in arguments.items() if not name.startswith("soft")}
    alike = {**given, "scale": 1.0, "bias": None, "form": "sigmoid", "direction": "rows"}
    with torch.no_grad():
        candidates = contrastive_loss(blank, blank_y, **alike, reduction="none", impl="chunked", validate=False) / math.log(2)
    return 0.5 < candidates.max().item() < 1.5
