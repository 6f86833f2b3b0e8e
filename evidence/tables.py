"""Print the table of evidence/README.md from the logs beside this file: python evidence/tables.py"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {
    "intl": "INTL",
    "cwrgp": "CW-RGP, 2 views",
    "whiten": "exact whitening, l^-0.5",
    "power0.45": "l^-0.45",
    "power0.55": "l^-0.55",
    "cifar-stem": "INTL, with the papers' stem",
}
NUMBERS = "linear top-1", "5-NN", "rank of features", "rank of embedding", "minutes"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: Path) -> tuple[float, ...]:
    """Of a run, the NUMBERS."""
    log = read(run / "log.jsonl")
    last = next(line for line in reversed(log) if "embedding_rank" in line)
    results = {line["protocol"]: line["results"] for line in read(run / "results.jsonl")}
    speeds = [line["images_per_second"] for line in log if "images_per_second" in line]
    images = json.loads((run / "config.json").read_text())["images"] * last["epoch"]
    minutes = images / statistics.median(speeds) / 60
    linear, knn = results["features"]["learning rate 0.01"][0], results["knn"]["5 nearest, Euclidean"][0]
    return linear, knn, last["feature_rank"], last["embedding_rank"], minutes


def row(name: str) -> str:
    """Mean and standard deviation over the seeds."""
    seeds = [measured(run) for run in sorted(HERE.glob(f"{name}-[0-9]"))]
    spread = statistics.stdev if len(seeds) > 1 else lambda values: 0.0
    cells = [f"{statistics.mean(v):.1f} ± {spread(v):.1f}" for v in zip(*seeds)]
    return " | ".join([METHODS[name], str(len(seeds)), *(c.removesuffix(" ± 0.0") for c in cells)])


if __name__ == "__main__":
    print("|", " | ".join(["method", "seeds", *NUMBERS]), "|")
    print("|" + "---|" * (2 + len(NUMBERS)))
    for name in METHODS:
        print("|", row(name), "|")
