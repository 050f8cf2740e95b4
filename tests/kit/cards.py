"""The code in the README.md of an adapter folder, run as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dlora.config.run import Config


def loaded_by_card(config: Config, folder: Path) -> Any:
    """The model that the code makes."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"base": config.model, "folder": str(folder)}
    exec(code, names)
    return names["model"].eval()
