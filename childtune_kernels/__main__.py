"""`python -m childtune_kernels` is the `childtune` command."""

import sys

from .cli import main

sys.exit(main())
