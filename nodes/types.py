"""Socket types of the pack."""

from comfy_api.latest import io

Erasure = io.Custom("ERASURE")
"""An :class:`erasure_core.Erasure`, immutable."""

Method = io.Custom("ERASURE_METHOD")
"""A (method name, settings) pair from a Method node."""

Judge = io.Custom("JUDGE")
"""An :class:`erasure_core.metrics.judges.Judge`: says how likely a picture shows a concept."""

Pairs = io.Custom("CONCEPT_PAIRS")
"""An :class:`erasure_core.ConceptPairs` from Make SDEdit Pair."""

Dark = io.Custom("DARK_EMBEDDINGS")
"""An :class:`erasure_core.dark.DarkEmbeddings` from Mine Dark Embeddings or Erase Concept with Dark Miner."""

Memory = io.Custom("PROMPT_MEMORY")
"""An :class:`erasure_core.operators.memory.SavedMemory` from Learn Safe Prompt Memory."""

Attacks = io.Custom("ATTACK_RESULTS")
"""A tuple of :class:`erasure_core.receipt.AttackRecord` from Red-Team Attack."""

CATEGORY = "Concept Erasure"
