"""What the table of a leaderboard says, in words: who is best, whom nothing brought back, and what a figure doesn't say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...attacks import all_attacks
from ...metrics.judge_error import Corrected
from .effect import figure
from .rows import is_outdated, outdated_methods
from .siege import ASKING, titles

if TYPE_CHECKING:
    from .leaderboard import Standing

WORST, LOSS, MINUTES = 0.10, 0.03, 10
"""What a method must reach to be called robust against the attacks of the page: its worst attack, what kept pictures may lose,
and how long it may take."""
_HARDEST = "free_embedding"
"""No page calls a method robust without it."""


def seconds_of(s: Standing) -> str:
    """What erasing took."""
    return f"{'' if s.alone else 'at most '}{figure(s.seconds or 0)}"


def verdict(found: Sequence[Standing], columns: Sequence[str]) -> str:
    """What the table says, in words; no word of robustness where the worst attack doesn't say so."""
    base = next((s for s in found if s.method == "none"), None)
    methods = [s for s in found if s.method != "none"]
    if base is None or not methods:
        return "The table is not complete yet."

    def loss(s: Standing) -> float:
        return max(base.kept_objects.share - s.kept_objects.share, base.kept_styles.share - s.kept_styles.share)

    def said(s: Standing) -> str:
        return (
            f"*{s.method}*: worst attack {titles([s.worst])[s.worst]}, {100 * s.true[s.worst].share:.0f} % of pictures; "
            f"kept pictures lose at most {100 * max(0.0, loss(s)):.0f} points; {seconds_of(s)} s"
        )

    whole = [s for s in methods if set(columns) <= set(s.attacks)] or methods  # one that was spared an attack can't win
    best = min(whole, key=lambda s: s.rank)
    gentle = [s for s in whole if loss(s) <= LOSS]
    lines = [f"Lowest worst attack, then lowest mean of all: {said(best)}."]
    if gentle and best not in gentle:
        lines.append(f"Among those that keep kept pictures within 3 points: {said(min(gentle, key=lambda s: s.rank))}.")
    if _HARDEST not in columns:
        lines.append(
            f"Which are robust can't be said here: {titles([_HARDEST])[_HARDEST]}, which searches all that goes in as text, "
            "is not among these attacks. See the [leaderboard](leaderboard.md)."
        )
        return "\n".join(lines)
    robust = [
        s
        for s in gentle
        if set(columns) <= set(s.attacks)
        and not s.outdated
        and not s.elsewhere
        and max(s.true[a].high for a in s.ranked) <= WORST
        and (s.seconds or 0) <= 60 * MINUTES
    ]
    lines.append(
        "Robust to the attacks above (upper end of the highest interval at most 10 %, kept within 3 points, at most 10 "
        f"minutes): {', '.join(s.method for s in robust) or 'none'}."
    )
    return "\n".join(lines)


def teaching(taught: Mapping[str, Corrected]) -> str:
    """Which attacks draw what the model never learned, so that their finds need not have been left by an erasure."""
    shares = [f"{titles([a])[a]} {share}" for a, share in taught.items() if a != ASKING]
    if not shares:
        return ""
    return (
        "\n\n*never learned*: in the unchanged model, things that it never learned, from drawings of them "
        f"([never learned](never_learned.md)): {', '.join(shares)}. Up to such a share, what a search brings back "
        "can't be told from what it taught."
    )


def powerless(found: Sequence[Standing]) -> str:
    """Where an attack finds nothing on the unchanged model either, so that nothing follows from its zeros."""
    base = next((s for s in found if s.method == "none"), None)
    nowhere = [
        f"{titles([attack])[attack]} on {label}"
        for attack, rates in ({} if base is None else base.each).items()
        for label, share in rates.items()
        if not share.hits
    ]
    if not nowhere:
        return ""
    return (
        f"\n\nNothing was found on the unchanged model either, so nothing follows from a zero, by {', '.join(nowhere)}."
    )


def aside(columns: Sequence[str]) -> str:
    """Which columns are shown and don't rank."""
    names = [name for name in columns if name != ASKING and all_attacks()[name].given]
    if not names:
        return ""
    return (
        f"\n\nNot ranked by: {', '.join(titles(names).values())}. They begin with a picture of the concept, and a model can "
        "give back what it would never draw by itself."
    )


def outdated(measured: Sequence[Mapping[str, Any]]) -> str:
    """Which results are of an earlier version of their method or of their attack."""
    methods = outdated_methods(measured)
    counts = Counter(row["attack"] for row in measured if is_outdated(row) and row.get("method") not in methods)
    said = [f"of the method: {', '.join(methods)}"] if methods else []
    attacks = ", ".join(f"{titles([name])[name]} ({n})" for name, n in counts.items())
    said += [f"of the attack: {attacks}"] if counts else []
    return f"\n\n\\*: with results of an earlier version {'; '.join(said)}." if said else ""


def elsewhere(found: Sequence[Standing]) -> str:
    """Which results are not of the training that the rest of their row is of."""
    said = [f"{s.method} ({', '.join(titles(sorted(s.elsewhere)).values())})" for s in found if s.elsewhere]
    if not said:
        return ""
    return (
        "\n\n†: with results of another training of the same settings, on another machine, than what is kept and the seconds: "
        f"{'; '.join(said)}."
    )
