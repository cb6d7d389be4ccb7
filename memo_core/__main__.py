"""`python -m memo_core`: the `memo` command where it is not installed, as inside ComfyUI's custom_nodes."""

import sys

from .cli import main

sys.exit(main())
