"""`python -m robustft_kernels` is the command `robustft`."""

import sys

from .command.entry import main

sys.exit(main())
