"""Nodes for the tests only: they look into the server's memory. The `server` fixture puts them into its custom nodes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import folder_paths
import torch
from safetensors.torch import save_file

from . import attacks, moves, records, small_towers

PREFIX = "diffusion_model."


class Probe:
    """Runs every time, and has a text for the test."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def IS_CHANGED(cls, **_) -> float:
        return float("nan")


def answer(report: dict) -> dict:
    return {"ui": {"text": (json.dumps(report),)}}


def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(plain, Path(folder_paths.get_output_directory()) / name)


class Again(Probe):
    """Passes a MODEL on and makes everything behind it run again."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self, model):
        return (model,)


class Checksum(Probe):
    """SHA-256 of all weights as they lie in memory once this MODEL is loaded, and which network object they are in."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})

    def run(self, model):
        mm.load_models_gpu([model])
        digest = hashlib.sha256()
        for key, weight in sorted(model.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return answer({"sha256": digest.hexdigest(), "network": id(model.model)})


class Effective(Probe):
    """Writes the cross-attention weights of a MODEL with its patches to the output folder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "name": ("STRING", {})}})

    def run(self, model, name):
        found = {}
        for key, ((weight, convert), *patches) in model.get_key_patches(PREFIX).items():
            if ".attn2.to_k." in key or ".attn2.to_v." in key:
                own = convert(weight.detach().float().clone(), inplace=True)
                own = comfy.lora.calculate_weight(patches, own, key) if patches else own
                found[key.removeprefix(PREFIX).removesuffix(".weight")] = own
        write(name, found)
        return answer({"weights": len(found)})


class TextStates(Probe):
    """Writes a CONDITIONING to the output folder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}})

    def run(self, conditioning, name):
        write(name, {"states": conditioning[0][0]})
        return answer({})


class FluxModel(Probe):
    """A tiny MODEL of another architecture: joint attention, no cross-attention to the text."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self):
        small = dict(in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=64, mlp_ratio=2.0)
        small |= dict(num_heads=4, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, patch_size=2)
        config = comfy.supported_models.Flux(dict(image_model="flux", qkv_bias=True, guidance_embed=True, **small))
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(config.get_model({}, device=cpu), cpu, cpu),)


class VideoModel(Probe):
    """A tiny MODEL of a transformer whose attn2 reads a projection of the text."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self):
        small = dict(in_channels=8, cross_attention_dim=32, attention_head_dim=8, num_attention_heads=4)
        small |= dict(caption_channels=16, num_layers=1)
        config = comfy.supported_models.LTXV(dict(image_model="ltxv", **small))
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(config.get_model({}, device=cpu), cpu, cpu),)


def pack(module: str):
    """A module of the pack under test, as ComfyUI loaded it."""
    return next(m for name, m in list(sys.modules.items()) if name.endswith(f"concept-erasure.{module}"))


class Stored(Probe):
    """The demo MODEL with its weights stored in another type; it computes in float32."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"type": ("STRING", {})}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self, type):
        demo, _, _, *_ = pack("nodes.demo").load_demo()
        config = pack("nodes.demo")._DemoConfig(demo.model.model_config.unet_config)
        config.set_inference_dtype(getattr(torch, type), torch.float32)
        cpu = torch.device("cpu")
        net = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=cpu)
        net.load_model_weights({f"unet.{k}": v for k, v in demo.model.diffusion_model.state_dict().items()}, "unet.")
        return (comfy.model_patcher.ModelPatcher(net, cpu, cpu),)


class TinyXL(Probe):
    """A MODEL of random weights that reads pooled text and sizes as SDXL does."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self):
        demo, _, _, *_ = pack("nodes.demo").load_demo()
        config = pack("nodes.demo")._DemoConfig(
            {**demo.model.model_config.unet_config, "num_classes": "sequential", "adm_in_channels": 128 + 6 * 256}
        )
        config.set_inference_dtype(torch.float32, None)
        cpu, g = torch.device("cpu"), torch.Generator().manual_seed(3)
        net = comfy.model_base.SDXL(config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=cpu)
        for p in net.diffusion_model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.05)
        return (comfy.model_patcher.ModelPatcher(net, cpu, cpu),)


