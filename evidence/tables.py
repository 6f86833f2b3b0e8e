"""Print the tables of evidence/README.md from the logs beside this file, and draw its figure.

PYTHONPATH=. python evidence/tables.py [--figures]; the figures need matplotlib."""

import functools
import json
import statistics
import sys
from pathlib import Path

from intl import INTLLoss, balanced_beta, rank_price

HERE = Path(__file__).parent
METHODS = {
    "intl": "INTL",
    "cwrgp": "CW-RGP, 2 views",
    "whiten": "exact whitening, l^-0.5",
    "power0.45": "l^-0.45",
    "power0.55": "l^-0.55",
    "cifar-stem": "INTL, with the papers' stem",
}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run: Path) -> tuple[dict, dict, dict]:
    """Of a run: its configuration, the random network's evaluation, and the last one."""
    evaluations = [line for line in read(run / "log.jsonl") if "embedding_rank" in line or "knn_top1" in line]
    return json.loads((run / "config.json").read_text()), evaluations[0], evaluations[-1]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several seeds, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def last_step(run: Path) -> dict:
    return next(line for line in reversed(read(run / "log.jsonl")) if "trace" in line)


def accuracy(run: Path) -> list[float]:
    """Linear top-1 at the published rate, and 5-NN, by linear_eval.py."""
    results = {line["protocol"]: line["results"] for line in read(run / "results.jsonl")}
    return [results["features"]["learning rate 0.01"][0], results["knn"]["5 nearest, Euclidean"][0]]


def methods() -> str:
    """Every method by its own recipe: linear top-1, 5-NN, ranks, minutes."""
    rows = []
    for name, title in METHODS.items():
        seeds = []
        for run in sorted(HERE.glob(f"{name}-[0-9]")):
            config, _, last = logged(run)
            speeds = [x["images_per_second"] for x in read(run / "log.jsonl") if "images_per_second" in x]
            minutes = config["images"] * last["epoch"] / statistics.median(speeds) / 60
            seeds.append([*accuracy(run), last["feature_rank"], last["embedding_rank"], minutes])
        rows.append([title, len(seeds), *map(spread, zip(*seeds))])
    header = "method, seeds, linear top-1, 5-NN, rank of features, rank of embedding, minutes"
    return table(header.split(", "), rows)


def release() -> str:
    """The official release's code beside train.py: linear top-1, 5-NN, the last step's terms of the loss."""
    rows = []
    for name, title in (("official", "official release"), ("intl", "train.py")):
        seeds = []
        for run in sorted(HERE.glob(f"{name}-[0-9]")):
            step = last_step(run)
            seeds.append([*accuracy(run), step["alignment"], step["trace"]])
        columns = zip(zip(*seeds), (1, 1, 2, 1))
        rows.append([title, len(seeds), *[spread(values, digits) for values, digits in columns]])
    return table("code, seeds, linear top-1, 5-NN, alignment, trace loss".split(", "), rows)


@functools.cache
def price_cells() -> dict[tuple, list[dict[str, float]]]:
    """The runs of prices.sh by images, axis, teacher, n, T and beta; of each seed what it cost and gave."""
    cells = {}
    for run in sorted((HERE / "prices").iterdir()):
        config, first, last = logged(run)
        teacher, loss = bool(config["ema"]), INTLLoss(axis=config["axis"], iterations=config["iterations"])
        n, full, published, _ = loss.setting(config["batch_size"], config["out"])
        beta, rank = config["beta"], last["embedding_rank"] / full
        prices = [rank_price(r, n, loss.iterations, beta, full=full, teacher=teacher) for r in (1, full / 4)]
        numbers = {"p(1)": prices[0], "p(R/4)": prices[1], "rank": rank}
        step = last_step(run)
        numbers["paid"] = (2 - teacher) * beta * (step["trace"] - step["floor"])
        numbers |= {"5-NN": last["knn_top1"], "gain": last["knn_top1"] - first["knn_top1"]}
        balanced = balanced_beta(n, loss.iterations, full=full)
        near = {"published": published, "balanced": balanced}
        names = ", ".join(name for name, value in near.items() if abs(beta / value - 1) < 0.04)
        images = "shapes" if config["dataset"] == "shapes" else "CIFAR-10"
        kind = images + ", batch axis" * (loss.axis == "batch") + ", teacher" * teacher
        kind += ", 30 epochs" * (config["epochs"] == 30)
        cells.setdefault((kind, n, loss.iterations, beta, names), []).append(numbers)
    return dict(sorted(cells.items()))


def prices() -> str:
    """What rank costs, and what came of it."""
    rows = []
    for (kind, n, T, beta, names), seeds in price_cells().items():
        column = {name: [seed[name] for seed in seeds] for name in seeds[0]}
        costs = [f"{column[name][0]:.2f}" for name in ("p(1)", "p(R/4)")]
        measured = [spread(column["5-NN"]), spread(column["gain"])]
        measured += [spread(column["rank"], 2), spread(column["paid"], 2)]
        rows.append([kind, n, T, f"{beta:g} {names}".strip(), len(seeds), *costs, *measured])
    header = "images, n, T, beta, seeds, p(1), p(R/4), 5-NN, gain, rank / R, paid"
    return table(header.split(", "), rows)


def small_batches() -> str:
    """The README's: published and balanced beta side by side, CIFAR-10, channel axis."""
    cells = {(kind, n, T, name): (beta, s) for (kind, n, T, beta, name), s in price_cells().items()}
    rows = []
    for n, T in ((16, 4), (32, 4), (256, 3), (256, 2)):
        row = [n, T]
        for name in ("published", "balanced"):
            beta, seeds = cells["CIFAR-10", n, T, name]
            row += [f"{beta:g}", spread([seed["5-NN"] for seed in seeds])]
        rows.append(row)
    header = "batch, T, published beta, 5-NN, balanced beta, 5-NN"
    return table(header.split(", "), rows)


def draw_prices():
    """5-NN beyond a random network's, and rank of the embedding, over the price: every run a mark."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    marks = {"CIFAR-10": "o", "shapes": "s", "teacher": "^", "batch axis": "D"}
    for (kind, n, T, _, _), seeds in price_cells().items():
        mark = marks[kind.removesuffix(", 30 epochs").split(", ")[-1]]
        color = "C0" if (n, T) == (256, 4) else "C1" if T == 4 and n < 256 else "C2" if T == 4 else "C3"
        options = dict(color=color, marker=mark, s=22, alpha=0.8, linewidths=0)
        for seed in seeds:
            panels[0].scatter(seed["p(R/4)"], seed["gain"] / (4 if kind == "shapes" else 1), **options)
            panels[1].scatter(seed["p(R/4)"], seed["rank"], **options)
    for name, color in (("n < 256", "C1"), ("n = 256", "C0"), ("n > 256", "C2"), ("T = 2, 3, 5, 7", "C3")):
        panels[1].scatter([], [], color=color, label=name)
    for name, mark in marks.items():
        panels[1].scatter([], [], color="gray", marker=mark, label=name)
    panels[1].legend(fontsize="small")
    titles = "5-NN, points above a random network (shapes: / 4)", "effective rank / full rank R"
    for panel, title in zip(panels, titles):
        panel.set(xscale="log", xlabel="p(R/4): the price of losing three quarters of the rank", title=title)
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "prices.png", dpi=110)


if __name__ == "__main__":
    print(methods(), release(), prices(), small_batches(), sep="\n\n")
    if "--figures" in sys.argv:
        draw_prices()
