"""Every form in which the Triton kernels of the contrastive loss may be compiled, for checks ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._configurations import Configuration, Key, stored
from ._contrastive_forward import forward_tile
from ._contrastive_gradient import gradient_tile

_PLAIN = {  # what is asked for, by the argument of the kernels that says so; all else is off
    "rows": ("POSITIVE",),
    "both": ("COLUMNS", "POSITIVE"),
    "one side": ("COLUMNS", "POSITIVE", "POSITIVE_Y"),
}
_MASKED = {
    "masked": ("COLUMNS", "POSITIVE", "POSITIVE_Y", "IDS", "THERE", "KNOWN"),
    "diagonal": ("COLUMNS", "POSITIVE", "POSITIVE_Y", "IDS", "THERE", "KNOWN", "MIRROR", "SELF"),
}
_FULL = {  # the most that can come together
    "groups": ("COLUMNS", "GROUPS", "IDS", "THERE", "KNOWN", "TOTAL", "SOFT", "MIRROR", "SELF"),
    "soft": ("COLUMNS", "POSITIVE", "POSITIVE_Y", "IDS", "THERE", "KNOWN", "TOTAL", "SOFT", "MIRROR", "SELF"),
    "sigmoid": ("COLUMNS", "GROUPS", "IDS", "THERE", "KNOWN", "TOTAL", "SIGMOID", "BIAS", "MIRROR", "SELF"),
}
_DEMANDING = ("diagonal", "groups", "soft")  # who has registers for these has them for the others of their weight
_SWITCHES = {name for names in (*_PLAIN.values(), *_MASKED.values(), *_FULL.values()) for name in names} | {"REPAIR"}
_NEEDED_BY = {  # which arguments are there only with which switch
    "taught_x": "SOFT", "taught_y": "SOFT", "positive": "POSITIVE", "positive_y": "POSITIVE_Y", "groups_x": "GROUPS", "groups_y": "GROUPS",
    "ids_x": "IDS", "ids_y": "IDS", "there_x": "THERE", "there_y": "THERE", "known_row": "KNOWN", "known_column": "KNOWN",
    "known_start": "KNOWN", "told_y": "COLUMNS", "of_bias": "BIAS",
}  # fmt: skip
_INTEGERS = dict.fromkeys(("groups_x", "groups_y", "ids_x", "ids_y"), "*i32") | dict.fromkeys(("there_x", "there_y"), "*i1")
_INTEGERS |= dict.fromkeys(("positive", "positive_y", "known_row", "known_column", "known_start", "flag"), "*i32:16")
_INTEGERS |= dict.fromkeys(("stride_x", "stride_y", "stride_tx", "stride_ty", "D", "DT"), "i32:16")
_INTEGERS |= dict.fromkeys(("R", "C", "diagonal", "stride_g"), "i32")


def compile_cases(capability: int, triton_version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One entry for each form, with the tile that runs there."""
    for products, kinds in (("half", ("bf16", "fp16")), ("tf32", ("fp32",)), ("3xtf32", ("fp32",)), ("ieee", ("fp32",))):
        for kind in kinds:
            for weight, forms in (("plain", _PLAIN), ("masked", _MASKED), ("full", _FULL)):
                for form, asked in forms.items():
                    if form == "both" or kind == "bf16" or (kind == "fp32" and form in _DEMANDING):
                        yield from _cases(Key(capability, triton_version, products, weight), kind, form, asked)


def _cases(key: Key, kind: str, form: str, asked: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    forward, gradient = stored(key)
    products, label = key.products, f"{kind} {key.products}, {form}"
    yield _case(gradient_tile, label, gradient, products, kind, asked)
    yield _case(forward_tile, label, forward, products, kind, asked)
    if form in _DEMANDING:
        yield _case(forward_tile, f"{label}, repair", forward, products, kind, (*asked, "REPAIR"))


def _case(kernel: Any, label: str, tile: Configuration, products: str, kind: str, asked: tuple[str, ...]) -> dict[str, Any]:
    precision = {"half": "ieee", "3xtf32": "tf32x3"}.get(products, products)
    fixed: dict[str, Any] = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group, "SPLIT": tile.split}
    fixed |= {"TMA": tile.tma, "PRECISION": precision, "UP": False} | {name: name in asked for name in _SWITCHES}
    fixed |= {name: None for name, switch in _NEEDED_BY.items() if switch not in asked}
    types = dict.fromkeys(kernel.arg_names, "*fp32:16") | _INTEGERS
    types |= dict.fromkeys(("x", "y", "taught_x", "taught_y", "gradient", "gradient_at"), f"*{kind}:16")
    if tile.tma:
        types |= dict.fromkeys(("x", "taught_x"), f"tensordesc<{kind}[{tile.rows},{tile.depth}]>")
        types |= dict.fromkeys(("y", "taught_y"), f"tensordesc<{kind}[{tile.columns},{tile.depth}]>")
        types["gradient"] = f"tensordesc<{kind}[{tile.rows},{tile.columns // tile.split}]>"
    return {
        "kernel": kernel.__name__,
        "label": label,
        "signature": {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names},
        "constexprs": {name: fixed[name] for name in kernel.arg_names if name in fixed},
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "dots": {"half": "16", "3xtf32": "tf32"}.get(products, products),
    }
