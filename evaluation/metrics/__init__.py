"""Metrics, one file per kind or group of kinds."""

from trainers.config import import_submodules

import_submodules(__name__, __path__)
