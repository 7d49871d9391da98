"""Tiny random pipelines of the real diffusers: erase on them, put the change on, take it off, load the file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from erasure_core import (
    ConceptSpec,
    Delta,
    Erasure,
    Header,
    Layout,
    ModelPort,
    Prediction,
    Role,
    TokenKind,
    WrongModelError,
    erase,
    load,
    names,
    save,
)
from erasure_core.integrations.diffusers import DiffusersPort, apply, attach, remove
from erasure_core.operators.changes import FullWeights, Layers

pytestmark = pytest.mark.core
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
SPEC = ConceptSpec.parse("red cat, kitty", "dog", "bird")
XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's own words, from the merges that the testbed ships."""
    from transformers import CLIPTokenizer

    from erasure_core.emojicanvas import text

    lines = gzip.decompress(text._MERGES.read_bytes()).decode("utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    vocabulary = text._byte_pair_encoder().get_vocab()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def text_encoder(width: int, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=49408,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(width: int, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        **more,
    ).eval()


@pytest.fixture
def pipe(tokenizer):
    torch.manual_seed(3)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=text_encoder(48),
        tokenizer=tokenizer,
        unet=unet(48),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def xl(tokenizer):
    torch.manual_seed(4)
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=text_encoder(16),
        text_encoder_2=text_encoder(32, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        unet=unet(48, **XL_UNET),
    )


@torch.no_grad()
def output(pipe, prompt: str) -> torch.Tensor:
    port = DiffusersPort(pipe)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return port.predict(z, torch.tensor([10, 700]), port.text([prompt])[0].states.expand(2, -1, -1))


def bits(pipe) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in pipe.unet.state_dict().items()}


def test_what_the_port_says_of_the_model(pipe) -> None:
    port = DiffusersPort(pipe)
    assert isinstance(port, ModelPort)
    assert (port.family.name, port.family.context_dim, port.family.num_res_blocks, port.family.levels) == (
        "sd-like",
        48,
        1,
        2,
    )
    assert port.prediction is Prediction.EPS
    sites = port.sites()
    places = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    assert [s.name for s in sites] == [
        f"{p}.transformer_blocks.0.attn2.{leaf}" for p in places for leaf in ("to_k", "to_v")
    ]
    assert [s.role for s in sites[:2]] == [Role.TEXT_KEY, Role.TEXT_VALUE]
    for site in sites:
        module = pipe.unet.get_submodule(names.to_diffusers(site.name, port.family))
        copy = port.weight(site)
        assert (
            copy.dtype == torch.float32 and copy.shape == (site.d_out, site.d_in) and torch.equal(copy, module.weight)
        )
        copy.zero_()
        assert module.weight.abs().max() > 0


@pytest.mark.parametrize(("width", "name"), [(768, "sd15"), (1024, "sd20"), (2048, "sdxl")])
def test_the_family_is_known_by_its_text_width(pipe, width: int, name: str) -> None:
    with torch.device("meta"):
        pipe.unet = unet(width)
    port = DiffusersPort(pipe)
    assert port.family.name == name
    with pytest.raises(ValueError, match="offloaded"):
        port.weight(port.sites()[0])


def test_prompts_are_encoded_as_the_pipeline_does(pipe) -> None:
    port = DiffusersPort(pipe)
    prompts = ["a red cat", "", "word " * 200, "a red cat"]
    got = port.text(prompts)
    expected = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    for i, states in enumerate(got):
        assert torch.allclose(states.states, expected[i], atol=1e-5) and states.prompt == prompts[i]
    kinds = [TokenKind(k).name for k in got[0].kinds.tolist()]
    assert kinds[:6] == ["BOS", "CONTENT", "CONTENT", "CONTENT", "EOS", "PAD"] and len(kinds) == 77
    assert got[1].kinds[:3].tolist() == [TokenKind.BOS, TokenKind.EOS, TokenKind.PAD]
    assert got[2].kinds[-1] == TokenKind.EOS
    assert got[0] is got[3] is port.text(["a red cat"])[0], "encoded once"


def test_xl_reads_both_encoders(xl) -> None:
    port = DiffusersPort(xl)
    (got,) = port.text(["a red cat"])
    assert got.states.shape == (77, 48)
    ids = xl.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        one, two = (e(ids, output_hidden_states=True).hidden_states[-2] for e in (xl.text_encoder, xl.text_encoder_2))
    assert torch.allclose(got.states, torch.cat([one, two], -1)[0], atol=1e-5)
    assert all(d.rank for d in erase(port, SPEC).deltas.values())
    with pytest.raises(ValueError, match=r"predict\(\) supports SD 1.x and 2.x"):
        port.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]), got.states[None])


