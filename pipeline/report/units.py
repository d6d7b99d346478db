"""Numbers the way a person reads them: 2.02 M, 8.1 MB, 100 s. A number nobody measured is a dash."""

import math
from collections.abc import Sequence

NOTHING = "–"


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """`value` with a decimal prefix and `digits` significant digits: 2.02 M, 819 k, 21.0 k tokens/s."""
    if value is None:
        return NOTHING
    magnitude = float(value)
    for prefix in ("", "k", "M", "G", "T"):
        # 999.7 must not become "1000": what rounds up to the next prefix is given it
        if abs(magnitude) < 1000 - 0.5 * 10.0 ** (3 - digits) or prefix == "T":
            break
        magnitude /= 1000
    whole = len(str(int(abs(magnitude))))
    decimals = 0 if prefix == "" and magnitude == int(magnitude) else max(0, digits - whole)
    return f"{magnitude:.{decimals}f} {prefix}{unit}".rstrip()


def size(count: float | None) -> str:
    """Bytes: 8.1 MB."""
    return si(count, "B", digits=2)


def score(value: float | None) -> str:
    """A perplexity: 97.1, 25.82, 5.431; more digits where the differences that matter are smaller."""
    if value is None:
        return NOTHING
    if abs(value) >= 100_000:
        return f"{value:.2e}"
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 50 else 1}f}"


def interval(bounds: Sequence[float] | None) -> str:
    """Of a perplexity: 80.1 to 82.6."""
    return NOTHING if bounds is None else f"{score(bounds[0])} to {score(bounds[1])}"


def shares(bounds: Sequence[float] | None) -> str:
    """Of an accuracy: 0.512 to 0.634."""
    return NOTHING if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def percent(fraction: float | None) -> str:
    """A change with its sign: -10.0 %."""
    return NOTHING if fraction is None else f"{100 * fraction:+.1f} %"


def duration(seconds: float | None) -> str:
    """9.5 s, 100 s, 16.7 min, 2.1 h, 3.2 d: one unit, so that a column of them can be read down."""
    if seconds is None:
        return NOTHING
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800), ("d", 86_400, math.inf)):
        if seconds < most:
            return f"{seconds / length:.{0 if unit == 's' and seconds >= 10 else 1}f} {unit}"
    return NOTHING  # not a number
