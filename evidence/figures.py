"""Draw the figures of README.md and evidence/README.md from the logs.

    PYTHONPATH=. python evidence/figures.py

Needs matplotlib.
"""

import matplotlib.pyplot as plt
import numpy as np
from tables import (
    HERE,
    METHODS,
    RANKS,
    RUNS,
    PriceCell,
    evaluations,
    linear_top1,
    method_runs,
    price_cells,
)


def draw_spectra():
    """The spectrum of the embedding at the end of training, by method."""
    figure, panel = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for name in ("intl", "cwrgp", "whiten", "none", "iternorm"):
        title = METHODS[name][0]
        last = evaluations(RUNS / f"{name}-0")[-1]
        eigenvalues = np.array(last["spectrum"])[:255]  # a centered batch of 256 has rank 255
        panel.plot(
            range(1, len(eigenvalues) + 1),
            eigenvalues / eigenvalues[0],
            label=f"{title}\nrank {last['embedding_rank']:.0f}, 5-NN {last['knn_top1']:.0f} %",
            linewidth=2,
        )
    panel.set(xscale="log", yscale="log", xlim=(1, 255), ylim=(1e-6, 1.5))
    panel.set(xlabel="index of the eigenvalue", ylabel="eigenvalue / largest")
    panel.set_title("Eigenvalues of the embedding's covariance")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(HERE / "spectra.png", dpi=110)


def draw_whole():
    """5-NN and feature rank while training on all of CIFAR-10."""
    lines = evaluations(RUNS / "whole")
    epochs = [line["epoch"] for line in lines]
    titles = {"knn_top1": "5-NN top-1, %", "feature_rank": "effective rank of the 512 features"}
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for panel, (key, title) in zip(panels, titles.items()):
        panel.plot(epochs, [line[key] for line in lines], marker=".")
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "whole.png", dpi=110)


def draw_ranks():
    """Linear top-1 against the effective ranks, one marker per run."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for i, (name, seeds) in enumerate(method_runs().items()):
        method, _, learning_rate = name.partition("-")
        label = f"{METHODS[method][0]} {learning_rate}".strip()
        top1 = [linear_top1(run) for run in seeds]
        marker = "o" if i < 10 else "s"
        for panel, key in zip(panels, RANKS):
            ranks = [evaluations(run)[-1][key] for run in seeds]
            panel.scatter(ranks, top1, s=16, color=f"C{i % 10}", marker=marker, label=label)
            panel.set(xscale="log", xlabel=f"effective rank of the {key.removesuffix('_rank')}s")
            panel.grid(alpha=0.3)
    panels[0].set(ylabel="linear top-1, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="x-small")
    figure.savefig(HERE / "ranks.png", dpi=110)


# color: the batch size and T; marker: the images and the form of the loss
COLORS = {"n < 256": "C1", "n = 256": "C0", "n > 256": "C2", "T = 2, 3, 5, 7": "C3"}
MARKERS = {"CIFAR-10": "o", "shapes": "s", "teacher": "^", "batch axis": "D"}


def color_of(cell: PriceCell) -> str:
    if cell.iterations != 4:
        return COLORS["T = 2, 3, 5, 7"]
    if cell.n < 256:
        return COLORS["n < 256"]
    if cell.n > 256:
        return COLORS["n > 256"]
    return COLORS["n = 256"]


def marker_of(cell: PriceCell) -> str:
    kind = cell.images.removesuffix(", 30 epochs").split(", ")[-1]
    return MARKERS[kind]


def draw_prices():
    """Gain in 5-NN and remaining rank against the price of lost rank, one marker per run."""
    figure, (gain_panel, rank_panel) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for cell, seeds in price_cells().items():
        style = dict(color=color_of(cell), marker=marker_of(cell), s=22, alpha=0.8, linewidths=0)
        scale = 4 if cell.images == "shapes" else 1
        for seed in seeds:
            gain_panel.scatter(seed["p(R/4)"], seed["gain"] / scale, **style)
            rank_panel.scatter(seed["p(R/4)"], seed["rank"], **style)

    for label, color in COLORS.items():
        rank_panel.scatter([], [], color=color, label=label)
    for label, marker in MARKERS.items():
        rank_panel.scatter([], [], color="gray", marker=marker, label=label)
    rank_panel.legend(fontsize="small")
    gain_panel.set_title("gain in 5-NN over the untrained network (shapes: / 4)")
    rank_panel.set_title("effective rank / full rank R")
    for panel in (gain_panel, rank_panel):
        panel.set(xscale="log", xlabel="p(R/4): price of losing three quarters of the rank")
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "prices.png", dpi=110)


if __name__ == "__main__":
    draw_spectra()
    draw_whole()
    draw_ranks()
    draw_prices()