def test_on_and_off_again_bit_for_bit(pipe) -> None:
    before, erasure = bits(pipe), erase(DiffusersPort(pipe), SPEC)
    assert bits(pipe) == before
    plain = output(pipe, "red cat")
    with apply(pipe, erasure) as same:
        assert same is pipe
        assert (output(pipe, "red cat") - plain).abs().max() > 1e-4
        changed = {k for k, v in bits(pipe).items() if v != before[k]}
        assert changed == {names.to_diffusers(s, erasure.header.family) + ".weight" for s in erasure.deltas}
    assert bits(pipe) == before
    assert torch.equal(output(pipe, "red cat"), plain)
    with apply(pipe, erasure, 0.0):
        assert bits(pipe) == before
    with pytest.raises(KeyError), apply(pipe, erasure, 0.7):
        raise KeyError
    assert bits(pipe) == before


def test_two_come_off_in_reverse_order_only(pipe) -> None:
    before, erasure = bits(pipe), erase(DiffusersPort(pipe), SPEC)
    first, second = attach(pipe, erasure), attach(pipe, erasure, 0.5)
    with pytest.raises(RuntimeError, match="Remove that one first"):
        remove(first)
    remove(second)
    remove(first)
    remove(first)
    assert bits(pipe) == before


def test_a_strangers_erasure_changes_nothing(pipe, port, spec) -> None:
    before = bits(pipe)
    with pytest.raises(WrongModelError, match="analytic"):
        attach(pipe, erase(port, spec))
    assert bits(pipe) == before


@pytest.mark.parametrize("method", ["uce", "rece", "speed"])
def test_the_saved_file_loads_as_a_lora_and_does_the_same(pipe, tmp_path: Path, method: str) -> None:
    few = {"empty_prompt": "bos and 3 centres"} if method == "speed" else {}  # 77 rows would fill a text width of 48
    erasure = erase(DiffusersPort(pipe), SPEC, method, few)
    path = save(erasure, tmp_path / "x.safetensors", layout=Layout.DIFFUSERS)
    with apply(pipe, load(path)):
        expected = output(pipe, "red cat")
        edited = {s.name: DiffusersPort(pipe).weight(s) for s in DiffusersPort(pipe).sites()}
    plain = output(pipe, "red cat")
    pipe.load_lora_weights(str(path), adapter_name="erasure")
    assert (output(pipe, "red cat") - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-3

    port = DiffusersPort(pipe)
    for site in port.sites():
        assert torch.allclose(port.weight(site), edited[site.name], atol=1e-5), (
            "an active adapter is part of the weight"
        )
    pipe.disable_lora()
    assert torch.equal(port.weight(port.sites()[1]), port._modules[port.sites()[1].name][1].base_layer.weight)
    pipe.enable_lora()
    pipe.fuse_lora()
    for site in port.sites():
        assert torch.allclose(port.weight(site), edited[site.name], atol=1e-5), "so is a fused one, once"


@pytest.mark.parametrize(("kind", "width"), [("pipe", 768), ("xl", 2048)])
def test_the_lora_layout_is_read_too(request, kind: str, width: int, tmp_path: Path) -> None:
    """The file that ComfyUI's Load LoRA reads: diffusers converts the names that SD 1.5 and SDXL have there.

    Only where all changes have one rank: the alphas that it converts don't reach every layer.
    """
    pipe = request.getfixturevalue(kind)
    pipe.unet = unet(width, **({} if kind == "pipe" else XL_UNET))
    port = DiffusersPort(pipe)
    assert port.family.name == ("sd15" if kind == "pipe" else "sdxl")
    changes = {s.name: Delta(0.1 * torch.randn(s.d_out, 2), 0.1 * torch.randn(2, s.d_in)) for s in port.linears()}
    made = Erasure(Header("uce", {}, SPEC, port.family, "", "1"), changes)
    expected = {s.name: port.weight(s) + changes[s.name].dense() for s in port.linears()}
    pipe.load_lora_weights(str(save(made, tmp_path / "x.safetensors")), adapter_name="erasure")
    port = DiffusersPort(pipe)  # what it has loaded
    for site in port.linears():
        assert torch.allclose(port.weight(site), expected[site.name], atol=1e-5), site.name


def test_the_replica_is_the_network_and_its_sites_have_the_checkpoints_names(pipe, tmp_path: Path) -> None:
    """The trainable view predicts what the port predicts, adapters included, and leaves the pipeline alone."""
    lora = erase(DiffusersPort(pipe), SPEC)
    plain = output(pipe, "red cat")
    pipe.load_lora_weights(str(save(lora, tmp_path / "x.safetensors", layout=Layout.DIFFUSERS)), adapter_name="user")
    port, before = DiffusersPort(pipe), bits(pipe)
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    with port.trainable() as model, torch.no_grad():
        made = model.predict(z, t, port.conditions(["red cat"])[0])
        assert not any("lora" in name for name, _ in model.net.named_modules())
        assert [s.name for s in model.sites] == [s.name for s in port.linears()]
        leaves = {s.name.split("transformer_blocks.0.")[1] for s in model.sites}
        to = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")]
        assert leaves == {*to, "ff.net.0.proj", "ff.net.2"} and len(model.sites) == 4 * 10
        for site in model.sites:
            assert model.module(site.name).weight.shape == (site.d_out, site.d_in)
    assert (made - output(pipe, "red cat")).abs().max() < 1e-5 < (made - plain).abs().max()
    assert bits(pipe) == before


@pytest.mark.parametrize(("options", "tolerance"), [({"checkpoint": True}, 1e-6), ({"autocast": torch.bfloat16}, 0.05)])
def test_less_memory_trains_the_same(pipe, options: dict, tolerance: float) -> None:
    """Blocks computed again give the same gradients, bfloat16 about the same."""
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    slopes = []
    for port in (DiffusersPort(pipe), DiffusersPort(pipe, **options)):
        with port.trainable() as model:
            parameters = model.train(FullWeights(Layers.ALL))
            out = model.predict(z, t, port.conditions(["red cat"])[0])
            assert out.dtype == torch.float32
            slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.square().mean(), parameters)]))
    plain, other = slopes
    assert (other - plain).norm() < tolerance * plain.norm()


