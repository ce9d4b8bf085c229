"""A contrastive batch far larger than its activations: the model sees it in chunks, the loss sees it whole, and the gradient is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.checkpoint import random_state, set_random_state
from zoo.errors import ZooError
from zoo.types import Batch, Loss, ModelOutput


def backward(model: Any, objective: Any, batch: Batch, rows: int, apply: Callable[[Loss], object]) -> Loss:
    """Leave in the parameters the gradient of the loss of the whole batch, with the activations of ``rows`` rows at a time.

    First all chunks pass the model without a graph; then the loss is formed from their embeddings, as of one batch, and differentiated
    down to these; then each chunk passes again, with the same random numbers, and takes its embeddings' gradients on to the parameters.
    That is a second forward pass in exchange for memory. Exact up to the order of sums, for models whose rows do not look at each
    other (Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021, https://arxiv.org/abs/2101.06983).

    Args:
        model: A batch to embeddings.
        objective: Makes a Loss of the embeddings, and of nothing else that the model gives.
        batch: B rows.
        rows: Of a chunk, at least 1.
        apply: Differentiates the loss; called once.

    Returns:
        The loss.

    Raises:
        ZooError: If the model mixes rows, or the objective needs more than embeddings of this batch.
    """
    chunks, before, outputs = list(split(batch, rows)), [], []
    for chunk in chunks:
        before.append(random_state())
        with torch.no_grad():
            outputs.append(model(chunk))
    whole = joined(outputs)
    leaves = {name: value.requires_grad_() for name, value in whole.embeddings.items()}
    loss = objective(_Once(model, batch, whole), batch)
    apply(loss)
    after = random_state()
    start = 0
    for chunk, state, size in zip(chunks, before, map(_size, outputs), strict=True):
        set_random_state(state)
        embeddings = model(chunk).embeddings
        pairs = [(embeddings[name], leaf.grad[start : start + size]) for name, leaf in leaves.items() if leaf.grad is not None]
        reached = [(value, gradient) for value, gradient in pairs if value.requires_grad]
        if reached:
            torch.autograd.backward([value for value, _ in reached], [gradient for _, gradient in reached])
        start += size
    set_random_state(after)
    return loss


def check_rows_stay_apart(model: nn.Module) -> None:
    """Whether a chunk of rows gives what the rows give in the whole batch.

    Raises:
        ZooError: If a batch norm is trained, which looks at all rows at once.
    """
    mixing = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and _is_trained(module)]
    if mixing:
        raise ZooError(
            f"run.gradcache: {', '.join(mixing[:3])} {'is' if len(mixing) == 1 else 'are'} a batch norm in training, which mixes the rows "
            "of a batch, so chunks would change the result: freeze the module around it, or write run.gradcache: 0"
        )


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """The inputs of a batch, ``rows`` rows at a time; what says which rows belong together stays with the whole."""
    size = _rows(batch)
    for start in range(0, size, rows):
        part = slice(start, min(start + rows, size))
        yield Batch({name: value.rows(part) for name, value in batch.inputs.items()})


def joined(outputs: list[ModelOutput]) -> ModelOutput:
    """The embeddings of all chunks as those of one batch.

    Raises:
        ZooError: If the model gives logits, which losses other than contrastive ones are made of.
    """
    if logits := sorted({name for out in outputs for name in out.logits}):
        raise ZooError(
            f"run.gradcache: this model gives logits ({', '.join(logits)}), and only losses of embeddings can be formed from chunks: "
            "write run.gradcache: 0"
        )
    first = outputs[0]
    embeddings = {name: torch.cat([out.embeddings[name] for out in outputs]) for name in first.embeddings}
    return ModelOutput(embeddings, {name: torch.cat([out.present[name] for out in outputs]) for name in first.present})


class _Once:
    """The model as the objective meets it: it has run already, on this batch and no other."""

    def __init__(self, model: Any, batch: Batch, output: ModelOutput) -> None:
        self.outputs, self.dim = model.outputs, model.dim
        self._batch, self._output = batch, output

    def __call__(self, batch: Batch) -> ModelOutput:
        if batch is not self._batch:
            raise ZooError(
                "run.gradcache: this objective runs the model on further inputs, and only losses of the batch's own embeddings can be "
                "formed from chunks: write run.gradcache: 0"
            )
        return self._output

    def __getattr__(self, name: str) -> Any:
        raise ZooError(f"run.gradcache: this objective uses model.{name}, and with chunks it meets embeddings only: write gradcache: 0")


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.inputs.values())).values)


def _size(output: ModelOutput) -> int:
    return len(next(iter(output.embeddings.values())))


def _is_trained(norm: _BatchNorm) -> bool:
    return any(p.requires_grad for p in norm.parameters()) or (not list(norm.parameters()) and norm.track_running_stats)
