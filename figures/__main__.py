"""`python -m figures [FOLDER]`: draws all figures, into `docs/` where no folder is named."""

import sys
from pathlib import Path

from figures import FIGURES, FOLDER

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, draw in FIGURES.items():
        (folder / name).write_text(draw())
