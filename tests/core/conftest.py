"""Small models and requests that the core tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from erasure_core import ConceptSpec, Family, Prediction, Site, TextStates
from erasure_core.analytic import AnalyticPort
from erasure_core.attacks import Words
from erasure_core.emojicanvas.model import sites_of
from erasure_core.emojicanvas.unet import UNet, UNetConfig
from erasure_core.operators.cond import Cond
from erasure_core.operators.trainable import TrainableModel, linear_sites
from erasure_core.port import token_kinds
from erasure_core.schedule import Schedule
from erasure_core.text_encoder import TextConfig, TextEncoder

settings.register_profile(
    "core",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("core")


@pytest.fixture(autouse=True)
def _own_randomness():
    torch.manual_seed(20)


class _Lists(TorchFunctionMode):
    """Tells of tensors made of Python's numbers on another device than the CPU: no operator shows how they get there."""

    FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
    INDEXING = (Tensor.__getitem__, Tensor.__setitem__)

    def __init__(self, told: Callable[[], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in self.INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if args[0].device.type != "cpu" and any(isinstance(x, list) for x in index):
                self._told()
        elif func in self.FACTORIES and made.device.type != "cpu":
            data = args[1] if func is Tensor.new_tensor else args[0]
            if not isinstance(data, Tensor):
                self._told()
        return made


class Waits(TorchDispatchMode):
    """Counts copies from the host to the meta device that the host would wait for on a GPU, while ``on``."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.seen, self._lists = False, 0, _Lists(self._wait)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._lists.__exit__(*raised)

    def _wait(self) -> None:
        self.seen += self.on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and made.device.type == "meta"
        if copied and not (kwargs or {}).get("non_blocking"):
            self._wait()
        return made


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def port() -> AnalyticPort:
    return AnalyticPort()


@pytest.fixture
def spec() -> ConceptSpec:
    return ConceptSpec.parse("red apple, apple\nfurry cat", replace_with="pear\n", keep="dog, green tree")


class TinyPort:
    """A trainable port: the words of the analytic port, a real UNet of four attention blocks with random weights."""

    def __init__(self, dtype: torch.dtype = torch.float32, prediction: Prediction = Prediction.EPS) -> None:
        torch.manual_seed(5)
        self.unet = UNet(UNetConfig(32, (1,), 1, (1,), 16, 2)).to(dtype).requires_grad_(False)
        self.words = AnalyticPort(width=16, length=6)
        self.family, self.prediction = Family("tiny", 16, 1, 1), prediction
        self.schedule = Schedule.rectified_flow() if prediction is Prediction.FLOW else Schedule.scaled_linear()
        self.replicas: list[UNet] = []

    def sites(self) -> Sequence[Site]:
        return sites_of(self.unet)

    def linears(self) -> Sequence[Site]:
        return linear_sites(self.unet)

    def weight(self, site: Site) -> Tensor:
        return self.unet.get_submodule(site.name).weight.detach().float().clone()

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        return self.words.text(prompts)

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(z, t, context)

    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        return [Cond(x.states[None].to(next(self.unet.parameters()))) for x in self.text(prompts)]

    def trainable(self) -> TrainableModel:
        self.replicas.append(copy.deepcopy(self.unet))
        return TrainableModel(self.replicas[-1], self.schedule, self.prediction, (4, 4, 4))

    def untouched(self) -> bool:
        """Whether every replica still has the original's weights, bit for bit, and no hooks."""
        original = self.unet.state_dict()
        return all(
            all(torch.equal(value, original[name]) for name, value in replica.state_dict().items())
            and not any(m._forward_hooks or m._forward_pre_hooks for m in replica.modules())
            for replica in self.replicas
        )


@pytest.fixture
def tiny() -> TinyPort:
    return TinyPort()


@pytest.fixture
def tiny64() -> TinyPort:
    return TinyPort(torch.float64)


@pytest.fixture
def tiny_flow() -> TinyPort:
    return TinyPort(torch.float64, Prediction.FLOW)


@pytest.fixture
def read_late() -> Callable[..., list[str]]:
    """read_late(*ports): a list of the prompts that are read for the first time while one of their networks is open.

    Whatever reads them is loaded then, which no memory estimate counts; what was read before is only looked up.
    """

    def watch(*ports: TinyPort) -> list[str]:
        opened: list[TrainableModel] = []
        known: set[str] = set()
        late: list[str] = []

        def watched(port: TinyPort) -> None:
            text, trainable = port.text, port.trainable

            def reading(prompts: Sequence[str]) -> list[TextStates]:
                if any(model._hooks for model in opened):
                    late.extend(x for x in prompts if x not in known)
                known.update(prompts)
                return text(prompts)

            def opening() -> TrainableModel:
                opened.append(trainable())
                return opened[-1]

            port.text, port.trainable = reading, opening  # type: ignore[method-assign]

        for port in ports:
            watched(port)
        return late

    return watch


class TypingPort(TinyPort):
    """A tiny port whose text side is a real text encoder over forty words: start 0, end 1, padding 2, unknown words 3."""

    WORDS = ("<start>", "<end>", "<pad>", "<unknown>", "a", "cat", "kitty", "dog", "tree", "thing", "photo", "of", "one",
             "here", "puss", "gato", "feline", "mouser", *(f"odd{i}" for i in range(22)))  # fmt: skip
    LENGTH = 10

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__(dtype)
        torch.manual_seed(100 + seed)
        config = TextConfig(16, 2, 2, vocabulary=len(self.WORDS), length=self.LENGTH)
        self.encoder = TextEncoder(config).to(dtype).requires_grad_(False)
        self.passes, self.encoded = [0], [0]
        self.encoder.register_forward_hook(lambda *_: self.encoded.__setitem__(0, self.encoded[0] + 1))

    @classmethod
    def erased(cls, dtype: torch.dtype = torch.float32) -> TypingPort:
        """One whose values of text are off."""
        port = cls(dtype)
        generator = torch.Generator().manual_seed(8)
        for site in port.sites():
            if site.role == "text_value":
                weight = port.unet.get_submodule(site.name).weight
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator).to(weight))
        return port

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        rows = []
        for prompt in prompts:
            ids = [self.WORDS.index(w) if w in self.WORDS else 3 for w in prompt.lower().split()][: self.LENGTH - 2]
            ids = [3 if i < 4 else i for i in ids]
            rows.append([0, *ids, 1, *[2] * (self.LENGTH - 2 - len(ids))])
        return torch.tensor(rows)

    def words_of(self) -> Words:
        def decode(ids: Sequence[int]) -> str:
            return " ".join(self.WORDS[i] for i in ids if i > 3)

        return Words.typeable(self.encoder, self.tokenize, decode, 0, 1, len(self.WORDS))

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        rows = self.tokenize(prompts)
        kinds = [token_kinds(ids, bos=0, eos=1) for ids in rows.tolist()]
        return [TextStates(p, s, k) for p, s, k in zip(prompts, self.encoder(rows), kinds, strict=True)]

    def trainable(self) -> TrainableModel:
        model = super().trainable()
        model.net.register_forward_pre_hook(lambda *_: self.passes.__setitem__(0, self.passes[0] + 1))
        return model

    def untouched(self) -> bool:
        for replica in self.replicas:
            replica._forward_pre_hooks.clear()  # the counter
        return super().untouched()


@pytest.fixture
def typing() -> type[TypingPort]:
    return TypingPort
