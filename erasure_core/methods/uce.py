"""UCE, Unified Concept Editing (Gandikota et al., WACV 2024, arXiv:2308.14761).

One least-squares edit of the cross-attention keys and values sends the text rows of the concept to those of its
replacement and holds the kept rows:

    min_W  sum_i e ||W c_i - W0 c_i*||^2 + sum_p k ||W c_p - W0 c_p||^2 + ridge ||W - W0||_F^2

Departures: the ridge is relative to the mean square of the edited rows; all rows of the empty
prompt are always held (as in the 2023 code; the 2025 code need not hold it, and maps the empty replacement to its BOS row);
which rows of a prompt are edited, and held of kept words, is a setting (``last`` is the 2025 code, ``last to end`` the 2023
code).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..artifact import Erasure
from ..concept import TEMPLATES, ConceptSpec, EditRows, Rows, edit_rows
from ..operators.linear_edit import ContextMap, mean_square, solve
from ..port import ModelPort
from ._closed_form import Templates, build, energy_setting, rows_setting, templates_setting
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings:
    ridge: float = setting(
        1e-3, "How firmly the weights stay put. Raise it if other things change, lower it if the concept remains.",
        low=1e-8, high=10.0, step=1e-4,
    )  # fmt: skip
    erase_weight: float = setting(
        1.0, "How hard the concept is pushed to its replacement.", low=0.0, high=100.0, step=0.1
    )
    keep_weight: float = setting(
        1.0, "How hard the kept words and the empty prompt are held.", low=0.0, high=100.0, step=0.1
    )
    rows: Rows = rows_setting()
    templates: Templates = templates_setting()
    energy: float = energy_setting()


def context_map(rows: EditRows, settings: Settings) -> ContextMap:
    """The edit for given text rows."""
    return solve(
        rows.source,
        rows.target,
        rows.held,
        ridge=settings.ridge * mean_square(rows.source),
        erase_weight=settings.erase_weight,
        keep_weight=settings.keep_weight,
    )


def run(port: ModelPort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with UCE. Seconds; needs no pictures and no network passes."""
    rows = edit_rows(port, spec, rule=settings.rows, templates=TEMPLATES[settings.templates], dark=aids.owned)
    return build(port, spec, "uce", asdict(settings), context_map(rows, settings), progress)


SPEC = MethodSpec(
    name="uce",
    title="UCE",
    summary="Redirects the words of the concept in one closed-form edit: takes seconds at most and disturbs least. "
    "List synonyms.",
    paper="https://arxiv.org/abs/2308.14761",
    settings=Settings,
    run=run,
    version=2,
)