QUICK = {"iterations": 3, "sample_steps": 3, "learning_rate": 1e-2}


@pytest.mark.parametrize(("rank", "energy"), [(0, 0.9), (0, 1.0), (3, 1.0)])
def test_a_trained_change_of_every_kind_of_layer_loads_as_a_lora(
    pipe, tmp_path: Path, rank: int, energy: float
) -> None:
    """ESD over all linear layers: PEFT's loader, apply() and the file agree."""
    port, before = DiffusersPort(pipe), bits(pipe)
    made = erase(port, SPEC, "esd", {**QUICK, "layers": "all", "rank": rank, "energy": energy})
    assert bits(pipe) == before
    assert set(made.deltas) == {s.name for s in port.linears()}
    path = save(made, tmp_path / "x.safetensors", layout=Layout.DIFFUSERS)
    plain = output(pipe, "red cat")
    with apply(pipe, load(path)):
        expected = output(pipe, "red cat")
        assert {k for k, v in bits(pipe).items() if v != before[k]} == {
            names.to_diffusers(s, port.family) + ".weight" for s in made.deltas
        }
    assert bits(pipe) == before
    pipe.load_lora_weights(str(path), adapter_name="erasure")
    assert (output(pipe, "red cat") - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-3


def test_xl_encodes_a_prompt_once(xl, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, asked, encode = ["a red cat", "", "blue"], [], xl.encode_prompt
    expected = [encode(p, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[2] for p in prompts]

    def counted(*args, prompt, **how):
        asked.extend(prompt)
        return encode(*args, prompt=prompt, **how)

    monkeypatch.setattr(xl, "encode_prompt", counted)
    port = DiffusersPort(xl)
    port.text(prompts[:2])
    conds = port.conditions([*prompts, prompts[0]])
    assert asked == prompts
    for cond, pooled in zip(conds, [*expected, expected[0]], strict=True):
        assert torch.allclose(cond.extra["text_embeds"], pooled, atol=1e-5)


def test_xl_is_trained_with_its_pooled_text_and_size(xl) -> None:
    port = DiffusersPort(xl)
    cond, null = port.conditions(["a red cat", ""])
    assert cond.extra["text_embeds"].shape == (1, 32) and cond.extra["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]]
    assert not torch.equal(cond.extra["text_embeds"], null.extra["text_embeds"])
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    with port.trainable() as model, torch.no_grad():
        made = model.predict(z, t, cond)
    with torch.no_grad():
        expected = xl.unet(z, t, encoder_hidden_states=cond.context, added_cond_kwargs=dict(cond.extra)).sample
    assert (made - expected).abs().max() < 1e-5
    made = erase(port, SPEC, "leco", QUICK)
    assert any(d.dense().any() for d in made.deltas.values())
    made = erase(port, SPEC, "forget_me_not", {**QUICK, "pictures": 2})
    assert any(d.dense().any() for d in made.deltas.values())


def test_an_inpainting_model_is_not_trained_on(pipe) -> None:
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match=r"model: its UNet reads more than a latent and text"):
        erase(DiffusersPort(pipe), SPEC, "esd")


def test_pipelines_that_it_cannot_read() -> None:
    class Flux:
        unet = None

    with pytest.raises(ValueError, match="model: a Flux has no UNet"):
        DiffusersPort(Flux())
