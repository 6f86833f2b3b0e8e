"""Print the tables of README.md and evidence/README.md from the logs in evidence/runs.

    PYTHONPATH=. python evidence/tables.py

A test checks that every table printed here stands word for word in one of the two files.
"""

import functools
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from intl import balanced_beta, published_beta, trace_floor

HERE = Path(__file__).parent
RUNS = HERE / "runs"

# Methods of "Methods side by side": the prefix of their runs, their title, and the published linear
# top-1 after 1000 epochs on all of CIFAR-10 with the 3x3 stem. INTL and CW-RGP are from their own
# releases, Barlow Twins and VICReg from solo-learn, which trains its classifier alongside.
METHODS = {
    "intl": ("INTL", "92.60"),
    "so": ("INTL with SO", ""),
    "srip": ("INTL with SRIP", ""),
    "iternorm": ("IterNorm without trace loss", ""),
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
LEARNING_RATES = ("0.0003", "0.001", "0.003")  # tried for Barlow Twins and VICReg
RANKS = ("feature_rank", "embedding_rank")

# Published CIFAR-10 results of a ResNet-18 with the 3x3 stem: method, epochs, linear top-1, k-NN,
# classifier, source. All were read in the source on 2026-11-26 (MoCo v3: 2026-11-29).
INTL_RELEASE = "[winci-ai/INTL](https://github.com/winci-ai/INTL/blob/d4cdfd8/README.md)"
CWRGP_RELEASE = "[winci-ai/CW-RGP](https://github.com/winci-ai/CW-RGP/blob/5bbf6ed/README.md)"
KOBAK = "[dkobak/simclr-cifar10](https://github.com/dkobak/simclr-cifar10/blob/44b2500/README.md)"
SOLO = "[solo-learn](https://github.com/vturrisi/solo-learn/blob/9187ea3/README.md)"
EB_JEPA = (
    "[facebookresearch/eb_jepa]"
    "(https://github.com/facebookresearch/eb_jepa/blob/966e61e/examples/image_jepa/README.md)"
)
MOCO_V3 = "93.10"
PUBLISHED = [
    ["INTL", 1000, "92.60", "90.03 (5-NN)", "on stored features", INTL_RELEASE],
    ["CW-RGP, 2 views", 1000, "91.92", "89.54 (5-NN)", "on stored features", CWRGP_RELEASE],
    ["SimCLR", 1000, "91.7", "91.4 (10-NN, cosine)", "on stored features", KOBAK],
    ["SimCLR", 1000, "91.9", "", "with augmentation", KOBAK],
    ["MoCo v3", 1000, MOCO_V3, "", "trained alongside", SOLO],
    ["Barlow Twins", 1000, "92.10", "", "trained alongside", SOLO],
    ["VICReg", 1000, "92.07", "", "trained alongside", SOLO],
    ["SIGReg", 300, "91.02", "", "trained alongside, best of a sweep", EB_JEPA],
    ["VICReg", 300, "90.12", "", "trained alongside, best of a sweep", EB_JEPA],
]


# --- Reading the logs -----------------------------------------------------------------------------


@functools.cache
def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_config(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def first_line(run: Path) -> dict:
    """The line with the command, the machine and the date."""
    return read_lines(run / "log.jsonl")[0]


def evaluations(run: Path) -> list[dict]:
    """The evaluations during pretraining; the first is that of the untrained network."""
    return [line for line in read_lines(run / "log.jsonl") if "feature_rank" in line]


def logged_steps(run: Path) -> list[dict]:
    return [line for line in read_lines(run / "log.jsonl") if "images_per_second" in line]


def results(run: Path, protocol: str, test_images: int | None = None) -> dict[str, list[float]]:
    """Name -> [top-1, top-5] of the first evaluation by linear_eval.py (on so many test images)."""
    for line in read_lines(run / "results.jsonl"):
        if line["protocol"] == protocol and test_images in (None, line["images"][1]):
            return line["results"]
    raise KeyError(f"{run} has no results of {protocol} on {test_images} images")


def linear_top1(run: Path, test_images: int | None = None) -> float:
    """At the published learning rate."""
    return results(run, "features", test_images)["learning rate 0.01"][0]


def knn_top1(run: Path, test_images: int | None = None, kind="5 nearest, Euclidean") -> float:
    return results(run, "knn", test_images)[kind][0]


def images_per_second(run: Path) -> float:
    """The median over the logged intervals."""
    return statistics.median(line["images_per_second"] for line in logged_steps(run))


def seconds_per_epoch(run: Path) -> float:
    last = logged_steps(run)[-1]
    steps_per_epoch = last["step"] / last["epoch"]
    return read_config(run)["batch_size"] * steps_per_epoch / images_per_second(run)


def minutes(run: Path) -> float:
    """Training, compilation included, and the evaluations on the way."""
    batch_size = read_config(run)["batch_size"]
    seconds = sum(line["seconds"] for line in evaluations(run))
    previous_step = 0
    for line in logged_steps(run):
        images = (line["step"] - previous_step) * batch_size
        seconds += images / line["images_per_second"]
        previous_step = line["step"]
    return seconds / 60


# --- Writing Markdown -----------------------------------------------------------------------------


def mean_std(values: list[float], digits: int = 1) -> str:
    """The mean and, for several seeds, the standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def write_minutes(runs: list[Path]) -> str:
    mean = statistics.mean(minutes(run) for run in runs)
    return f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def provenance(runs: list[Path]) -> str:
    """How many runs, on which machines, when."""
    machines = set()
    dates = set()
    for run in runs:
        machine = first_line(run)["machine"]
        machine = re.sub("^1 x (CPU|no GPU)", "CPU", machine)
        machines.add(machine.replace(" 1 threads", " 1 thread"))
        dates.add(first_line(run)["date"][:10])
    period = min(dates)
    if len(dates) > 1:
        period += f" to {max(dates)}"
    noun = "run" if len(runs) == 1 else "runs"
    return f"{len(runs)} {noun}; {'; '.join(sorted(machines))}; {period}."


# --- The tables of README.md ----------------------------------------------------------------------


def readme_results() -> str:
    """INTL on CIFAR-10 with a ResNet-18, each row with what it may be compared with."""
    small = method_runs()["intl"]
    whole = RUNS / "whole"
    gpu = gpu_runs()[-1]
    official = sorted(RUNS.glob("official-[0-9]"))
    official_top1 = mean_std([linear_top1(run, 10_000) for run in official])
    untrained = mean_std([linear_top1(run) for run in sorted(RUNS.glob("random-[0-9]"))])
    vicreg = best_learning_rate("vicreg")
    barlow = best_learning_rate("barlow")

    def row(setting: str, hardware: str, runs: list[Path], test_images: int, others: str) -> list:
        time = f"{hardware}, {write_minutes(runs)} minutes"
        top1 = mean_std([linear_top1(run, test_images) for run in runs])
        return [setting, read_config(runs[0])["epochs"], time, len(runs), top1, others]

    core = "1 CPU core"
    rows = [
        row("5,000 images, small stem", core, small, 10_000, f"official code: {official_top1}"),
        row(
            "the same runs, on 1,000 of the 10,000 test images",
            core,
            small,
            1000,
            f"untrained: {untrained}; VICReg: {vicreg}, Barlow Twins: {barlow}, each at the best "
            "of 3 learning rates",
        ),
        row(
            "50,000 images, small stem",
            core,
            [whole],
            10_000,
            f"untrained network: {linear_top1(RUNS / 'whole-random'):.1f}",
        ),
        row("50,000 images, 3x3 stem", f"prototype, 1 {gpu_name(gpu)}", [gpu], 10_000, ""),
        [
            "**published**, 50,000 images, 3x3 stem",
            1000,
            "not run here",
            "",
            METHODS["intl"][1],
            f"solo-learn: MoCo v3 {MOCO_V3}, Barlow Twins {METHODS['barlow'][1]}, VICReg "
            f"{METHODS['vicreg'][1]}",
        ],
    ]
    header = ["training images, stem", "epochs", "hardware, time", "seeds", "linear top-1"]
    return table([*header, "for comparison"], rows)


def best_learning_rate(method: str) -> str:
    """The highest of the mean linear top-1 at the learning rates that were tried."""
    tried = []
    for name, runs in method_runs().items():
        if name.startswith(f"{method}-"):
            tried.append([linear_top1(run, 1000) for run in runs])
    return mean_std(max(tried, key=statistics.mean))


# --- The tables of evidence/README.md -------------------------------------------------------------


def gpu_runs() -> list[Path]:
    runs = RUNS.glob("cifar10-[0-9]*")
    return sorted(runs, key=lambda run: read_config(run)["epochs"])


def gpu_name(run: Path) -> str:
    """NVIDIA H200 from "1 x NVIDIA H200, 16 threads, torch 2.11.0+cu130"."""
    return first_line(run)["machine"].partition(",")[0].removeprefix("1 x ")


def on_a_gpu() -> str:
    rows = []
    for run in gpu_runs():
        speed = round(images_per_second(run), -2)
        top1 = [linear_top1(run), knn_top1(run), knn_top1(run, kind="20 nearest, cosine")]
        rows.append(
            [
                read_config(run)["epochs"],
                f"{minutes(run):.1f}",
                f"{speed:,.0f}",
                *(f"{value:.2f}" for value in top1),
            ]
        )
    header = ["epochs", "minutes", "images/s", "linear top-1", "5-NN", "20-NN, cosine"]
    return f"{table(header, rows)}\n\n{provenance(gpu_runs())}"


def published() -> str:
    header = ["method", "epochs", "linear top-1", "k-NN", "linear classifier", "source"]
    return table(header, PUBLISHED)


def step_speed() -> str:
    """Throughput by how a step is launched; of these runs only the printed lines were kept."""
    titles = {
        "eager": "commit 94cc625",
        "compiled": "commit 94cc625, `--compile`",
        "captured": "`--compile`, step captured in a CUDA graph (prototype)",
    }
    rows = []
    for name, title in titles.items():
        text = (RUNS / f"gpu-step-{name}" / "log.txt").read_text()
        batch_size = int(re.search(r"batch_size (\d+)", text)[1])
        speeds = [float(number) for number in re.findall(r"images_per_second (\S+)", text)]
        speed = statistics.median(speeds[1:])  # the first interval compiles and warms up
        rows.append([title, f"{round(speed, -2):,.0f}", f"{1000 * batch_size / speed:.1f}"])
    return table(["recipe `cifar10`, batch 256", "images/s", "ms per step"], rows)


def without_a_gpu() -> str:
    """The default run, and all of CIFAR-10, each above the same network without training."""
    header = ["images", "network", "epochs", "seeds", "linear top-1", "5-NN", "rank of features"]
    rows = []
    trained = []
    for name, images in (("shapes", "shapes"), ("whole", "CIFAR-10")):
        folders = sorted(RUNS.glob(f"{name}*"))
        untrained = [run for run in folders if "random" in run.name]
        runs = [run for run in folders if run not in untrained]
        trained += runs
        config = read_config(runs[0])
        network = config["arch"].replace("resnet", "ResNet-")
        untrained_ranks = [evaluations(run)[0]["feature_rank"] for run in runs[: len(untrained)]]
        ranks = [evaluations(run)[-1]["feature_rank"] for run in runs]
        for title, epochs, seeds, feature_ranks, time in (
            (f"{network}, untrained", 0, untrained, untrained_ranks, ""),
            (f"{network}, INTL", config["epochs"], runs, ranks, write_minutes(runs)),
        ):
            numbers = [
                [linear_top1(run) for run in seeds],
                [knn_top1(run) for run in seeds],
                feature_ranks,
            ]
            cells = [mean_std(values) for values in numbers]
            rows.append([images, title, epochs, len(seeds), *cells, time])
    return f"{table([*header, 'minutes'], rows)}\n\n{provenance(trained)}"


@functools.cache
def method_runs() -> dict[str, list[Path]]:
    """The seeds of each method, and of each learning rate of those with several."""
    runs = {}
    for method in METHODS:
        for name in (method, *(f"{method}-{rate}" for rate in LEARNING_RATES)):
            seeds = sorted(RUNS.glob(f"{name}-[0-9]"))
            if seeds:
                runs[name] = seeds
    return runs


def all_method_runs() -> list[Path]:
    return [run for seeds in method_runs().values() for run in seeds]


def methods() -> str:
    """Methods side by side, each with the recipe that is named."""
    random = sorted(RUNS.glob("random-[0-9]"))
    random_ranks = [evaluations(run)[0]["feature_rank"] for run in method_runs()["intl"]]
    random_columns = [
        mean_std([linear_top1(run) for run in random]),
        mean_std([knn_top1(run) for run in random]),
        mean_std(random_ranks),
    ]
    rows = [["untrained network", "", len(random), *random_columns, "", "", ""]]

    for name, seeds in method_runs().items():
        title, published_top1 = METHODS[name.partition("-")[0]]
        flags = first_line(seeds[0])["command"].partition("--recipe ")[2]
        rows.append(
            [
                title,
                f"`{flags}`",
                len(seeds),
                mean_std([linear_top1(run) for run in seeds]),
                mean_std([knn_top1(run) for run in seeds]),
                *(mean_std([evaluations(run)[-1][rank] for run in seeds]) for rank in RANKS),
                f"{min(seconds_per_epoch(run) for run in seeds):.0f}",
                published_top1,
            ]
        )

    header = ["method", "--recipe", "seeds", "linear top-1", "5-NN", "rank of features"]
    header += ["rank of embedding", "s / epoch", "published"]
    return f"{table(header, rows)}\n\n{provenance(all_method_runs())}"


def release() -> str:
    """The official release's code and train.py, on two sets of test images."""
    settings = [("", "small", 1000), ("", "small", 10_000), ("-cifar-stem", "3x3", 1000)]
    rows = []
    runs = []
    for suffix, stem, test_images in settings:
        for name, title in (("official", "official release"), ("intl", "train.py")):
            seeds = sorted(RUNS.glob(f"{name}{suffix}-[0-9]"))
            last = [last_terms(run) for run in seeds]
            rows.append(
                [
                    title,
                    stem,
                    f"{test_images:,}",
                    len(seeds),
                    mean_std([linear_top1(run, test_images) for run in seeds]),
                    mean_std([knn_top1(run, test_images) for run in seeds]),
                    mean_std([line["alignment"] for line in last], digits=2),
                    mean_std([line["trace"] for line in last]),
                ]
            )
            runs += [run for run in seeds if run not in runs]

    header = ["code", "stem", "test images", "seeds", "linear top-1", "5-NN", "alignment"]
    return f"{table([*header, 'trace loss'], rows)}\n\n{provenance(runs)}"


def last_terms(run: Path) -> dict:
    """The terms of the loss in the last logged step."""
    return [line for line in read_lines(run / "log.jsonl") if "alignment" in line][-1]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, where ties share their mean rank."""
    ranks = []
    for values in (np.array(x), np.array(y)):
        smaller = (values[:, None] > values).sum(1)
        equal = (values[:, None] == values).sum(1)
        ranks.append(smaller + equal / 2)
    return np.corrcoef(ranks)[0, 1]


def correlations() -> str:
    """Rank correlation of accuracy with label-free measurements at the end of a run."""
    linear = {run: linear_top1(run) for run in all_method_runs()}
    with_iternorm = {run: top1 for run, top1 in linear.items() if "trace" in last_terms(run)}
    settings = {}  # runs that differ only in T and beta
    for run in (RUNS / "prices").iterdir():
        config = read_config(run)
        same = config["dataset"] == "cifar10" and config["batch_size"] == 256
        if same and config["axis"] == "channel" and config["epochs"] == 10 and not config["ema"]:
            settings[run] = evaluations(run)[-1]["knn_top1"]

    groups = [
        ("all methods, linear top-1", linear),
        ("methods with IterNorm, linear top-1", with_iternorm),
        ("INTL with other T and beta, 5-NN", settings),
    ]
    rows = []
    for title, accuracy in groups:
        terms = [last_terms(run) for run in accuracy]
        measurements = [[line["alignment"] for line in terms]]
        for rank in RANKS:
            measurements.append([evaluations(run)[-1][rank] for run in accuracy])
        if accuracy is not linear:  # only IterNorm has a trace loss
            measurements.append([line["trace"] - line["floor"] for line in terms])
            measurements.append([line["score"] for line in terms])
        cells = [f"{rank_correlation(x, list(accuracy.values())):.2f}" for x in measurements]
        while len(cells) < 5:
            cells.append("")
        rows.append([title, len(accuracy), *cells])

    header = ["runs", "number", "alignment", "rank of features", "rank of embedding"]
    return table([*header, "trace - floor", "score"], rows)


class PriceCell(NamedTuple):
    """What the seeds of a row in "Small batches, and other T" have in common."""

    images: str
    n: int
    iterations: int
    beta: float
    names: str  # published, balanced, both, or neither


def describe_images(config: dict) -> str:
    parts = ["shapes" if config["dataset"] == "shapes" else "CIFAR-10"]
    if config["axis"] == "batch":
        parts.append("batch axis")
    if config["ema"]:
        parts.append("teacher")
    if config["epochs"] == 30:
        parts.append("30 epochs")
    return ", ".join(parts)


@functools.cache
def price_cells() -> dict[PriceCell, list[dict[str, float]]]:
    """The runs of prices.sh; for each seed the price of lost rank and what was measured."""
    cells = {}
    for run in sorted((RUNS / "prices").iterdir()):
        config = read_config(run)
        first = evaluations(run)[0]
        last = evaluations(run)[-1]
        terms = last_terms(run)
        T = config["iterations"]
        beta = config["beta"]
        views_with_trace_loss = 1 if config["ema"] else 2

        m = config["batch_size"]
        d = config["out"]
        if config["axis"] == "channel":
            n = m
            full_rank = min(m, d - 1)
        else:
            n = d
            full_rank = min(m - 1, d)
        known_betas = {
            "published": published_beta(n),
            "balanced": balanced_beta(n, T, rank=full_rank),
        }
        floor = trace_floor(n, T, full_rank)
        names = [name for name, value in known_betas.items() if abs(beta / value - 1) < 0.04]

        seed = {
            "p(1)": views_with_trace_loss * beta * (trace_floor(n, T, 1) - floor),
            "p(R/4)": views_with_trace_loss * beta * (trace_floor(n, T, full_rank / 4) - floor),
            "rank": last["embedding_rank"] / full_rank,
            "paid": views_with_trace_loss * beta * (terms["trace"] - terms["floor"]),
            "5-NN": last["knn_top1"],
            "gain": last["knn_top1"] - first["knn_top1"],
        }
        cell = PriceCell(describe_images(config), n, T, beta, ", ".join(names))
        cells.setdefault(cell, []).append(seed)
    return dict(sorted(cells.items()))


def prices() -> str:
    """The price of lost rank, and the outcome."""
    rows = []
    for cell, seeds in price_cells().items():
        rows.append(
            [
                cell.images,
                cell.n,
                cell.iterations,
                f"{cell.beta:g} {cell.names}".strip(),
                len(seeds),
                f"{seeds[0]['p(1)']:.2f}",
                f"{seeds[0]['p(R/4)']:.2f}",
                mean_std([seed["5-NN"] for seed in seeds]),
                mean_std([seed["gain"] for seed in seeds]),
                mean_std([seed["rank"] for seed in seeds], digits=2),
                mean_std([seed["paid"] for seed in seeds], digits=2),
            ]
        )
    header = ["images", "n", "T", "beta", "seeds", "p(1)", "p(R/4)", "5-NN", "gain", "rank / R"]
    runs = list((RUNS / "prices").iterdir())
    return f"{table([*header, 'paid'], rows)}\n\n{provenance(runs)}"


@functools.cache
def loss_times() -> tuple[str, dict[str, dict[str, list[float]]]]:
    """From losses.txt: the threads; for each size and loss ms, ratio to the products, memory."""
    lines = (HERE / "losses.txt").read_text().splitlines()
    threads = int(re.search(r"(\d+) CPU thread", lines[0])[1])
    times = {}
    for line in lines[1:]:
        fields = re.split(r" {2,}", line.strip())
        if line.startswith("(m, d) = "):
            size = fields[0].removeprefix("(m, d) = ")
            times[size] = {}
        elif line:
            times[size][fields[0]] = [float(field) for field in fields[1:]]
    return ("1 CPU thread" if threads == 1 else f"{threads} CPU threads"), times


def losses() -> str:
    """Time and memory of all losses."""
    threads, times = loss_times()
    header = [f"ms on {threads} (ratio to the products; memory)", *times]
    rows = []
    for name in next(iter(times.values())):
        cells = []
        for size in times:
            ms, multiple, memory = times[size][name]
            cells.append(f"{ms:.0f} ({multiple:.2f}; {memory:.0f})")
        rows.append([name, *cells])
    return table(header, rows)


if __name__ == "__main__":
    blocks = [
        readme_results,
        on_a_gpu,
        published,
        step_speed,
        without_a_gpu,
        methods,
        release,
        correlations,
        prices,
        losses,
    ]
    print("\n\n".join(block() for block in blocks))
