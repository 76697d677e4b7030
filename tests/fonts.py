"""A free font, in place of the one that IXC's checkpoints hold."""

from __future__ import annotations

from pathlib import Path

import matplotlib

FREE_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
