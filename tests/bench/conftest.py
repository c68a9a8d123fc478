"""``bench`` is no part of the package: it is found where the checkout begins."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
