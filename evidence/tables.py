"""Print the tables of evidence/README.md and README.md from the logs beside this file, and draw the figures.

PYTHONPATH=. python evidence/tables.py [--figures]; the figures need matplotlib."""

import functools
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from intl import INTLLoss, balanced_beta, rank_price

if "--figures" in sys.argv:
    import matplotlib.pyplot as plt

HERE = Path(__file__).parent
# Folder: title, and the linear top-1 published for 1000 epochs on all of CIFAR-10 with the 3x3 stem: by the
# methods' own releases; for Barlow Twins and VICReg by solo-learn, whose classifier is trained alongside.
METHODS = {
    "intl": ("INTL", "92.60"),
    "so": ("INTL with SO", ""),
    "srip": ("INTL with SRIP", ""),
    "iternorm": ("IterNorm alone", ""),
    "none": ("no transformation", ""),
    "cwrgp": ("CW-RGP, 2 views", "91.92"),
    "cwrgp4": ("CW-RGP, 4 views", "92.47"),
    "whiten": ("exact whitening, l^-0.5", ""),
    "power0.2": ("l^-0.2", ""),
    "power0.45": ("l^-0.45", ""),
    "power0.55": ("l^-0.55", ""),
    "barlow": ("Barlow Twins", "92.10"),
    "vicreg": ("VICReg", "92.07"),
}
RATES = "0.0003", "0.001", "0.003"  # of the last two
RANKS = "feature_rank", "embedding_rank"


@functools.cache
def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run: Path) -> list[dict]:
    """The untrained network's, and those of the training."""
    return [line for line in read(run / "log.jsonl") if "feature_rank" in line]


def last_step(run: Path) -> dict:
    return [line for line in read(run / "log.jsonl") if "alignment" in line][-1]


def accuracy(run: Path, images: int | None = None) -> list[float]:
    """Linear top-1 at the published rate and 5-NN, by linear_eval.py: its first, or on so many images."""
    lines = [line for line in read(run / "results.jsonl") if images in (None, line["images"][1])]
    results = {line["protocol"]: line["results"] for line in reversed(lines)}
    return [results["features"]["learning rate 0.01"][0], results["knn"]["5 nearest, Euclidean"][0]]


def configuration(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def seconds(run: Path) -> float:
    """Of an epoch's training, in the median."""
    log = read(run / "log.jsonl")
    speed = statistics.median(line["images_per_second"] for line in log if "images_per_second" in line)
    return configuration(run)["batch_size"] * log[-1]["step"] / log[-1]["epoch"] / speed


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several seeds, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(header: str, rows: list[list], runs: list[Path] = ()) -> str:
    """In Markdown; below it on what `runs` were made, and when."""
    header = header.split(", ")
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    if runs:
        starts = [read(run / "log.jsonl")[0] for run in runs]
        machines = sorted({start["machine"].split(", ", 1)[1] for start in starts})
        dates = sorted({start["date"][:10] for start in starts})
        dates = f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0]
        text += f"\n\n{len(runs)} runs; no GPU; {'; '.join(machines)}; {dates}."
    return text


def minutes(run: Path) -> float:
    """Of training and evaluation."""
    lines = evaluations(run)
    return (seconds(run) * lines[-1]["epoch"] + sum(line["seconds"] for line in lines)) / 60


def without_a_gpu() -> str:
    """The default run, and all of CIFAR-10."""
    rows, runs = [], [HERE / "shapes", HERE / "whole"]
    for run, images in zip(runs, ("shapes", "CIFAR-10")):
        first, *_, last = evaluations(run)
        random = HERE / f"{run.name}-random"
        for network, folder, line, time in (
            ("untrained", random, first, ""),
            ("INTL", run, last, f"{minutes(run):.0f}"),
        ):
            numbers = [f"{value:.1f}" for value in (*accuracy(folder), line["feature_rank"])]
            rows.append([images, network, int(line["epoch"]), *numbers, time])
    return table("images, network, epochs, linear top-1, 5-NN, rank of features, minutes", rows, runs)


