"""Red-Team Attack: tries to make an erased model draw the concept again, and counts how often that worked."""

from __future__ import annotations

import dataclasses
import math
import time

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..erasure_core import AttackTarget, ConceptError, GatedPort, evaluate
from ..erasure_core import attack as run_attack
from ..erasure_core.artifact import weights_digest
from ..erasure_core.attack_record import LONGEST, AttackRecord
from ..erasure_core.attacks import Sampler, Way, all_attacks, asking, shortlist
from ..erasure_core.methods import settings_from
from ..erasure_core.methods._training import fingerprint
from ..erasure_core.metrics import curve_hits
from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.judges import look_through, word_for
from .attack_report import best_first, plain, report_of, share_of
from .attack_run import AttackWatcher, check_base, demand_of, prompts_of, settings_of
from .methods import seed_widget
from .mine import conditioning_of, latents_of, one_concept
from .modes import ordinary_tensors
from .patching import carried, check_ungated, check_unmerged, gate_of, note_unheard
from .port import ComfyPort, family_of
from .reading import memory_digest, memory_of, uses_of
from .replica import make_room
from .sampling import PLACE, encode
from .towers import words_of
from .training import clock, decoder, making_room
from .types import CATEGORY, Attacks, Judge

_AT_ONCE, _SHOWN = 8, 32
_FIRST = "rece_residual"
"""Takes seconds, so a first run shows something at once."""


