"""The contrastive losses that the benchmark puts beside ours, each called as its own users call it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError, unknown
from zoo.kernels.contrastive import contrastive_loss
from zoo.measure import Case, Inputs, Step

OURS = "multimodal-zoo"
Impl = Literal["auto", "reference", "chunked", "triton"]
Precision = Literal["auto", "ieee", "tf32", "3xtf32"]
CACHED_ROWS = 1024  # rows at a time of the cached sentence-transformers loss


def breakages() -> tuple[type[Exception], ...]:
    """What a loss of others raises that cannot run here: it fails to import, refuses its input, or does not compile."""
    known = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    if find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return (*known, TritonError)


class Contender(NamedTuple):
    """One implementation of the loss, and what it can do."""

    name: str
    make: Callable[[Case], Step]
    package: str  # its distribution, for the version
    module: str | None = None  # that must be importable; None: the package itself ships with us
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] = ("both", "rows")
    multiple_of: tuple[int, int] = (1, 1)  # what N and D must be divisible by
    compiles: bool = False  # for each size anew

    @property
    def is_ours(self) -> bool:
        """Whether this is the zoo's own loss."""
        return self.package == OURS

    def refusal(self, case: Case) -> str | None:
        """Why this case cannot be measured here; None if it can. A table lists the reason in the place of numbers."""
        if self.module is not None and find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        if self.module == "torch" and "linear_cross_entropy" not in dir(F):
            return f"not in torch {torch.__version__}: needs 2.13"
        if case.device not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        if case.direction not in self.directions:
            return f"has no direction {case.direction!r}"
        rows, dim = self.multiple_of
        if case.rows % rows or case.dim % dim:
            return f"needs N % {rows} == 0 and D % {dim} == 0"
        return None


def contenders(names: list[str] | None = None) -> list[Contender]:
    """All of them, ours first; or those of the given names.

    Raises:
        ZooError: On a name that is none.
    """
    known = {contender.name: contender for contender in _CONTENDERS}
    if names is None:
        return list(known.values())
    if wrong := [name for name in names if name not in known]:
        raise ZooError("\n".join(unknown("contender", name, known) for name in wrong))
    return [known[name] for name in names]


def _differentiated(case: Case, loss: Callable[[Inputs], Tensor]) -> Step:
    """A loss as the step that is measured."""

    def step(inputs: Inputs) -> Tensor:
        value = loss(inputs)
        if case.backward:
            value.backward()
        return value.detach()

    return step


def _each_way(case: Case, one_way: Callable[[Tensor, Tensor, Inputs], Tensor]) -> Step:
    """A loss of rows against columns as the loss of the case: once, or both ways and halved."""

    def loss(inputs: Inputs) -> Tensor:
        assert inputs.y is not None, "refused by Contender.directions"
        forth = one_way(inputs.x, inputs.y, inputs)
        return forth if case.direction == "rows" else (forth + one_way(inputs.y, inputs.x, inputs)) / 2

    return _differentiated(case, loss)


def ours(impl: Impl, *, precision: Precision = "auto", normalize: bool = False, learn_scale: bool = True) -> Callable[[Case], Step]:
    """The zoo's own loss as a maker of steps.

    Args:
        impl: As in `contrastive_loss`.
        precision: Likewise.
        normalize: Likewise; the inputs are unit rows already, so the value stays.
        learn_scale: Whether the scale gets a gradient too.
    """

    def make(case: Case) -> Step:
        direction: Literal["both", "rows"] = "both" if case.direction == "both" else "rows"

        def loss(inputs: Inputs) -> Tensor:
            return contrastive_loss(
                inputs.x,
                inputs.y,
                scale=inputs.scale if learn_scale else case.scale,
                positive=inputs.partner if inputs.y is None else None,
                direction=direction,
                normalize=normalize,
                impl=impl,
                precision=precision,
                validate=False,
            )

        return _differentiated(case, loss)

    return make


def _open_clip(case: Case) -> Step:
    """Under autocast for half-precision inputs, as open_clip trains."""
    return _under_autocast(case, _clip_loss())


def _open_clip_compiled(case: Case) -> Step:
    torch.compiler.reset()  # else the ninth size would silently run uncompiled
    return _under_autocast(case, torch.compile(_clip_loss(), dynamic=False))


def _clip_loss() -> Any:
    """From its file alone: the package around it imports libraries of models, which a machine for measuring need not have."""
    package = find_spec("open_clip")
    assert package is not None, "refused by Contender.refusal"
    assert package.origin is not None, package
    spec = spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None, package
    assert spec.loader is not None, package
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss()


