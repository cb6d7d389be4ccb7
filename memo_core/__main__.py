"""`python -m memo_core`, or `python .../memo_core/__main__.py`: the `memo` command where it is not installed.

As inside ComfyUI's custom_nodes.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if __package__:
        from .cli import main

        sys.exit(main())
    folder = Path(__file__).resolve().parent  # run as a file: Python does not know yet that this is a package
    sys.path.insert(0, str(folder.parent))
    runpy.run_module(folder.name, run_name="__main__", alter_sys=True)