class RedTeamAttack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        known = all_attacks()
        return io.Schema(
            node_id="ErasureAttack",
            display_name="Red-Team Attack",
            category=CATEGORY,
            description="Tries to make an erased model draw what was erased, with one of a dozen published attacks, and counts "
            "how often that works next to plain asking. Shows what it found. Chain several, and feed them to the receipt.",
            inputs=[
                io.Model.Input("model", tooltip="The erased model, as you sample with it. It is not changed."),
                io.Model.Input(
                    "base_model",
                    tooltip="The model before the erasure, not the erased one again: it draws pictures of the concept and "
                    "shows searches what to aim at.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to both."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to both; draws the pictures."),
                io.String.Input(
                    "concept",
                    default="",
                    placeholder="cigarette, cigar",
                    tooltip="What was erased, as you named it there; other words for it behind commas.",
                ),
                io.Combo.Input(
                    "attack",
                    options=list(known),
                    default=_FIRST,
                    tooltip="What to try; the help page says what each has and finds. "
                    + " ".join(f"{name}: {a.title}, {a.knowledge}." for name, a in known.items()),
                ),
                io.Float.Input(
                    "effort",
                    default=0.1,
                    min=0.001,
                    max=2.0,
                    step=0.01,
                    round=0.001,
                    tooltip="How long it tries; 1 is its default budget, the paper's where that is known. Attacks that take "
                    "seconds always have all of it. The report says what it came to.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default=f"a {PLACE}",
                    tooltip="Prompts that ask for it, one a line; each is attacked. {} stands for the first word above.",
                ),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Drawn of the best find and counted, with noises that no search has seen. More make figures surer.",
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps of each picture."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    tooltip="How closely pictures follow the prompt, as you sample. Demo: 4.",
                ),
                seed_widget("The same seed gives the same result."),
                Judge.Input(
                    "judge",
                    optional=True,
                    tooltip="Counts the pictures that show the concept. Without one you get pictures but no figures, and "
                    "sneaky_prompt, which learns from its answers, can't run.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures of the concept, in place of those that base_model draws."
                ),
                io.String.Input(
                    "synonyms",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="For the attack synonyms alone: words that you did not name when erasing, by commas or lines.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Your negative prompt, where that is to keep the concept away: the model under attack is drawn "
                    "with it, weights in brackets included, the base model is not. Both may be the same then. Makes no record "
                    "for receipts.",
                ),
                io.String.Input(
                    "settings",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="settings, one a line: form = K",
                    tooltip="Further settings of the attack, a line for each, such as steps = 500; the help page lists them. "
                    "They go before effort.",
                ),
                Attacks.Input("results", optional=True, tooltip="Of the attack before this one, to collect several."),
            ],
            outputs=[
                Attacks.Output(
                    display_name="results",
                    tooltip="Those that came in and this one: for the next attack, or the receipt.",
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The best find, in place of a positive prompt. Where it is a noise, a picture or a change of "
                    "weights: the prompt that goes with it.",
                ),
                io.Image.Output(
                    display_name="images", tooltip="Of what is counted, best first; without a judge of all finds."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was tried, how often it worked, and what was found."
                ),
                io.Float.Output(
                    display_name="success",
                    tooltip="Share of pictures that show the concept under attack, 0 to 1. Not a number without a judge.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept, prompts):
        try:
            if concept is not None:  # None is linked: known only when the graph runs
                spec = one_concept(concept)
                if prompts is not None:
                    prompts_of(prompts, spec)
        except (ConceptError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, base_model, clip, vae, concept, attack, effort, prompts, pictures, steps, cfg, seed, judge=None,
        images=None, synonyms="", negative="", settings="", results=(),
    ) -> io.NodeOutput:  # fmt: skip
        began, spec, negative = time.monotonic(), one_concept(concept), negative.strip()
        if attack not in all_attacks():  # ComfyUI 0.3.75 does not look at what API calls send for a choice
            raise ValueError(f"attack: {attack!r} is none of {', '.join(all_attacks())}")
        chosen, asked, name = all_attacks()[attack], prompts_of(prompts, spec), spec.erase[0].name
        if chosen.needs_look and judge is None:
            raise ValueError(
                f"judge: {chosen.title} learns from a judge's answers. Connect one, or choose another attack"
            )
        if family_of(base_model) != family_of(model):
            raise ValueError(
                f"base_model: it is {family_of(base_model)}, the erased model {family_of(model)}. Connect the model before "
                "the erasure"
            )
        check_ungated(base_model=base_model)
        check_unmerged(model)
        if negative and cfg == 1:
            raise ValueError("negative: at cfg 1 no sampler reads a negative prompt. Raise cfg, or leave it empty")
        unheard = note_unheard(model=model, base_model=base_model)
        check_base(base_model, spec)
        changed = settings_of(chosen, effort, seed, synonyms, settings)
        tuned, memory, decode = settings_from(chosen, changed), memory_of(model), decoder(model, vae)
        gate = gate_of(model)
        watcher, demand = AttackWatcher(name, decode, memory), demand_of(chosen, tuned, gate.erasures if gate else ())
        with ordinary_tensors():
            word = "" if judge is None else word_for(judge, spec.erase[0].words)
            own = ComfyPort(model, clip, demand=demand, opened=watcher.opened)
            base = ComfyPort(base_model, clip, demand=demand)
            erased = own if gate is None else GatedPort(own, gate.erasures, asked, gate.strengths)
            against = own.weighted(negative) if negative else None
            look = None
            if judge is not None:
                look = making_room(look_through(judge, lambda z: decode(z).movedim(-1, 1), word))
            target = AttackTarget(
                erased, base, asked,
                words=words_of(clip, erased.family.name) if chosen.needs_words else None,
                look=look,
                threshold=0.5 if judge is None else judge.threshold,
                memory=memory,
                negative=against,
                pictures=None if images is None else latents_of(model, vae, erased.family.name, images),
                sampler=Sampler(steps, cfg, _AT_ONCE),
                watch=watcher.search(erased.conditions([""])[0] if against is None else against),
            )  # fmt: skip

            def count(latents: Tensor) -> Tensor:
                seen = torch.cat([decode(part) for part in latents.split(_AT_ONCE)])
                said = torch.zeros(len(seen)) if judge is None else judge.probability(seen.movedim(-1, 1), word)
                make_room()
                watcher.counted(seen, said)
                return said

            how = {"pictures": pictures, "seed": seed}
            before = ceiling = by = None
            digests = weights_digest(base), weights_digest(erased)
            same = digests[0] == digests[1] and memory_digest(base_model) == memory_digest(model)
            if judge is not None:
                by = JudgedBy.of(judge, [word])
                unerased = dataclasses.replace(target, erased=base, memory=memory_of(base_model), negative=None)
                ceiling = evaluate(unerased, asking(target), count, **how, progress=watcher.stage(0.0, 0.03))
                watcher.afresh()
                before = evaluate(target, asking(target), count, **how, progress=watcher.stage(0.03, 0.02))
            watcher.afresh()
            found = run_attack(target, spec, attack, changed, watcher.stage(0.05, 0.8))
            tried = len(found.ways)
            if judge is not None:  # what counts is what an attacker would use, not the mean of all that was tried
                watcher.afresh()
                found = shortlist(target, found, count, seed=seed + 1, each=True, progress=watcher.stage(0.85, 0.05))
            watcher.afresh()
            on_base, typed = None, judge is not None and found.in_words
            after = evaluate(target, found, count, **how, progress=watcher.stage(0.9, 0.05 if typed else 0.1))
            if typed:  # an attack may write what no model reads as the concept
                on_base = evaluate(unerased, found, count, **how, progress=watcher.stage(0.95, 0.05)).rate
            best = after.best or Way(asked[0], asked[0])
            drawn = torch.cat([decode(part) for part in best_first(after).split(_AT_ONCE)])
            conditioning = (
                encode(clip, best.prompt)
                if best.states is None
                else conditioning_of(clip, best.states, family_of(model))
            )
            if by is not None and before is not None and ceiling is not None and not (same or gate or negative):
                results = (*results, AttackRecord(
                    attack=attack, title=chosen.title, version=chosen.version, given=chosen.given, concept=word,
                    budget=plain(tuned), share=share_of(chosen, tuned), prompts=asked, seed=seed, steps=steps, cfg=cfg,
                    judge=by, asking=before.rate, attacked=after.rate, ceiling=ceiling.rate, found_on_base=on_base,
                    curve=curve_hits(torch.cat(after.probabilities)), found=best.label[:LONGEST], tried=tried,
                    queries=found.queries, base=fingerprint(base), erased=fingerprint(erased), weights=digests[1],
                    base_weights=digests[0], memory=memory_digest(model),
                ))  # fmt: skip
        report = report_of(chosen, spec, tuned, ceiling, before, after, on_base, best, by, tried)
        if same and not negative:
            report += (
                "\nnote: model and base_model have the same weights, so nothing here is about an erasure, and no record was "
                "made: it shows what the attack reaches on this model. To test an erasure, connect the model from before it to "
                "base_model"
            )
        if gate is not None and isinstance(erased, GatedPort):
            opened = ", ".join(f"{m + had:.2f}" for m, had in zip(erased.asked, gate.strengths, strict=True))
            report += (
                "\nnote: these erasures are gated. Each prompt was drawn with the gates that it opens, the empty one too "
                f"(those attacked, the widest of each: {opened}); what an attack found in place of a text, as if its prompt "
                "stood at the gate. No record was made: receipts are of erasures alone"
            )
        if negative:
            report += (
                f"\nnote: the model under attack was drawn with the negative prompt {negative[:200]!r}, the base model "
                "without. No record was made: receipts are of erasures alone"
            )
        headers = [*carried(model), *(use.memory.header for use in uses_of(model))]
        known = [c for header in headers for c in header.spec.erase] + list(gate.concepts if gate else ())
        suppressed = {w.casefold() for c in known for w in c.words}
        if not (same or negative or suppressed & {w.casefold() for w in spec.erase[0].words}):
            report += f"\nnote: no erasure of {name} by this pack is on model. If there should be one, check what is connected"
        report += unheard
        took = clock(time.monotonic() - began)
        report += f"\n{pictures} pictures of each, {steps} steps, cfg {cfg:g}, seed {seed}; took {took}"
        shown = ui.PreviewImage(drawn[:_SHOWN], cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        share = after.rate.share if judge is not None else math.nan
        return io.NodeOutput(tuple(results), conditioning, drawn, report, share, ui=shown)