class Replica(Probe):
    """Compares the replica that training would use with the loaded network, and says what the memory check says."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "clip": ("CLIP",)}})

    def run(self, model, clip):
        replica, port, memory_of = pack("nodes.replica"), pack("nodes.port"), pack("nodes.footprint")
        mm.load_models_gpu([model])
        network, memory = model.model.diffusion_model, model.model.state_dict()
        before = {k: v.clone() for k, v in memory.items()}
        with pack("nodes.modes").ordinary_tensors():
            g = torch.Generator().manual_seed(1)
            z, t = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 900])
            cond = memory_of.Cond.cat(port.ComfyPort(model, clip).conditions(["a cat", "a small dog"]))
            known = {"context": cond.context, **cond.extra}
            beside = self.by_comfy(model, clip, ["a cat", "a small dog"])
            options = {"optimized_attention_override": pack("nodes.network").attention}
            live = network(z, t.float(), transformer_options=options, **known)
            stock = network(z, t.float(), **known)
            with replica.build(model, "emojicanvas", memory_of.Demand(), (4, 16, 16)) as own:
                mine = own.reference(z, t, cond)
                parameters = own.train(memory_of.FullWeights(memory_of.Layers.ALL))
                with torch.enable_grad():
                    gradients = torch.autograd.grad(own.predict(z, t, cond).square().mean(), parameters)
                inference = sum(p.is_inference() for p in own.net.parameters())
                kept = self.kept(own, memory_of.Demand().what, cond.row(0))
                drawn, rows = self.alive(own, 4, cond.row(0)), own.rows
                read, new = port.ComfyPort(model, clip).text, f"number {time.time_ns()}"
                asked = self.asked_for(lambda: (read(["a cat"]), read([new]), read([new])))
            asked_later = self.asked_for(lambda: read([new + ", later"]))
            how = (model, own.schedule, own.prediction, own.latent_shape, memory_of.Demand(pictures=1))
            need, plain = memory_of.footprint(*how), memory_of.footprint(*how, fused=False)
            holding = memory_of.footprint(*how[:-1], memory_of.Demand(pictures=1, latents=10))
            in_pieces = replica.attends_in_pieces(torch.device("cpu"), torch.float32)
            math = torch.nn.attention.SDPBackend.MATH
            with torch.nn.attention.sdpa_kernel(math):
                by_formula = replica.attends_in_pieces(torch.device("cpu"), torch.float32)
            cpu, fits = torch.device("cpu"), {}
            room = mm.get_free_memory(cpu) / 1.35
            for name, share, draws in (("ample", 0.1, 0.01), ("short", 0.1, 0.29), ("shorter", 2, 0.29)):
                like = memory_of.Footprint(0, 0, 0, int(share * room), int(0.1 * room), int(draws * room), 0)
                fits[name] = replica._fit(like, False, cpu, "", 16)
            try:
                replica._fit(memory_of.Footprint(1 << 50, 0, 0, 0, 0, 0, 0), False, cpu, "Lower the batch", 16)
                refused = ""
            except ValueError as error:
                refused = str(error)
        return answer(
            {
                "equal": torch.equal(live, mine),
                "beside": [float((cond.extra[k] - x).abs().max()) for k, x in beside.items()],
                "stock": float((stock - mine).abs().max()),
                "gradients": all(bool(x.any()) for x in gradients),
                "inference": inference,
                "freed": all(p.device.type == "meta" for p in own.net.parameters()),
                "untouched": all(torch.equal(v, before[k]) for k, v in memory.items()),
                "bytes": {
                    "plain": need.activations,
                    "checkpointed": need.checkpointed,
                    "weights": need.matrices,
                    "ten latents": holding.trained - need.trained,
                },
                "kept": kept,
                "drawn": [drawn, 4 * need.drawn],
                "rows": rows,
                "room": [x.count(own.room) for x in (asked, asked_later)],
                "fits": fits,
                "with matrices": plain.activations,
                "in pieces": [in_pieces, by_formula],
                "refused": refused,
            }
        )

    @staticmethod
    def kept(own, what, cond):
        """Bytes that a real pass of one picture keeps for the backward pass."""
        parameters, seen = own.train(what), {}
        weights = {p.untyped_storage().data_ptr() for p in [*own.net.parameters(), *parameters]}

        def pack(x):
            storage = x.detach().untyped_storage()  # held, so that no other gets its address
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
            own.predict(torch.randn(1, *own.latent_shape), torch.tensor([500]), cond)
        return sum(storage.nbytes() for storage in seen.values())

    @staticmethod
    def asked_for(what):
        """How much memory ComfyUI is asked to free meanwhile, each time."""
        asked, plain = [], mm.free_memory
        mm.free_memory = lambda size, *args, **kwargs: asked.append(size) or plain(size, *args, **kwargs)
        try:
            what()
        finally:
            mm.free_memory = plain
        return asked

    @staticmethod
    def alive(own, rows, cond):
        """Bytes that a real pass of some rows without gradients holds at most."""
        z, t = torch.randn(rows, *own.latent_shape), torch.full((rows,), 500)
        with torch.profiler.profile(profile_memory=True) as seen:
            own.reference(z, t, cond)
        moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(moves, key=lambda e: e.start_ns())]
        return max(itertools.accumulate(sizes))

    @staticmethod
    def by_comfy(model, clip, prompts):
        """What ComfyUI's own sampling would give the network beside the text, for 128 x 128 pictures."""
        if not model.model.adm_channels:
            return {}
        noise, rows = torch.zeros(1, 4, 16, 16), []
        for prompt in prompts:
            _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
            extra = model.model.extra_conds(
                pooled_output=pooled, width=128, height=128, noise=noise, device=noise.device
            )
            rows.append(extra["y"].cond)
        return {"y": torch.cat(rows)}


