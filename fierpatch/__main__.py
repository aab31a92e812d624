"""``python -m fierpatch`` is the ``fierpatch`` command."""

from __future__ import annotations

import sys

from fierpatch.cli import main

sys.exit(main())
