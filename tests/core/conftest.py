"""Small models and requests that the core tests share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from erasure_core import ConceptSpec, Family, Prediction, Site, TextStates
from erasure_core.analytic import AnalyticPort
from erasure_core.emojicanvas.model import sites_of
from erasure_core.emojicanvas.unet import UNet, UNetConfig
from erasure_core.operators.trainable import Cond, TrainableModel
from erasure_core.schedule import Schedule

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
