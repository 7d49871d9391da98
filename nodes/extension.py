"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo import LoadDemo
from .erase import ApplyErasure, EraseConcept
from .erasures import LoadErasure, MergeErasures, SaveErasure
from .methods import method_nodes


class ConceptErasureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadDemo, EraseConcept, ApplyErasure, SaveErasure, LoadErasure, MergeErasures, *method_nodes()]


async def comfy_entrypoint() -> ConceptErasureExtension:
    return ConceptErasureExtension()
