"""Keeps the results of a finished study, and writes the tables of the pages from them.

    python -m tools.study NAME OUTPUT   # of configs/studies/NAME.yaml; the folder of its runs
    python -m tools.study               # only the tables

The record is ``docs/studies/NAME.json``. In README.md and EVIDENCE.md its table stands between
``<!-- study NAME -->`` and ``<!-- end -->``; ``<!-- study NAME: AP verdict -->`` chooses columns.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from miti_detr.files import write_text
from miti_detr.study.choose import CHOICE_FILE
from miti_detr.study.claims import find_claims
from miti_detr.study.comparison import ArmResult, Comparison, compare_study
from miti_detr.study.plan import StudyRun
from miti_detr.study.results import ALL_METRICS, RunResult
from miti_detr.study.series import last_layer, rank_keys
from miti_detr.study.statistics import mean_and_spread
from miti_detr.study.study_file import read_study

from .zoo import markdown_table, this_machine, training_of

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "studies"
PAGES = (ROOT / "README.md", ROOT / "EVIDENCE.md")
METRICS = tuple(metric for metric in ALL_METRICS if metric != "AR")
RANK = "effective rank"  # of the tokens after the last encoder layer
_PLACE = re.compile(r"<!-- study (\w+)(?:: ([\w/ ]+))? -->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="of a file in configs/studies")
    add("output", nargs="?", type=Path, metavar="OUTPUT", help="folder of the finished study")
    add("--hardware", metavar="TEXT", help="where it ran; default: this machine")
    args = parser.parse_args()
    if args.name and args.output is None:
        parser.error("name the folder of the study")
    try:
        if args.name:
            record = make_record(args.name, args.output, args.hardware or this_machine())
            text = json.dumps(record, indent=1, ensure_ascii=False)
            write_text(RECORDS / f"{args.name}.json", text + "\n")
        for page in PAGES:
            write_text(page, fill(page.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_record(name: str, output: Path, hardware: str) -> dict[str, Any]:
    """Collect the results of a study from the files of its runs.

    Args:
        name: of the study file, without ``.yaml``.
        output: folder of the study.
        hardware: where it ran.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: no run has finished.
    """
    study = read_study(ROOT / "configs" / "studies" / f"{name}.yaml")
    runs = [
        StudyRun(arm, seed, output / arm.name / f"seed_{seed}", (), 0)
        for arm in study.arms
        for seed in arm.seeds
    ]
    comparison = compare_study(study, runs)
    folders = [path.parent for path in sorted(output.rglob("seed_*/finished.json"))]
    # A run that diverged at once has no times.
    trained = [training_of(path) for path in folders if _has_times(path / "metrics.json")]
    first = training_of(comparison.arms[0].runs[0].path)
    claims = {claim.arm: claim for claim in find_claims(comparison)}
    return {
        "title": study.title,
        "command": f"make compare STUDY=configs/studies/{name}.yaml",
        "commit": first["commit"],
        "versions": first["versions"],
        "hardware": hardware,
        "runs": len(folders),
        "machine_hours": round(sum(run["minutes"] for run in trained) / 60, 2),
        "missing": comparison.missing,
        "arms": {
            arm.name: {
                **_choice(output / arm.name / CHOICE_FILE),
                "seeds": {str(run.seed): _final(run, comparison) for run in arm.runs},
                **_claim(arm, claims.get(arm.name)),
            }
            for arm in comparison.arms
        },
    }


def _has_times(path: Path) -> bool:
    return path.is_file() and '"time"' in path.read_text(encoding="utf-8")


def _choice(path: Path) -> dict[str, Any]:
    return {"choice": json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def _final(run: RunResult, comparison: Comparison) -> dict[str, float]:
    """Values of the last evaluation, as far as there are any."""
    values = {metric: run.final(metric) for metric in METRICS}
    keys = rank_keys(comparison.arms).get(("encoder", "effective_rank"))
    if keys:
        values[RANK] = run.final(last_layer(run, keys))
    return {key: round(value, 4) for key, value in values.items() if np.isfinite(value)}


def _claim(arm: ArmResult, claim: Any) -> dict[str, Any]:
    if claim is None:
        return {}
    interval = {key: round(claim.difference[key], 4) for key in ("mean", "low", "high")}
    verdict = {"p": claim.p, "verdict": claim.verdict}
    metric = {} if claim.metric == "AP" else {"metric": claim.metric}
    return {"reference": arm.reference, **metric, "difference": interval, **verdict}


def fill(text: str) -> str:
    """Write the tables into a page.

    Raises:
        FileNotFoundError: there is no record of a study that the page names.
        ValueError: the page asks for a column that no table has.
    """

    def replace(match: re.Match[str]) -> str:
        name, columns = match[1], match[2]
        record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        begin = match[0].partition("\n")[0]
        return f"{begin}\n{table(record, columns.split() if columns else None)}\n<!-- end -->"

    return _PLACE.sub(replace, text)


def table(record: dict[str, Any], columns: list[str] | None = None) -> str:
    """Return the table of a record.

    Args:
        record: of :func:`make_record`.
        columns: of METRICS that were measured, ``choice``, ``rank``, ``difference`` and
            ``verdict``, in the order of the table; None: all that the study has.

    Raises:
        ValueError: a column has another name.
    """
    arms = record["arms"]
    measured = {key for arm in arms.values() for values in arm["seeds"].values() for key in values}
    keys = [arm["choice"]["key"] for arm in arms.values() if "choice" in arm]
    known = {
        **({"choice": keys[0]} if keys else {}),
        **{metric: metric for metric in METRICS if metric in measured},
        **({"rank": RANK} if RANK in measured else {}),
        "difference": "AP minus the reference's",
        "verdict": "verdict",
    }
    if any("metric" in arm for arm in arms.values()):
        known["difference"] = "minus the reference's"
    if unknown := [name for name in columns or () if name not in known]:
        raise ValueError(f"no column {unknown[0]!r}. Choose from {', '.join(known)}")
    chosen = [name for name in known if columns is None or name in columns]
    rows = [[f"`{name}`", *(_cell(arm, column) for column in chosen)] for name, arm in arms.items()]
    return markdown_table(rows, ["model", *(known[name] for name in chosen)])


def _cell(arm: dict[str, Any], column: str) -> str:
    if column == "choice":
        return f"{arm['choice']['value']:g}" if "choice" in arm else ""
    if column in ("difference", "verdict"):
        if "verdict" not in arm:
            return ""
        if column == "verdict":
            return f"{arm['verdict']} (p {arm['p']:.2g})"
        found = arm["difference"]
        text = f"{found['mean']:+.1f} ({found['low']:.1f} to {found['high']:.1f})"
        metric = f" {arm['metric']}" if "metric" in arm else ""
        return f"{text}{metric} vs `{arm['reference']}`".replace("-", "\u2212")
    key = RANK if column == "rank" else column
    found = mean_and_spread([v[key] for v in arm["seeds"].values() if key in v])
    if found is None:
        return ""
    return f"{found['mean']:.1f}" + ("" if found["sd"] is None else f" \u00b1 {found['sd']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
