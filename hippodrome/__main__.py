"""`python -m hippodrome`."""

import sys

from hippodrome.cli import main

sys.exit(main())
