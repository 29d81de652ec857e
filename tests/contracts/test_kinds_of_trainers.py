from pathlib import Path

import pytest

import trainers.methods  # noqa: F401, registers the kinds
from trainers.backbone import BackboneConfig
from trainers.face import FaceConfig
from trainers.method import MethodConfig
from trainers.optim import OptimizerConfig

TESTS = Path(__file__).parents[1] / "trainers"


@pytest.mark.parametrize(
    ("folder", "contract", "kinds"),
    [
        ("methods", "MethodContract", MethodConfig.kinds()),
        ("backbones", "BackboneContract or UnetContract", BackboneConfig.kinds()),
        ("optimizers", "OptimizerContract", OptimizerConfig.kinds()),
        ("faces", "FaceContract", FaceConfig.kinds()),
    ],
)
def test_every_kind_inherits_its_contract(folder, contract, kinds):
    for kind in kinds:
        text = (TESTS / folder / f"test_{kind}.py").read_text(encoding="utf-8")
        assert any(f"({one})" in text for one in contract.split(" or ")), kind
