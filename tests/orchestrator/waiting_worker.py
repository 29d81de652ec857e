"""A rank that waits, watched over as the real worker is."""

import os
import sys
import time
from pathlib import Path

from orchestrator.worker import _die_with_parent

if __name__ == "__main__":
    _die_with_parent()
    (Path(sys.argv[1]) / f"pid{os.getpid()}").touch()
    time.sleep(600)