class Conditions(Probe):
    """How often a text encoder is asked for prompts whose states and pooled text are both wanted, and how far the pooled
    text is from ComfyUI's own; of a model that reads it, if there is one."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"clip": ("CLIP",)}, "optional": {"model": ("MODEL",)}})

    def run(self, clip, model=None):
        port, prompts = pack("nodes.port"), ["a cat, once", "a small dog " * 40, "once", "neon style, once"]
        asked, encode = [], clip.cond_stage_model.encode_token_weights
        clip.cond_stage_model.encode_token_weights = lambda tokens: asked.append(tokens) or encode(tokens)
        try:
            with pack("nodes.modes").ordinary_tensors():
                pooled = [row for _, row in port._encode(clip, prompts)]
                sections = sum(len(next(iter(x.values()))) for x in asked)
                asked.clear()
                if model is not None:
                    own = port.ComfyPort(model, clip)
                    own.text(prompts[:2])
                    own.conditions(prompts)
        finally:
            del clip.cond_stage_model.encode_token_weights
        again = sum(len(next(iter(x.values()))) for x in asked)
        known = [clip.encode_from_tokens(clip.tokenize(p), return_pooled=True)[1].float().cpu() for p in prompts]
        wanted = sum(len(next(iter(clip.tokenize(p).values()))) for p in prompts)
        off = max(float((a - b).abs().max()) for a, b in zip(pooled, known, strict=True))
        return answer({"wanted": wanted, "sections": sections, "with a model": again, "off": off})


class _Verdict:
    name, version, labels, threshold = "probe", "1", None, 0.5

    def __init__(self, says: float) -> None:
        self.says = says

    def probability(self, pictures, concept):
        assert pictures.ndim == 4 and pictures.shape[1] == 3 and bool(((pictures >= 0) & (pictures <= 1)).all())
        return torch.full((len(pictures),), self.says)


class FixedJudge(Probe):
    """A JUDGE that always says the same."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"says": ("FLOAT", {})}})
    RETURN_TYPES, OUTPUT_NODE = ("JUDGE",), False

    def run(self, says):
        return (_Verdict(says),)


