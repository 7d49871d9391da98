"""What says whether a picture shows a concept."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Judge(Protocol):
    """A picture classifier behind one question. ``name`` and ``version`` go into every result that it gives."""

    name: str
    version: str
    labels: tuple[str, ...] | None
    """The concepts that it knows; None: any text."""
    threshold: float
    """A picture shows the concept where the probability reaches this."""

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        """[N] probability that each of ``pictures`` [N, 3, H, W] in [0, 1] shows ``concept``.

        Raises:
            ValueError: it doesn't know the concept; the message lists what it knows.
        """
        ...
