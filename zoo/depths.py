"""How many levels below the end of a network each parameter stands, for learning rates that fall towards the input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

BLOCK = re.compile(r"((?:.*?\.)??(?:blocks|layers|layer|resblocks|stages|h))\.(\d+)\.")
FIRST = re.compile(  # in the names of what stands before the blocks: of modules, of parameters; a head may have words, a stage a conv1
    r"(?:^|\.)(?:[^.]*embed[^.]*|patch[^.]*|(?<!head\.)(?:words|places|kinds)|stem|first|(?<!\d\.)conv1|norm_pre|ln_pre|pre_layrnorm)\.|"
    r"(?:^|\.)(?:[^.]*embed[^.]*|[^.]*token|positions?|cls|mask)$"
)


def levels_below(names: Sequence[str]) -> dict[str, int]:
    """{name: levels below the end}: 0 behind the blocks, L - i in block i of L, L + 1 before the blocks.

    These are the levels of BEiT (Bao et al., 2021, https://arxiv.org/abs/2106.08254): what is neither in a numbered block nor an embedding
    by its name, such as a norm, a head, or a table that all blocks share, stands behind the blocks. Of several stacks each counts on its
    own, and embeddings belong to the one that shares most of their name, or else comes next. Where blocks lie in stages, a stage is one.

    Args:
        names: Of all parameters, frozen ones too, in the order of the model.
    """
    found = [BLOCK.match(name) for name in names]
    sizes: dict[str, int] = {}  # of each stack
    begins: dict[str, int] = {}  # the place of its first parameter
    for place, match in enumerate(found):
        if match is not None:
            sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1)
            begins.setdefault(match[1], place)
    levels = {}
    for place, (name, match) in enumerate(zip(names, found, strict=True)):
        if match is not None:
            levels[name] = sizes[match[1]] - int(match[2])
        elif sizes and FIRST.search(name):
            near = {stack: (_in_common(name, stack), begin > place, -abs(begin - place)) for stack, begin in begins.items()}
            levels[name] = sizes[max(near, key=near.__getitem__)] + 1
        else:
            levels[name] = 0
    return levels


def _in_common(name: str, stack: str) -> int:
    """How many steps of two names are the same from the first on."""
    return len([*takewhile(lambda steps: steps[0] == steps[1], zip(name.split("."), stack.split("."), strict=False))])
