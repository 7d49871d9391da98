"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyErasure
from .attack import RedTeamAttack
from .compare import CompareErasures
from .dark_files import LoadDarkEmbeddings, SaveDarkEmbeddings
from .demo import LoadDemo
from .erase import EraseConcept
from .erasure_files import LoadErasure, SaveErasure
from .gate import GateErasures
from .judges import JudgeCLIP, JudgeExamples, JudgePictures
from .memory import ApplySafePromptMemory, LearnSafePromptMemory
from .memory_files import LoadPromptMemory, SavePromptMemory
from .merge import MergeErasures
from .methods import method_nodes
from .mine import MineDarkEmbeddings
from .onnx_judge import JudgeONNX
from .pair_files import LoadPairs, SavePairs
from .receipt import ErasureReceipt
from .sdedit import MakeSDEditPair


class ConceptErasureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadDemo,
            EraseConcept,
            ApplyErasure,
            GateErasures,
            SaveErasure,
            LoadErasure,
            MergeErasures,
            MineDarkEmbeddings,
            SaveDarkEmbeddings,
            LoadDarkEmbeddings,
            MakeSDEditPair,
            SavePairs,
            LoadPairs,
            JudgeCLIP,
            JudgeExamples,
            JudgeONNX,
            JudgePictures,
            LearnSafePromptMemory,
            ApplySafePromptMemory,
            SavePromptMemory,
            LoadPromptMemory,
            RedTeamAttack,
            CompareErasures,
            ErasureReceipt,
            *method_nodes(),
        ]


async def comfy_entrypoint() -> ConceptErasureExtension:
    return ConceptErasureExtension()
