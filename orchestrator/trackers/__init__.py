"""Kinds of trackers; a module in this folder is all that a new one needs."""

from trainers.config import import_submodules

import_submodules(__name__, __path__)
