"""How an objective calls the contrastive loss: with which implementation, how exactly, and over which processes."""

from __future__ import annotations

from typing import Any, NamedTuple

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
            return contrastive_loss(x, y, **arguments, **how)
        except ValueError as error:
            raise ZooError(f"{self.objective}: {error}") from error

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
