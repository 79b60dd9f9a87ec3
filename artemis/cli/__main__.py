"""`python -m artemis.cli`, the same as the `artemis` command."""

import sys

from . import main

sys.exit(main())
