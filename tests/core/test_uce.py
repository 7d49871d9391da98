"""UCE end to end against its printed solution, dense, matrix by matrix, on rows picked here by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec, erase
from erasure_core.analytic import AnalyticPort

pytestmark = pytest.mark.core
SENTENCES = {"none": ["{}"], "few": ["{}", "a {}", "a picture of {}"]}


def pick(port: AnalyticPort, prompt: str, rule: str) -> Tensor:
    """[n, D]: row 0 is BOS, then the words, then end-of-text, then padding."""
    states, words = port.text([prompt])[0].states, min(len(prompt.split()), port.length - 2)
    last = words or 1
    if rule == "last":
        return states[[last]]
    if rule == "last to end":
        return states[last:]
    if rule == "summary":
        padding = range(words + 2, port.length)  # four of it, evenly spaced; all where it has no more
        four = [padding[round(i * (len(padding) - 1) / 3)] for i in range(4)] if len(padding) > 4 else list(padding)
        return states[[last, words + 1, *four]]
    return states[1:]


def rows(port: AnalyticPort, pairs: list[tuple[str, str]], keep: list[str], rule: str, sentences: list[str]):
    sources, targets = [], []
    for sentence in sentences:
        for word, to in pairs:
            c = pick(port, sentence.format(word), rule)
            t = pick(port, sentence.format(to) if to else "", rule)
            n = min(len(c), len(t))
            sources.append(c[:n])
            targets.append(t[:n])
    kept = [port.text([""])[0].states]  # all of it, whatever stands for a word
    kept += [pick(port, s.format(word), rule) for word in keep for s in sentences]
    return torch.cat(sources), torch.cat(targets), torch.cat(kept)


def printed(w0: Tensor, c: Tensor, to: Tensor, p: Tensor, ridge: float, e: float, k: float) -> Tensor:
    """W' = (lambda W0 + e W0 C*^T C + k W0 P^T P) (lambda I + e C^T C + k P^T P)^-1."""
    eye = torch.eye(w0.shape[1], dtype=w0.dtype)
    gram = ridge * eye + e * c.T @ c + k * p.T @ p
    value = ridge * w0 + e * w0 @ to.T @ c + k * w0 @ p.T @ p
    return torch.linalg.solve(gram, value, left=False)


@pytest.mark.parametrize("rule", ["last", "last to end", "summary", "all"])
@pytest.mark.parametrize("templates", ["none", "few"])
@pytest.mark.parametrize(("ridge", "e", "k"), [(1e-3, 1.0, 1.0), (0.2, 3.0, 0.1)])
def test_every_weight_is_the_printed_one(
    port, spec, rule: str, templates: str, ridge: float, e: float, k: float
) -> None:
    settings = {
        "rows": rule,
        "templates": templates,
        "ridge": ridge,
        "erase_weight": e,
        "keep_weight": k,
        "energy": 1.0,
    }
    result = erase(port, spec, "uce", settings)
    pairs = [("red apple", "pear"), ("apple", "pear"), ("furry cat", "pear")]
    c, to, p = rows(port, pairs, ["dog", "green tree"], rule, SENTENCES[templates])
    absolute = ridge * float(c.square().sum()) / len(c)
    assert set(result.deltas) == {s.name for s in port.sites()}
    for site in port.sites():
        w0 = port.weight(site)
        delta = printed(w0, c, to, p, absolute, e, k) - w0
        assert (result.deltas[site.name].dense() - delta).norm() < 1e-8 * delta.norm()


def test_a_wide_model_uses_the_small_system_and_gets_the_same() -> None:
    port = AnalyticPort(width=200, blocks=1, outputs=(20,))
    result = erase(
        port, ConceptSpec.parse("cat", "dog", "bird"), "uce", {"rows": "summary", "templates": "few", "energy": 1.0}
    )
    c, to, p = rows(port, [("cat", "dog")], ["bird"], "summary", SENTENCES["few"])
    assert len(c) + len(p) < 200
    for site in port.sites():
        w0 = port.weight(site)
        delta = printed(w0, c, to, p, 1e-3 * float(c.square().sum()) / len(c), 1.0, 1.0) - w0
        assert (result.deltas[site.name].dense() - delta).norm() < 1e-8 * delta.norm()


def moved(port: AnalyticPort, result, prompt: str, towards: str) -> float:
    """How far the outputs for ``prompt``'s last word went to those of ``towards``: 0 not at all, 1 all the way."""
    here, there = pick(port, prompt, "last")[0], pick(port, towards, "last")[0]
    shares = []
    for site in port.sites():
        w, d = port.weight(site), result.deltas[site.name].dense()
        path = w @ (there - here)
        shares.append(float((d @ here) @ path / path.square().sum()))
    return sum(shares) / len(shares)


def disturbed(port: AnalyticPort, result, states: Tensor) -> float:
    pairs = [(port.weight(s), result.deltas[s.name].dense()) for s in port.sites()]
    return max(float((states @ d.T).norm() / (states @ w.T).norm()) for w, d in pairs)


def test_the_concept_goes_to_its_replacement_and_the_kept_stay(port) -> None:
    result = erase(port, ConceptSpec.parse("cat", "dog", "bird"), "uce")
    assert moved(port, result, "cat", "dog") > 0.95
    assert disturbed(port, result, pick(port, "bird", "summary")) < 0.03
    assert disturbed(port, result, pick(port, "", "summary")) < 0.03
    assert disturbed(port, result, port.text([""])[0].states[:1]) < 0.03
    assert disturbed(port, result, pick(port, "cat", "last")) > 0.3


def test_the_empty_replacement_is_end_of_text_and_never_bos(port) -> None:
    result = erase(
        port, ConceptSpec.parse("cat"), "uce", {"rows": "last", "templates": "none", "ridge": 1e-6, "energy": 1.0}
    )
    bos, end = port.text([""])[0].states[:2]
    cat = pick(port, "cat", "last")[0]
    for site in port.sites():
        w = port.weight(site)
        after = (w + result.deltas[site.name].dense()) @ cat
        assert (after - w @ end).norm() < 1e-2 * (w @ end).norm()
        assert (after - w @ bos).norm() > 0.5 * (w @ bos).norm()


def test_the_ridge_is_relative() -> None:
    """Text states ten times as large give the same change of the outputs' directions: one default for every width."""

    class Louder(AnalyticPort):
        def text(self, prompts):
            return [type(t)(t.prompt, t.states * 10, t.kinds) for t in super().text(prompts)]

    spec = ConceptSpec.parse("cat", "dog", "bird")
    quiet, loud = erase(AnalyticPort(), spec, "uce"), erase(Louder(), spec, "uce")
    for name, delta in quiet.deltas.items():
        assert (delta.dense() - loud.deltas[name].dense()).norm() < 1e-8 * delta.dense().norm()


def test_erase_weight_zero_is_allowed_and_changes_nothing(port) -> None:
    result = erase(port, ConceptSpec.parse("cat"), "uce", {"erase_weight": 0.0})
    assert all(d.rank == 0 for d in result.deltas.values())
