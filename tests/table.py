"""The table of cases, and the rows of it that a tier runs: a covering array.

A row is a method and norm, a kind of anchor, settings and a dtype. What goes wrong in a kernel nearly always shows when
some two of these meet. So `covering` picks rows that meet every pair that can exist, anew for every backend.
"""

from itertools import combinations
from typing import NamedTuple

import torch

from robustft_kernels import METHODS
from robustft_kernels.testing import DTYPES, SETTINGS, Settings

ANCHORS = {"anchor of its dtype": True, "bf16 anchor": torch.bfloat16, "f32 anchor": torch.float32, "zero": False}
METHOD_NORMS = [(method, norm) for method, row in METHODS.items() for norm in row.rules]


class Row(NamedTuple):
    method_norm: tuple[str, str | None]
    anchor: str
    settings: Settings
    dtype: torch.dtype

    @property
    def names(self):
        """The names of what stands in the columns."""
        return "-".join(map(str, self.method_norm)), self.anchor, self.settings.name, str(self.dtype)

    def demands(self, ways=2):
        """The pairs that this row meets, or so many at once. Also that its settings act with its method, as some do in
        few dtypes."""
        yield from combinations(self.names, ways)
        if ways == 2 and self.settings.acts_on(self.dtype):
            yield "acts", self.method_norm, self.settings.name


TABLE = [
    Row(method_norm, anchor, settings, dtype)
    for method_norm in METHOD_NORMS
    for anchor in ANCHORS
    if METHODS[method_norm[0]].anchored or anchor == "zero"
    for settings in SETTINGS
    for dtype in DTYPES
]


def covering(turn, table=TABLE, ways=2):
    """Rows that together meet what the whole table meets, by pairs, or by so many words of a row. Another `turn` gives
    other rows. The choice is greedy: the next row is always one that meets the most of what is still to be met."""
    turn = turn * len(table) // 3 % len(table)
    table = table[turn:] + table[:turn]
    numbers = {}
    met_by = [[numbers.setdefault(demand, len(numbers)) for demand in row.demands(ways)] for row in table]
    widest = max(map(len, met_by))
    met_by = torch.tensor([met + met[:1] * (widest - len(met)) for met in met_by], device="cpu")
    open_, chosen = torch.ones(len(numbers), dtype=torch.bool, device="cpu"), []
    while open_.any():
        chosen.append(int(open_[met_by].sum(1).argmax()))
        open_[met_by[chosen[-1]]] = False
    return [table[i] for i in sorted(chosen)]
