"""Puts the repository's root on the path: the toolkit is flat scripts, not an installed package.

And this interpreter's folder on the PATH, whatever the shell: with another `ninja` every worker that uses DeepSpeed without
compiled_ops.py would compile its ops again.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