def _under_autocast(case: Case, loss: Any) -> Step:
    def call(inputs: Inputs) -> Tensor:
        with torch.autocast(case.device, inputs.x.dtype, enabled=inputs.x.dtype != torch.float32):
            return loss(inputs.x, inputs.y, inputs.scale)

    return _differentiated(case, call)


def _inf_cl(case: Case) -> Step:
    """Inf-CL: Cheng et al., 2024, https://arxiv.org/abs/2410.17243; its loss of one GPU, which is the ring's inner step."""
    flash = import_module("inf_cl.flash").cal_flash_loss
    return _each_way(case, lambda x, y, inputs: flash(x, y, inputs.partner, inputs.scale).mean())


def _torch_linear(case: Case) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()
    return _each_way(case, lambda x, y, inputs: F.linear_cross_entropy(_scaled(x, inputs), y, inputs.partner, options=options))


def _liger(case: Case) -> Step:
    """Liger: Hsu et al., 2024, https://arxiv.org/abs/2410.10989."""
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return _each_way(case, lambda x, y, inputs: function.apply(_scaled(x, inputs), y, inputs.partner)[0])


def _cut(filter_eps: str | None) -> Callable[[Case], Step]:
    """Cut cross entropy: Wijmans et al., 2024, https://arxiv.org/abs/2411.09009."""

    def make(case: Case) -> Step:
        function = import_module("cut_cross_entropy").linear_cross_entropy
        return _each_way(case, lambda x, y, inputs: function(_scaled(x, inputs), y, inputs.partner, filter_eps=filter_eps))

    return make


def _scaled(x: Tensor, inputs: Inputs) -> Tensor:
    """For losses that know no scale; the scale's gradient then flows through this product."""
    return x * inputs.scale.to(x.dtype)


def _ranking(case: Case) -> Step:
    """Henderson et al., 2017, https://arxiv.org/abs/1705.00652, as in sentence-transformers, whose scale is a plain number."""
    loss = _ranking_loss("MultipleNegativesRankingLoss", case)
    return _differentiated(case, lambda inputs: loss.compute_loss_from_embeddings([inputs.x, inputs.y], None))


def _ranking_cached(case: Case) -> Step:
    """It goes backward after each chunk of rows, which is what bounds its memory."""
    loss = _ranking_loss("CachedMultipleNegativesRankingLoss", case, mini_batch_size=CACHED_ROWS)
    return lambda inputs: loss.calculate_loss([[inputs.x], [inputs.y]], with_backward=case.backward)


def _ranking_loss(name: str, case: Case, **settings: int) -> Any:
    library = import_module("sentence_transformers")
    both = case.direction == "both"
    return library.sentence_transformer.losses.__dict__[name](
        torch.nn.Sequential(torch.nn.Identity()),  # the loss asks what its model begins with; the embeddings are given
        scale=case.scale,
        similarity_fct=library.util.dot_score,
        directions=("query_to_doc", "doc_to_query") if both else ("query_to_doc",),
        partition_mode="per_direction",
        **settings,
    )


_EVERY = ("both", "rows", "self")
_TRITON = ("cuda",)
_CONTENDERS = (
    Contender("ours", ours("auto"), OURS, directions=_EVERY),
    Contender("ours chunked", ours("chunked"), OURS, directions=_EVERY),
    Contender("ours reference", ours("reference"), OURS, directions=_EVERY),
    Contender("open_clip", _open_clip, "open_clip_torch", "open_clip", directions=("both",)),
    Contender("open_clip compiled", _open_clip_compiled, "open_clip_torch", "open_clip", directions=("both",), compiles=True),
    Contender("inf_cl", _inf_cl, "inf-cl", "inf_cl", devices=_TRITON, multiple_of=(64, 256)),
    Contender("torch linear_cross_entropy", _torch_linear, "torch", "torch"),
    Contender("liger", _liger, "liger-kernel", "liger_kernel", devices=_TRITON),
    Contender("cut-cross-entropy", _cut("high"), "cut-cross-entropy", "cut_cross_entropy", devices=_TRITON),
    Contender("cut-cross-entropy exact", _cut(None), "cut-cross-entropy", "cut_cross_entropy", devices=_TRITON),
    Contender("sentence-transformers", _ranking, "sentence-transformers", "sentence_transformers"),
    Contender("sentence-transformers cached", _ranking_cached, "sentence-transformers", "sentence_transformers"),
)
