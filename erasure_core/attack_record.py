"""One attack as it is written down: what was tried, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .artifact import same_base
from .concept import ConceptSpec
from .metrics.judged import JudgedBy
from .metrics.rates import Rate

GIVEN = "it begins with a picture of the concept, so success says that the model can draw it, not that it would"
"""How to read such an attack."""
TEACHES = (
    "it learns from pictures of the concept, and taught the demo model things that it had never learned: success need not mean "
    "that the erasure left something, failure says the more"
)
"""How to read an attack that does."""
LONGEST = 2000
"""Characters of a prompt, or of a find, that a record can hold."""
_SHOWN = 6
"""Settings that the summary lists."""


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """One attack as it was run: its budget, and what it brought back, next to plain asking at the same noises."""

    attack: str
    """Its name in the registry of attacks."""
    title: str
    concept: str
    """The word that the judge was asked about, one of the erased."""
    budget: Mapping[str, Any]
    """All its settings, plain values."""
    prompts: tuple[str, ...]
    """What was attacked."""
    judge: JudgedBy
    asking: Rate
    """Pictures of the prompts as they are that show the concept."""
    attacked: Rate
    """Pictures of what the attack found that show it."""
    found: str
    """The best way that it found, in words."""
    queries: int
    """Pictures that a black-box attack asked the erased model for."""
    seed: int
    base: str
    """Fingerprint of the weights that read the text, of the model before the erasure."""
    erased: str
    """The same of the model under attack."""
    weights: str = ""
    """:func:`erasure_core.artifact.weights_digest` of the model under attack: it tells which erasure, at which strength, was
    attacked. "" where it wasn't taken: fingerprints alone can't tell small changes apart."""
    memory: str = ""
    """Digest of the prompt memories that the model under attack read beside its weights; "" for none."""
    base_weights: str = ""
    """As ``weights``, of the model before the erasure. From here on, what records of older versions don't have."""
    steps: int = 0
    """Sampling steps of each picture that was counted."""
    cfg: float = 0.0
    ceiling: Rate | None = None
    """Pictures of the prompts as they are that show it when the base model draws them: the most that asking can bring."""
    found_on_base: Rate | None = None
    """Of an attack that finds prompts: pictures that show it when the base model draws what was found for the erased one."""
    tried: int = 0
    """Finds, of which the best for each prompt was counted."""
    curve: tuple[tuple[float, int], ...] = ()
    """(threshold, hits): of the pictures in ``attacked`` those that show it at other thresholds."""
    version: int = 0
    """Of the attack: figures of two versions don't compare. 0 where it wasn't written down."""
    share: float = 0.0
    """Of the attack's default budget that was spent; 0 where it wasn't written down."""
    given: bool = False
    """It begins with a picture of the concept, so success says that the model can draw it, not that it would."""

    def fault(
        self, spec: ConceptSpec, base: str, erased: str, weights: str, memory: str = "", base_weights: str = ""
    ) -> str:
        """Why it doesn't belong to an erasure of ``spec``; "" where it does.

        Args:
            base, erased: fingerprints of the model before and after.
            weights: digest of the weights after.
            memory: digest of the prompt memories on both.
            base_weights: digest of the weights before; "" to go by the fingerprint, which does not see small changes.
        """
        words = {w.casefold() for c in spec.erase for w in c.words}
        if self.concept.casefold() not in words:
            return f"{self.title} attacked {self.concept!r}, which this erasure does not suppress"
        if not same_base(self.base, base):
            return f"{self.title} was run on an erasure of another base model"
        if self.base_weights and base_weights not in ("", self.base_weights):
            return f"{self.title} was run beside a base_model that is not the receipt's model, such as an erased one"
        if self.erased != erased or self.weights not in ("", weights):
            return f"{self.title} attacked another erasure, or this one at another strength"
        if self.memory != memory:
            how = (
                "with a prompt memory that the receipt's model doesn't have"
                if self.memory
                else "without the prompt memory of the receipt's model"
            )
            return f"{self.title} attacked the erased model {how}, so its figures aren't those of this erasure alone"
        return ""

    def summary(self, judge: JudgedBy | None = None) -> str:
        """It in a line; who judged only where that isn't ``judge``."""
        shares = [f"asking: {self.judge.counted(self.asking)}"]
        if self.ceiling is not None:
            none = ", which shows none either" if not self.ceiling.hits else ""
            shares.append(f"on the base model, asked the same: {self.judge.counted(self.ceiling)}{none}")
        if self.found_on_base is not None:
            none = ", so nothing follows from a zero" if not self.found_on_base.hits else ""
            shares.append(f"on the base model, given what was found: {self.judge.counted(self.found_on_base)}{none}")
        parts = [f"{self.concept} in {self.judge.counted(self.attacked)} of pictures ({'; '.join(shares)})"]
        if self.given:
            parts.append(GIVEN)
        settings = [f"{k} {v}" for k, v in self.budget.items() if v != ""][:_SHOWN]
        parts.append(
            ", ".join([*settings, *([f"{self.queries} queries"] if self.queries else []), f"seed {self.seed}"])
        )
        if self.share:
            parts.append(f"{100 * self.share:.3g} % of its default budget")
        if self.steps:
            parts.append(f"drawn in {self.steps} steps, cfg {self.cfg:g}")
        if self.tried:
            parts.append(f"{self.tried} finds tried")
        if judge is None or (str(judge), judge.note) != (str(self.judge), self.judge.note):
            parts.append(f"judge {self.judge}; {self.judge.note}")
        return f"{self.title}: {'; '.join(parts)}; found: {self.found:.120}"