@functools.cache
def method_runs() -> dict[str, list[Path]]:
    """The seeds of each method; of those with several rates, of each rate."""
    names = [name + rate for name in METHODS for rate in ("", *(f"-{rate}" for rate in RATES))]
    found = {name: sorted(HERE.glob(f"{name}-[0-9]")) for name in names}
    return {name: seeds for name, seeds in found.items() if seeds}


def mean_top1(name: str) -> float:
    return statistics.mean(accuracy(run)[0] for run in method_runs()[name])


def methods() -> str:
    """Side by side, each by the recipe that is named."""
    untrained = [*zip(*map(accuracy, HERE.glob("random-[0-9]")))]
    untrained.append([evaluations(run)[0]["feature_rank"] for run in method_runs()["intl"]])
    rows = [["untrained network", "", len(untrained[0]), *map(spread, untrained), "", "", ""]]
    for name, seeds in method_runs().items():
        title, published = METHODS[name.partition("-")[0]]
        flags = read(seeds[0] / "log.jsonl")[0]["command"].partition("--recipe ")[2]
        ends = [evaluations(run)[-1] for run in seeds]
        columns = [*zip(*map(accuracy, seeds)), *([end[key] for end in ends] for key in RANKS)]
        fastest = f"{min(map(seconds, seeds)):.0f}"
        rows.append([title, f"`{flags}`", len(seeds), *map(spread, columns), fastest, published])
    header = (
        "method, --recipe, seeds, linear top-1, 5-NN, rank of features, of embedding, s / epoch, published"
    )
    return table(header, rows, sum(method_runs().values(), []))


def release() -> str:
    """The official release's code beside train.py, on two sets of test images; the last step's terms."""
    rows, runs = [], []
    for stem, kind, images in (("", "small", 1000), ("", "small", 10_000), ("-cifar-stem", "3x3", 1000)):
        for name, title in (("official", "official release"), ("intl", "train.py")):
            seeds = sorted(HERE.glob(f"{name}{stem}-[0-9]"))
            columns = [*zip(*(accuracy(run, images) for run in seeds))]
            columns += [[last_step(run)[key] for run in seeds] for key in ("alignment", "trace")]
            rows.append([title, kind, images, len(seeds), *map(spread, columns, (1, 1, 2, 1))])
            runs += seeds
    header = "code, stem, test images, seeds, linear top-1, 5-NN, alignment, trace loss"
    return table(header, rows, list(dict.fromkeys(runs)))


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties having the mean of theirs."""
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in map(np.array, (x, y))]
    return np.corrcoef(ranks)[0, 1]


def correlations() -> str:
    """Of accuracy with what a run says at its end without labels."""
    linear = {run: accuracy(run)[0] for seeds in method_runs().values() for run in seeds}
    newton = {run: value for run, value in linear.items() if "trace" in last_step(run)}
    settings, fixed = {}, dict(dataset="cifar10", batch_size=256, axis="channel", epochs=10, ema=0.0)
    for run in (HERE / "prices").iterdir():
        if fixed.items() <= configuration(run).items():
            settings[run] = evaluations(run)[-1]["knn_top1"]
    groups = {"all methods, linear top-1": linear, "those with IterNorm, linear top-1": newton}
    groups["INTL with other T and beta, 5-NN"] = settings

    rows = []
    for title, group in groups.items():
        ends = [evaluations(run)[-1] | last_step(run) for run in group]
        columns = [[end["alignment"] for end in ends], *([end[key] for end in ends] for key in RANKS)]
        if group is not linear:
            columns += [[end["trace"] - end["floor"] for end in ends], [end["score"] for end in ends]]
        values = [f"{rank_correlation(column, [*group.values()]):.2f}" for column in columns]
        rows.append([title, len(group), *values, *[""] * (5 - len(values))])
    return table("runs, number, alignment, rank of features, of embedding, trace - floor, score", rows)


@functools.cache
def price_cells() -> dict[tuple, list[dict[str, float]]]:
    """The runs of prices.sh by images, axis, teacher, n, T and beta; of each seed what it cost and gave."""
    cells = {}
    for run in sorted((HERE / "prices").iterdir()):
        config, (first, *_, last) = configuration(run), evaluations(run)
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
    return table(header, rows, [*(HERE / "prices").iterdir()])


def in_short() -> str:
    """The README's."""
    top1 = lambda runs, *images: spread([accuracy(run, *images)[0] for run in runs])
    whole = f"linear top-1: all of CIFAR-10, 30 epochs, {minutes(HERE / 'whole'):.0f} minutes on a core"
    rows = [[whole, top1([HERE / "whole"]), f"untrained network {top1([HERE / 'whole-random'])}"]]

    official = sorted(HERE.glob("official-[0-9]"))
    row = ["5,000 images of it, 20 epochs; 10,000 test images", top1(method_runs()["intl"], 10_000)]
    rows.append([*row, f"the official release's code {top1(official, 10_000)}"])

    row = ["the same, 1,000 test images", top1(method_runs()["intl"])]
    others = [
        "cwrgp",
        "cwrgp4",
        *(max((f"{name}-{rate}" for rate in RATES), key=mean_top1) for name in ("barlow", "vicreg")),
    ]
    others = [f"{METHODS[name.partition('-')[0]][0]} {top1(method_runs()[name])}" for name in others]
    rows.append([*row, "; ".join(others)])

    beta = {
        names: seeds
        for (kind, n, T, _, names), seeds in price_cells().items()
        if (kind, n) == ("CIFAR-10", 32)
    }
    balanced, published = (spread([seed["5-NN"] for seed in beta[k]]) for k in ("balanced", "published"))
    rows.append(["5-NN: batch 32, 10 epochs", balanced, f"with the published beta {published}"])

    lines = (HERE / "losses.txt").read_text().partition("(256, 8192)")[2].splitlines()
    INTL, _, _, barlow, vicreg = (f"{float(line.split()[-3]):.0f}" for line in lines[2:7])
    row = ["ms of the loss, forward and backward, (256, 8192)", INTL]
    rows.append([*row, f"Barlow Twins {barlow}; VICReg {vicreg}"])
    return table("measured here, INTL, beside it", rows)


