"""train.py with the losses of losses.py, --loss barlow-twins or vicreg, in one process; flags: methods.sh."""

import torch.nn.functional as F
from losses import barlow_twins, vicreg
from torch import Tensor, nn

import train


class Baseline(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, views: list[Tensor]) -> Tensor:
        a, b = (view.float() for view in views)
        self.parts = {"alignment": 2 - 2 * F.cosine_similarity(a, b).mean().detach()}
        return self.loss([a, b])


if __name__ == "__main__":
    train.LOSSES["barlow-twins"] = lambda args: Baseline(barlow_twins)
    train.LOSSES["vicreg"] = lambda args: Baseline(vicreg)
    train.main()
