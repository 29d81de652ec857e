import sys
from types import SimpleNamespace

import pytest
import torch

from tests.contracts.optimizer import OptimizerContract
from trainers.errors import ConfigError
from trainers.optimizers.adamw8bit import AdamW8bit


@pytest.mark.gpu
class TestAdamW8bit(OptimizerContract):
    @pytest.fixture(autouse=True)
    def _accelerator(self):
        pytest.importorskip("bitsandbytes")
        if not torch.cuda.is_available():
            pytest.skip("no accelerator")
        with torch.device("cuda"):
            yield

    @pytest.fixture
    def config(self):
        return AdamW8bit(lr=0.1)


@pytest.fixture
def library(monkeypatch):
    """What the package's optimizer would be given, without its kernels."""
    calls = []
    stub = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=lambda groups, **options: calls.append((groups, options))))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stub)
    monkeypatch.setattr("trainers.optim.find_spec", lambda _: object())
    return calls


def test_settings_are_passed_on(library):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1, device="meta"))], "lr": 0.5}]
    AdamW8bit(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3).build(groups)
    assert library == [(groups, {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3})]


def test_weights_on_a_cpu_are_refused(library):
    with pytest.raises(ConfigError, match="needs an accelerator and this is a CPU"):
        AdamW8bit().build([{"params": [torch.nn.Parameter(torch.zeros(1))]}])


def test_the_installed_package_takes_these_settings():
    library = pytest.importorskip("bitsandbytes")
    optimizer = library.optim.AdamW8bit(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5}],
        lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.5