class Shell(Probe):
    """For several concepts: what a training is said to hold, and whom its pictures show."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self):
        core, training = pack("erasure_core"), pack("nodes.training")
        demands = {}
        for name, method in core.all_methods().items():
            settings = method.settings()
            made = [training.demand_of(settings, method, n) for n in (1, 3)]
            demands[name] = [(getattr(d.what, "rank", 0), d.pictures, d.keeps is not None) for d in made]
        adversarial = core.all_methods()["adversarial"]
        viewing = [
            training.demand_of(adversarial.settings(views=v), adversarial, n).latents
            for v, n in ((0, 1), (10, 1), (10, 3))
        ]
        spec = core.ConceptSpec.parse("cat\nbomb\nrose", "", "house, tree")
        watcher, shown = training.watcher_of(spec, lambda z: torch.zeros(len(z), 8, 8, 3)), []
        watcher.encode(lambda texts: [core.operators.trainable.Cond(torch.full((1, 1, 1), len(t))) for t in texts])

        class Model:
            closed = False
            make_room = staticmethod(lambda: None)

            def denoise_until(self, cond, null, **_):
                shown.append(cond.context.flatten().tolist())
                return cond.context

        watcher._model = Model()
        for _ in range(4):
            watcher._draw()
        return answer(
            {"demands": demands, "viewing": viewing, "shown": shown, "named": watcher._in_turn(watcher._prompts)}
        )


class Shown(Probe):
    """What a node says while pictures are drawn, and then in two steps of a training that was cut off after the fifth."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self):
        spec, bar, said = pack("erasure_core").ConceptSpec.parse("cat"), [], []
        watcher = pack("nodes.training").watcher_of(spec, lambda z: z)
        compose = watcher._compose
        watcher._compose = lambda status: said.append(status) or compose(status)
        watcher._bar.update_absolute = lambda done, total, shown: bar.append((done, total, shown is not None))
        watcher.drawing(8, 32)
        watcher._started -= 1000  # they took long
        watcher.progress(5, 100)
        time.sleep(0.1)
        watcher.watch(None, 6, {"erase": 1.0})
        watcher.progress(6, 100)
        return answer({"bar": bar, "said": said})


class Memory(Probe):
    """Resident bytes of the server."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return answer({"bytes": pages * os.sysconf("SC_PAGE_SIZE")})


class TinyClip(Probe):
    """A CLIP of an SD family with small towers of random weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"family": ("STRING", {})}})
    RETURN_TYPES, OUTPUT_NODE = ("CLIP",), False

    def run(self, family):
        small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
        classes = {
            "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
            "sd20": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
            "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        }
        options = {f"clip_{x}_model_config": small for x in "lgh"}
        clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*classes[family]), model_options=options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in clip.cond_stage_model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return (clip,)


class Tower(Probe):
    """How far the pack's own text encoder is from what a CLIP encodes, and which towers it has."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"clip": ("CLIP",)}})

    def run(self, clip):
        towers = next(module for name, module in sys.modules.items() if name.endswith(".nodes.towers"))
        prompt = "a picture of a cat, a dog"
        with torch.inference_mode(False), torch.no_grad():
            own = clip.encode_from_tokens(clip.tokenize(prompt)).float().cpu().clone()
            made = towers.encoder_of(clip)(towers.tokens_of(clip, [prompt])).cpu()
        same = made.shape == own.shape
        return answer({"towers": towers.tower_names(clip), "off": float((made - own).abs().max()) if same else None,
            "size": float(own.abs().max()), "width": own.shape[2]})  # fmt: skip


NODES = (
    Again,
    Checksum,
    Effective,
    TextStates,
    FluxModel,
    VideoModel,
    Stored,
    TinyXL,
    Replica,
    Conditions,
    FixedJudge,
    Memory,
    Shell,
    Shown,
    TinyClip,
    Tower,
)
ALL = (*NODES, *small_towers.NODES, *attacks.NODES, *records.NODES, *moves.NODES)
NODE_CLASS_MAPPINGS = {f"Probe{node.__name__}": node for node in ALL}
