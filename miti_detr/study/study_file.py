"""Study files: the YAML in which a user writes down a comparison (``docs/compare.md``).

Every field is checked while the file is read, before anything trains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miti_detr.yaml_files import read_yaml

from .plan import Arm, Candidates, Study
from .results import ALL_METRICS

MAX_SEEDS = 1000
MAX_SEED = 2**32 - 1  # the largest seed that NumPy accepts
_FIELDS = (
    *("title", "arms", "groups", "overrides", "iterations", "minutes", "evaluations", "seeds"),
    *("aps", "threshold", "rank_period", "choose"),
)
_ARM_FIELDS = ("config", "overrides", "seeds", "reference", "metric")
_CHOOSE_FIELDS = ("key", "values", "seeds")


class _Fields:
    """The fields of a mapping in a file; every error names the place, the field and its value."""

    def __init__(
        self, place: str, content: Any, known: Sequence[str], needed: Sequence[str]
    ) -> None:
        """Check the names of the fields.

        Args:
            place: file, and arm where there is one.
            content: what the file holds there.
            known: names of the fields.
            needed: names of the fields that must be present.

        Raises:
            ValueError: ``content`` is not a mapping, or a field is unknown or missing.
        """
        self.place = place
        if not isinstance(content, dict):
            raise ValueError(
                f"{place}: {_show(content)} is not a mapping. Write the fields {', '.join(known)}, "
                "each with its value"
            )
        for key in content:
            if key not in known:
                raise ValueError(f"{place}: unknown field {key!r}. Use one of {', '.join(known)}")
        for key in needed:
            if key not in content:
                raise ValueError(f"{place}: the field {key!r} is missing. Add it")
        self._content = content

    def read(self, key: str, check: Callable[[Any], Any], remedy: str, default: Any = None) -> Any:
        """Return a field after a check.

        Args:
            key: name of the field.
            check: returns the value to use, or None if the field is faulty.
            remedy: what the field must be.
            default: returned if the field is absent.

        Raises:
            ValueError: the field is faulty.
        """
        if key not in self._content:
            return default
        value = self._content[key]
        result = check(value)
        if result is None:
            raise self.error(key, value, remedy)
        return result

    def error(self, key: str, value: Any, remedy: str) -> ValueError:
        """Return the error for a faulty field."""
        return ValueError(f"{self.place}: {key} is {_show(value)}. It must be {remedy}")


def read_study(path: str | Path) -> Study:
    """Read and check a study file; ``docs/compare.md`` describes it.

    Args:
        path: YAML file; the configs in it are relative to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a study. The message names the file, the field and its value.
    """
    path = Path(path)
    fields = _Fields(str(path), read_yaml(path), _FIELDS, needed=["arms"])
    common = fields.read("overrides", _overrides, _OVERRIDES, {})
    seeds = fields.read("seeds", _seeds, _SEEDS, (0, 1, 2))
    entries = fields.read("arms", _mapping, "a mapping from names of arms to their fields")
    arms = tuple(_read_arm(path, name, entry, common, seeds) for name, entry in entries.items())
    names = [arm.name for arm in arms]
    for arm in arms:
        if arm.reference is not None and (arm.reference not in names or arm.reference == arm.name):
            raise ValueError(
                f"{path}: arm {arm.name}: reference is {arm.reference!r}. It must be another arm: "
                f"{', '.join(names)}"
            )
    groups = fields.read(
        "groups",
        lambda value: _groups(value, names),
        f"a mapping from titles to lists of arms, of {', '.join(names)}",
        {"Comparison": names},
    )
    iterations = fields.read("iterations", _positive, "an integer of 1 or more")
    minutes = fields.read("minutes", _minutes, "a number above 0")
    if iterations is not None and minutes is not None:
        raise fields.error("minutes", minutes, "left out where there are iterations")
    content = {
        "title": fields.read("title", _text, "a text", path.stem),
        "evaluations": fields.read(
            "evaluations", _positive, "an integer of 1 or more", Study.evaluations
        ),
        "aps": fields.read("aps", _aps, "a list of numbers above 0 and up to 100", ()),
        "threshold": fields.read("threshold", _fraction, "a number from 0 to 1", Study.threshold),
        "rank_period": fields.read("rank_period", _positive, "an integer of 1 or more"),
        "choose": fields.read("choose", lambda value: _read_candidates(path, value), ""),
    }
    try:
        return Study(arms=arms, groups=groups, iterations=iterations, minutes=minutes, **content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_candidates(path: Path, entry: Any) -> Candidates:
    fields = _Fields(f"{path}: choose", entry, _CHOOSE_FIELDS, needed=_CHOOSE_FIELDS)
    return Candidates(
        fields.read("key", _text, "a config key, such as SOLVER.BASE_LR"),
        fields.read("values", _values, "a list of two or more different numbers"),
        fields.read("seeds", _seeds, _SEEDS),
    )


def _read_arm(
    path: Path, name: Any, entry: Any, common: Mapping[str, str], seeds: tuple[int, ...]
) -> Arm:
    place = f"{path}: arm {_show(name) if not isinstance(name, str) else name}"
    fields = _Fields(place, entry, _ARM_FIELDS, needed=["config"])
    config = fields.read("config", _text, "the path of a YAML file")
    overrides = {**common, **fields.read("overrides", _overrides, _OVERRIDES, {})}
    try:
        return Arm(
            name if isinstance(name, str) else str(name),
            str((path.parent / config).resolve()),
            tuple(word for pair in overrides.items() for word in pair),
            fields.read("seeds", _seeds, _SEEDS, seeds),
            fields.read("reference", _text, "the name of another arm"),
            fields.read("metric", _metric, f"one of {', '.join(ALL_METRICS)}", Arm.metric),
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from error


_OVERRIDES = "a mapping from config keys, such as SOLVER.BASE_LR, to values"
_SEEDS = (
    f"a number of seeds from 1 to {MAX_SEEDS}, or a list of different seeds from 0 to {MAX_SEED}, "
    "such as [3, 4]"
)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _metric(value: Any) -> str | None:
    return value if value in ALL_METRICS else None


def _positive(value: Any) -> int | None:
    return value if _is_int(value) and value >= 1 else None


def _minutes(value: Any) -> float | None:
    return value if _is_number(value) and value > 0 else None


def _fraction(value: Any) -> float | None:
    return value if _is_number(value) and 0 <= value <= 1 else None


def _aps(value: Any) -> tuple[float, ...] | None:
    fits = isinstance(value, list) and all(_is_number(ap) and 0 < ap <= 100 for ap in value)
    return tuple(value) if fits else None


def _seeds(value: Any) -> tuple[int, ...] | None:
    if _is_int(value) and 1 <= value <= MAX_SEEDS:
        return tuple(range(value))
    fits = (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_SEEDS
        and all(_is_int(seed) and 0 <= seed <= MAX_SEED for seed in value)
        and len(set(value)) == len(value)
    )
    return tuple(value) if fits else None


def _values(value: Any) -> tuple[float, ...] | None:
    """Numbers in increasing order; YAML reads 1e-4, without a dot, as a text."""
    try:
        found = [float(v) if isinstance(v, str) else v for v in value]
    except (TypeError, ValueError):
        return None
    fits = len(found) > 1 and all(map(_is_number, found)) and len(set(found)) == len(found)
    return tuple(sorted(found)) if isinstance(value, list) and fits else None


def _mapping(value: Any) -> dict[Any, Any] | None:
    return value if isinstance(value, dict) and value else None


def _overrides(value: Any) -> dict[str, str] | None:
    fits = isinstance(value, dict) and all(_text(key) for key in value)
    return {key: str(item) for key, item in value.items()} if fits else None


def _groups(value: Any, names: Sequence[str]) -> dict[str, list[str]] | None:
    fits = _mapping(value) is not None and all(
        _text(title) and isinstance(group, list) and group and all(name in names for name in group)
        for title, group in value.items()
    )
    return value if fits else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _show(value: Any) -> str:
    """A value as YAML writes it, cut to a length that fits into a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
