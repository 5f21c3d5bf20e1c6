"""Installed models, as a front end knows them before any engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from engine.contract import KnownModel
from engine.families.klein.variants import AUTO_ORDER, EMBEDDED, VARIANTS
from klein_mcp.jobs.demo import UNUSED
from klein_mcp.jobs.service import Service
from klein_mcp.jobs.timing import latest_auto
from klein_mcp.settings import Settings


@dataclass(frozen=True, slots=True)
class InstalledModels:
    """Models that the engine can use.

    names: installed variants, in the order of VARIANTS; empty while unknown, as of an engine on another machine.
    auto: the model that auto takes, "" until the engine has weighed several against its memory.
    setting: the model of a call that names none: auto, a variant or a path.
    """

    names: tuple[str, ...]
    auto: str = ""
    setting: str = "auto"

    @classmethod
    def of(cls, names: Sequence[str], latest: str = "", setting: str = "auto") -> "InstalledModels":
        """Decide what auto takes, as far as it can be known.

        latest: the model it took last. Only a machine's memory decides between several.
        """
        candidates = [name for name in AUTO_ORDER if name in names]
        auto = EMBEDDED if names and not candidates else latest if latest in names else ""
        return cls(tuple(name for name in VARIANTS if name in names), auto, setting)

    @property
    def default(self) -> str:
        """The model of a call that names none, "" while unknown."""
        return self.auto if self.setting == "auto" else self.setting

    @property
    def max_references(self) -> int:
        """The most references that any of them takes."""
        return max(VARIANTS[name].max_references for name in self.names or VARIANTS)

    def limit(self, asked: str) -> tuple[str, int] | None:
        """Return the model meant by `asked` and its reference limit, if known."""
        name = self.auto if asked == "auto" else asked
        return (name, VARIANTS[name].max_references) if name in VARIANTS else None

    def summary(self) -> str:
        """Describe them in a sentence or two for an agent."""
        if not self.names:
            return "The models are on another machine: engine_status lists them once it runs."
        installed = f"Installed: {', '.join(self.names)}."
        if self.setting not in ("auto", *self.names):
            return f"{installed} A call uses {self.setting} unless it names a model."
        if not self.default:
            return f"{installed} auto takes the best that fits this machine's memory; the first image decides."
        row = VARIANTS[self.default]
        verb = "auto takes" if self.setting == "auto" else "A call uses"
        size = f"{row.native_size}×{row.native_size} by default, at most {row.max_references} references"
        demo = f", a demo that knows the few words of klein://guide; {self._better()}" if row.name == EMBEDDED else ""
        return f"{installed} {verb} {row.name}: {size}{demo}."

    def _better(self) -> str:
        """Return the way to a real model."""
        for name in AUTO_ORDER:
            if name in self.names:
                return f"{name} {UNUSED}" if self.setting == "auto" else f"{name} is there too"
        return "klein-mcp pull klein-4b gets the real model"

    def to_json(self, known: Sequence[KnownModel] = ()) -> dict[str, Any]:
        """Return what engine_status tells of them.

        known: the engine's own account, once it runs.
        """
        obstacles = {model.name: model.obstacle for model in known if model.obstacle}
        return {
            "installed": [
                {
                    "name": name,
                    "licence": VARIANTS[name].licence,
                    "size": VARIANTS[name].native_size,
                    "max_references": VARIANTS[name].max_references,
                    **({"obstacle": obstacles[name]} if name in obstacles else {}),
                }
                for name in self.names
            ],
            "auto": self.auto or None,
        }


def find(settings: Settings) -> InstalledModels:
    """Search this machine without an engine. Blocking."""
    from engine.search import ModelSearch

    if settings.engine:
        return InstalledModels((), setting=settings.model)
    names = ModelSearch.of(settings.engine_config()).names()
    return InstalledModels.of(names, latest_auto(settings.home), settings.model)


async def models_of(service: Service) -> InstalledModels:
    """Return the installed models. Never starts the engine."""
    settings = service.settings
    if not settings.engine:
        return await anyio.to_thread.run_sync(find, settings)
    status = await service.jobs.status()
    if status.engine is None:
        return InstalledModels((), setting=settings.model)
    names = [model.name for model in status.engine.models if model.path is not None]
    return InstalledModels.of(names, latest_auto(settings.home), settings.model)


async def installed_models(service: Service) -> list[str]:
    """Return the names of installed models, at least the embedded one."""
    return list((await models_of(service)).names) or [EMBEDDED]
