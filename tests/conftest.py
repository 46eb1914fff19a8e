"""Puts the repository's root on the path: the toolkit is flat scripts, not an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
