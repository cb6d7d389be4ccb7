"""`python -m memo_core`, or `python .../memo_core/__main__.py`: the `memo` command where it is not installed, as inside
ComfyUI's custom_nodes."""

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then looks for modules beside it, if at all
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memo_core.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
