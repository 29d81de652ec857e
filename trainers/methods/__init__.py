"""The ways of fine-tuning, one file a kind."""

from trainers import backbones, data, optimizers
from trainers.config import import_submodules

__all__ = ["backbones", "data", "optimizers"]

import_submodules(__name__, __path__)
