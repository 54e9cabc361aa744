"""Checks of config values. Each part states the rules of the keys that it uses.

A rule says what a value must be; :func:`check_keys` applies rules to a config::

    check_keys(cfg, {"MODEL.DETR.DROPOUT": Real(0, 1, below=True)})
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from detectron2.config import CfgNode


class Rule(Protocol):
    """What a value must be."""

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""

    def __str__(self) -> str:
        """Return the rule as the end of the sentence "it must be ..."."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """An integer.

    Attributes:
        low: smallest value.
        high: largest value.
        divisor: of all values.
    """

    low: int
    high: int = 10**9
    divisor: int = 1

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and self.low <= value <= self.high and value % self.divisor == 0

    def __str__(self) -> str:
        kind = "an integer" if self.divisor == 1 else f"a multiple of {self.divisor}"
        return f"{kind} from {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class Real:
    """A finite number; integers are numbers.

    Attributes:
        low: lower bound.
        high: upper bound.
        above: exclude ``low``.
        below: exclude ``high``.
        infinite: allow infinity, where ``high`` allows it.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if not self.infinite and not math.isfinite(value):
            return False
        if not self.infinite and math.isinf(self.high) and abs(value) >= _LARGEST_REAL:
            return False
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        lower = f"{'above' if self.above else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return f"{lower}{'' if self.infinite else ' and finite'}"
        return f"{lower} and {'below' if self.below else 'at most'} {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: Sequence[Any]

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(repr(value) for value in self.values)}"


@dataclasses.dataclass(frozen=True)
class Each:
    """A list or tuple of values.

    Attributes:
        rule: of every value.
        shortest: smallest number of values.
        longest: largest number of values.
        increasing: each value is larger than the one before it.
    """

    rule: Rule
    shortest: int = 0
    longest: int = 1000
    increasing: bool = False

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        if not isinstance(value, list | tuple):
            return False
        if not self.shortest <= len(value) <= self.longest:
            return False
        if not all(self.rule.fits(one) for one in value):
            return False
        return not self.increasing or all(a < b for a, b in itertools.pairwise(value))

    def __str__(self) -> str:
        length = f"{self.shortest} to {self.longest}"
        order = ", in increasing order" if self.increasing else ""
        return f"a list of {length} values{order}, each {self.rule}"


@dataclasses.dataclass(frozen=True)
class AnyOf:
    """A value that obeys one of several rules."""

    rules: Sequence[Rule]

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        return any(rule.fits(value) for rule in self.rules)

    def __str__(self) -> str:
        return ", or ".join(str(rule) for rule in self.rules)


@dataclasses.dataclass(frozen=True)
class Text:
    """A string that is not empty."""

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` obeys the rule."""
        return isinstance(value, str) and bool(value)

    def __str__(self) -> str:
        return "text"


_LARGEST_REAL = 1e30  # float32 ends at 3e38, and its squares at 1e19


def check_keys(cfg: CfgNode, rules: Mapping[str, Rule]) -> None:
    """Check values of a config.

    Args:
        cfg: has all keys of ``rules``.
        rules: of keys such as ``MODEL.DETR.DROPOUT``.

    Raises:
        ValueError: names the key, its value and what it must be.
    """
    for key, rule in rules.items():
        check(key, functools.reduce(getattr, key.split("."), cfg), rule)


def check(key: str, value: Any, rule: Rule) -> None:
    """Check one value.

    Args:
        key: its name, for the message.
        value: as the config has it.
        rule: that it must obey.

    Raises:
        ValueError: names the key, its value and what it must be.
    """
    if not rule.fits(value):
        raise ValueError(f"{key} is {shown(value)}; it must be {rule}")


def shown(value: Any) -> str:
    """Return a value as one short line, for messages."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "too long"
    return text if len(text) <= 80 else f"{text[:77]}..."
