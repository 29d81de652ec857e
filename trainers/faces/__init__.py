"""Face embedders, one file a kind."""

from trainers.config import import_submodules

import_submodules(__name__, __path__)
