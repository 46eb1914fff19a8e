"""Raw results without the paths of the machine they were made on.

portable(log, WORK=work)      # the given folders, the repository, site-packages, home and the temporary folder get names
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def portable(text: str, **folders: Path | str) -> str:
    """`text`, plain or JSON, with each folder's path replaced by its name; then REPOSITORY, site-packages, HOME and TMP."""
    text = re.sub(r"/[^\s\"'=(:\\]*/(?=site-packages/)", "", text)
    places = {**folders, "REPOSITORY": ROOT, "HOME": Path.home(), "TMP": tempfile.gettempdir()}
    for name, folder in places.items():
        text = re.sub(rf"(?:(?<![\w.])|(?<=\\[nt])){re.escape(str(folder))}(?=[/\s\"'\\,:;)]|$)", name, text)
    return text