def draw_prices():
    """5-NN beyond a random network's, and rank of the embedding, over the price: every run a mark."""
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


def draw_whole():
    """5-NN and rank over the epochs."""
    lines = evaluations(HERE / "whole")
    figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for panel, key, title in zip(
        panels, ("knn_top1", "feature_rank"), ("5-NN, %", "effective rank of 512 features")
    ):
        panel.plot([line["epoch"] for line in lines], [line[key] for line in lines], marker=".")
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "whole.png", dpi=110)


def draw_spectra():
    """What each method leaves of the embedding's spectrum."""
    figure, panel = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for name in ("intl", "cwrgp", "whiten", "none", "iternorm"):
        last = evaluations(HERE / f"{name}-0")[-1]
        values = np.array(last["spectrum"])[:255]  # of a centred batch
        label = f"{METHODS[name][0]}\nrank {last['embedding_rank']:.0f}, 5-NN {last['knn_top1']:.0f} %"
        panel.plot(range(1, len(values) + 1), values / values[0], label=label, linewidth=2)
    panel.set(xscale="log", yscale="log", ylim=(1e-6, 1.5), xlim=(1, 255), xlabel="number of the eigenvalue")
    panel.set_title("eigenvalues of the embedding's covariance, over the largest")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(HERE / "spectra.png", dpi=110)


def draw_correlations():
    """Linear top-1 over the ranks: every run a mark."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for i, (name, seeds) in enumerate(method_runs().items()):
        for panel, key in zip(panels, RANKS):
            x = [evaluations(run)[-1][key] for run in seeds]
            y, (kind, _, rate) = [accuracy(run)[0] for run in seeds], name.partition("-")
            options = dict(s=16, color=f"C{i % 10}", marker="os"[i // 10])
            panel.scatter(x, y, label=f"{METHODS[kind][0]} {rate}".strip(), **options)
            panel.set(xscale="log", xlabel=f"effective rank of the {key.removesuffix('_rank')}s")
            panel.grid(alpha=0.3)
    panels[0].set(ylabel="linear top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    figure.savefig(HERE / "ranks.png", dpi=110)


if __name__ == "__main__":
    print(
        *(block() for block in (without_a_gpu, methods, release, correlations, prices, in_short)), sep="\n\n"
    )
    if "--figures" in sys.argv:
        for draw in (draw_whole, draw_spectra, draw_correlations, draw_prices):
            draw()
