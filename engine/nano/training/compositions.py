"""Compositions of several scenes: the sentence, and the scene it asks for."""

from dataclasses import dataclass

from engine.nano.training.frames import Slot
from engine.nano.training.phrases import Phrases
from engine.nano.training.scenes import CORNERS, NORMAL, ROW, SMALL, Scene, Thing, World, nested, valid, visible

_TRANSPLANTS = ("image {} on the background of image {}", "image {} with the background from image {}",
                "image {} with the background of image {}", "put image {} on the background of image {}",
                "use image {} with the background from image {}",
                "use image {} and put it on the background of image {}",
                "use image {} in front of the background of image {}")  # fmt: skip
_BORROWED = ("on the background of image {}", "on the background from image {}", "with the background of image {}",
             "with the background from image {}")  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """A sentence, the scene it asks for, and the scenes it numbers."""

    sentence: str
    target: Scene
    references: tuple[Scene, ...]


class Compositions:
    """Draws compositions of scenes. Parts that do not go together give None."""

    def __init__(self, world: World, phrases: Phrases) -> None:
        self.world = world
        self.phrases = phrases
        self.random = world.random
        self.pick = world.random.choice

    def draw(self, references: int | None = None) -> Composition | None:
        """Draw a composition of parts of two to four references."""
        references = references or self.random.choices((2, 3, 4), (0.7, 0.2, 0.1))[0]
        if references == 2 and self.world.chance(0.3):
            return self._transplant()
        if references > 2 and self.world.chance(0.5):
            return self._assemble(references)
        return self._gather(references)

    def _transplant(self) -> Composition | None:
        """Put all of image 1 on image 2's background, or the reverse."""
        references = (self.world.scene(), self.world.scene())
        content = self.random.randrange(2)
        ground = references[1 - content].background
        things = references[content].things
        if ground == references[content].background or not all(visible(thing.kind, ground) for thing in things):
            return None
        if nested(references[content]) and not visible(things[1].kind, things[0].colour or 0):
            return None
        sentence = self.pick(_TRANSPLANTS).format(content + 1, 2 - content)
        return Composition(sentence, Scene(ground, things), references)

    def _gather(self, count: int) -> Composition | None:
        """Put things of two references on a new or given background."""
        references = tuple(self.world.scene() for _ in range(count))
        own = self.random.randrange(-1, count) if count == 2 else count - 1
        ground = self.world.background() if own < 0 else references[own].background
        chosen, names = self._chosen(references, self.random.sample(range(max(2, count - 1)), 2))
        if len({*chosen}) < 2 or not all(visible(kind, ground) for kind in chosen):
            return None
        first: Slot = (-1, 0) if self.world.chance(0.7) else (0, -1)
        things = (Thing(chosen[0], NORMAL, first), Thing(chosen[1], NORMAL, (-first[0], -first[1])))
        content = self.phrases.beside(first, *names)
        return self._placed(content, own, Scene(ground, things), references)

    def _assemble(self, count: int) -> Composition | None:
        """Put one thing of each reference together, in a row or corners.

        count: three or four references.
        """
        references = tuple(self.world.scene() for _ in range(count))
        own = self.random.randrange(-1, count)
        ground = self.world.background() if own < 0 else references[own].background
        chosen, names = self._chosen(references, self.random.sample(range(count), count))
        if len({*chosen}) < count or not all(visible(kind, ground) for kind in chosen):
            return None
        if count == 3:
            things = tuple(Thing(kind, SMALL, slot) for kind, slot in zip(chosen, ROW, strict=True))
            content = self.phrases.in_row(names)
        else:
            things = tuple(Thing(kind, NORMAL, slot) for kind, slot in zip(chosen, CORNERS, strict=True))
            content = self.phrases.in_corners(names)
        return self._placed(content, own, Scene(ground, things), references)

    def _chosen(self, references: tuple[Scene, ...], order: list[int]) -> tuple[list[int], list[str]]:
        """Return a thing's kind and its phrase from each reference.

        There are fewer of them where a reference is empty.
        """
        chosen, names = [], []
        for i in order:
            scene = references[i]
            if (j := self.world.one_of(scene)) is None:
                continue
            thing = scene.things[j]
            alone = len(scene.things) == 1
            unique = sum(other.kind == thing.kind for other in scene.things) == 1
            # Of two alike, either will do.
            name = self.phrases.the(thing, scene) if unique else f"the {thing.name}"
            name = "the object" if alone and self.world.chance(0.15) else name
            names.append(f"{name} {self.pick(('from', 'from', 'of', 'in'))} image {i + 1}")
            chosen.append(thing.kind)
        return chosen, names

    def _placed(self, content: str, own: int, target: Scene, references: tuple[Scene, ...]) -> Composition | None:
        """Name the background: a new one, or that of reference `own`."""
        if not valid(target, self.world.frame):
            return None
        setting = self.phrases.setting(target.background) if own < 0 else self.pick(_BORROWED).format(own + 1)
        return Composition(f"{content} {setting}", target, references)
