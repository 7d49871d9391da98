"""Concept erasure for text-to-image diffusion, standalone: torch, safetensors, numpy, einops and nothing else."""

from .api import erase
from .artifact import Delta, Erasure, Header, WrongModelError
from .attacks import AttackTarget, all_attacks, attack, evaluate
from .concept import Concept, ConceptError, ConceptSpec, Rows
from .formats import FileError, Layout, load, read_header, save
from .fusion import merge
from .gating import GatedPort, gate_strengths, gated
from .methods import Aids, MethodSpec, all_methods
from .pairs import ConceptPairs
from .port import Family, ModelPort, Prediction, Role, Site, TextStates, TokenKind
from .version import __version__

__all__ = [
    "Aids",
    "AttackTarget",
    "Concept",
    "ConceptError",
    "ConceptPairs",
    "ConceptSpec",
    "Delta",
    "Erasure",
    "Family",
    "FileError",
    "GatedPort",
    "Header",
    "Layout",
    "MethodSpec",
    "ModelPort",
    "Prediction",
    "Role",
    "Rows",
    "Site",
    "TextStates",
    "TokenKind",
    "WrongModelError",
    "__version__",
    "all_attacks",
    "all_methods",
    "attack",
    "erase",
    "evaluate",
    "gate_strengths",
    "gated",
    "load",
    "merge",
    "read_header",
    "save",
]
