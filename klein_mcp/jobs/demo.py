"""The warning that auto took the embedded demo model."""

from collections.abc import Sequence

from engine.contract import KnownModel
from engine.families.klein.variants import AUTO_ORDER, EMBEDDED

DEMO = "demo model; klein-mcp pull klein-4b for the real one"

UNUSED = "is installed but was not used; klein-mcp models says why"


def demo_warning(models: Sequence[KnownModel]) -> str:
    """Return the way to a real model: a pull, or a repair."""
    real = {model.name: model for model in models if model.path and model.name != EMBEDDED}
    for name in AUTO_ORDER:
        if name in real:
            obstacle = real[name].obstacle.rstrip(".")
            why = f"is installed but {obstacle}; klein-mcp doctor has the next step" if obstacle else UNUSED
            return f"demo model; {name} {why}"
    return DEMO
