"""Run train.py with the losses of losses.py: `--loss barlow-twins` or `--loss vicreg`.

One process only. The commands are in methods.sh.
"""

from collections.abc import Callable

import torch.nn.functional as F
from losses import barlow_twins, vicreg
from torch import Tensor, nn

import train


class Baseline(nn.Module):
    """A loss of two views with the interface that train.py expects."""

    def __init__(self, loss: Callable[[list[Tensor]], Tensor]):
        super().__init__()
        self.loss = loss

    def forward(self, views: list[Tensor]) -> Tensor:
        z1, z2 = [view.float() for view in views]  # (m, d) each
        alignment = 2 - 2 * F.cosine_similarity(z1, z2).mean()
        self.parts = {"alignment": alignment.detach()}
        return self.loss([z1, z2])


if __name__ == "__main__":
    train.LOSSES.update(
        {
            "barlow-twins": lambda args: Baseline(barlow_twins),
            "vicreg": lambda args: Baseline(vicreg),
        }
    )
    train.main()
