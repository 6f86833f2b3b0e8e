"""Print the tables of evidence/README.md from the logs beside this file, and draw its figure.

PYTHONPATH=. python evidence/tables.py [--figures]; the figures need matplotlib."""

import functools
import json
import math
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


def methods() -> str:
    """Every method by its own recipe: linear top-1, 5-NN, ranks, minutes."""
    rows = []
    for name, title in METHODS.items():
        seeds = []
        for run in sorted(HERE.glob(f"{name}-[0-9]")):
            config, _, last = logged(run)
            results = {line["protocol"]: line["results"] for line in read(run / "results.jsonl")}
            speeds = [x["images_per_second"] for x in read(run / "log.jsonl") if "images_per_second" in x]
            minutes = config["images"] * last["epoch"] / statistics.median(speeds) / 60
            linear = results["features"]["learning rate 0.01"][0]
            knn = results["knn"]["5 nearest, Euclidean"][0]
            seeds.append([linear, knn, last["feature_rank"], last["embedding_rank"], minutes])
        rows.append([title, len(seeds), *map(spread, zip(*seeds))])
    header = "method, seeds, linear top-1, 5-NN, rank of features, rank of embedding, minutes"
    return table(header.split(", "), rows)


def price_cells() -> dict[tuple, list[dict[str, float]]]:
    """The runs of prices.sh by images, axis, teacher, n, T and beta; of each seed what it cost and gave."""
    cells = {}
    for run in sorted((HERE / "prices").iterdir()):
        config, first, last = logged(run)
        teacher, loss = bool(config["ema"]), INTLLoss(axis=config["axis"], iterations=config["iterations"])
        n, full, published, _ = loss.weigh(config["batch_size"], config["out"])
        price = functools.partial(rank_price, n=n, iterations=loss.iterations, full=full, teacher=teacher)
        rank, beta = last["embedding_rank"], config["beta"]
        numbers = {"p(1)": price(1, beta=beta), "p(R/4)": price(full / 4, beta=beta), "rank": rank / full}
        numbers |= {"paid": price(rank, beta=beta), "5-NN": last["knn_top1"]}
        numbers |= {"gain": last["knn_top1"] - first["knn_top1"], "needed": 4 / math.log2(full)}
        balanced = balanced_beta(n, loss.iterations, full=full)
        near = {"published": published, "balanced": balanced}
        names = ", ".join(name for name, value in near.items() if abs(beta / value - 1) < 0.04)
        images = "shapes" if config["dataset"] == "shapes" else "CIFAR-10"
        kind = images + ", batch axis" * (loss.axis == "batch") + ", teacher" * teacher
        cells.setdefault((kind, n, loss.iterations, beta, names), []).append(numbers)
    return dict(sorted(cells.items()))


def prices() -> str:
    """What rank costs, and what came of it."""
    rows = []
    for (kind, n, T, beta, names), seeds in price_cells().items():
        column = {name: [seed[name] for seed in seeds] for name in seeds[0]}
        costs = [f"{column[name][0]:.2f}" for name in ("p(1)", "p(R/4)", "needed")]
        measured = [spread(column["5-NN"]), spread(column["gain"])]
        measured += [spread(column["rank"], 2), spread(column["paid"], 2)]
        rows.append([kind, n, T, f"{beta:g} {names}".strip(), len(seeds), *costs, *measured])
    header = "images, n, T, beta, seeds, p(1), p(R/4), share, 5-NN, gain, rank / R, p(rank)"
    return table(header.split(", "), rows)


def draw_prices():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for (kind, n, T, _, _), seeds in price_cells().items():
        for seed in seeds:
            marker = "o" if kind == "CIFAR-10" else "s" if kind == "shapes" else "^"
            color = f"C{T}" if T != 4 else plt.cm.viridis(math.log2(n / 16) / 6)
            for panel, name in zip(axes, ("gain", "rank")):
                panel.scatter(seed["p(R/4)"] / seed["needed"], seed[name], color=color, marker=marker, s=18)
    figure.savefig(HERE / "prices.png")


if __name__ == "__main__":
    print(methods(), prices(), sep="\n\n")
    if "--figures" in sys.argv:
        draw_prices()
