"""Phrases for the things, places and backgrounds of a scene."""

from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.frames import Slot
from engine.nano.training.scenes import (
    BIG,
    COLUMN,
    CORNERS,
    MIDDLE,
    ROW,
    SMALL,
    Scene,
    Thing,
    World,
    nested,
)
from engine.nano.words import COLOURS, COUNTS, UNCOUNTED, plural

OPENINGS = ("", "", "", "a picture of", "a photo of", "an image of", "a drawing of", "draw", "show me", "paint", "make",
            "please draw", "a painting of")  # fmt: skip

PLACES: dict[Slot, tuple[str, ...]] = {
    (-1, 0): ("on the left", "at the left", "on the left side"),
    (1, 0): ("on the right", "at the right", "on the right side"),
    (0, -1): ("at the top", "near the top", "in the top"),
    (0, 1): ("at the bottom", "near the bottom", "in the bottom"),
    (-1, -1): ("in the top left", "in the top left corner", "at the top left"),
    (1, -1): ("in the top right", "in the top right corner", "at the top right"),
    (-1, 1): ("in the bottom left", "in the bottom left corner", "at the bottom left"),
    (1, 1): ("in the bottom right", "in the bottom right corner", "at the bottom right"),
    MIDDLE: ("in the middle", "in the center", "at the center"),
}

_FLAT = ("on a {} background", "on {}", "against a {} background", "with a {} background",
         "in front of a {} background", "on a plain {} background")  # fmt: skip
_SETTINGS = {
    "grass": ("on the grass", "in a meadow", "on a grass field", "in the field"),
    "desert": ("in the desert", "in a desert", "on the sand"),
    "ocean": ("in the ocean", "on the ocean", "at sea", "on the sea"),
    "night": ("at night", "under the stars", "in the night sky"),
    "snow": ("in the snow", "in winter", "on the snow"),
    "sunset": ("at sunset", "in the sunset", "in front of a sunset"),
    "clouds": ("in the sky", "in the blue sky", "up in the sky", "against the sky"),
    "room": ("in a room", "in the room", "on the floor of a room", "inside a room"),
    "beach": ("on the beach", "at the beach", "on a beach", "at the shore"),
    "forest": ("in the forest", "in a forest", "in the woods", "among trees"),
    "space": ("in space", "in outer space", "out in space", "in front of space"),
    "city": ("in the city", "in a city", "in town", "on a street", "in front of a city"),
}
_NAMES = {
    "grass": ("grass", "a meadow"),
    "desert": ("a desert", "the desert"),
    "ocean": ("the ocean", "the sea"),
    "night": ("the night sky", "night"),
    "snow": ("snow", "winter"),
    "sunset": ("a sunset", "the sunset"),
    "clouds": ("the sky", "a blue sky"),
    "room": ("a room", "the room"),
    "beach": ("a beach", "the beach"),
    "forest": ("a forest", "the forest", "the woods"),
    "space": ("space", "outer space"),
    "city": ("a city", "the city", "a street"),
}
_SIZES = {SMALL: ("small", "tiny", "little"), BIG: ("big", "large", "huge")}

_BESIDE = {
    (-1, 0): ("{a} to the left of {b}", "{a} left of {b}", "{a} next to {b}", "{a} beside {b}", "{a} and {b}",
              "{b} to the right of {a}", "{b} right of {a}", "{a} on the left and {b} on the right",
              "{b} on the right and {a} on the left", "{a} on the left of {b}", "{b} on the right of {a}"),
    (0, -1): ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{a} on top of {b}",
              "{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top", "{a} on {b}",
              "{b} with {a} on top", "{a} standing on {b}", "{a} sitting on {b}", "{b} underneath {a}"),
}  # fmt: skip
_ROWS = ("{a}, {b} and {c} in a row", "{a}, {b} and {c}", "{a} on the left, {b} in the middle and {c} on the right",
         "from left to right {a}, {b} and {c}", "{b} between {a} and {c}")  # fmt: skip
_COLUMNS = ("{a}, {b} and {c} from top to bottom", "from top to bottom {a}, {b} and {c}",
            "{a} above {b} and {b} above {c}", "{a} at the top, {b} in the middle and {c} at the bottom")  # fmt: skip
_FOURS = ("{a}, {b}, {c} and {d}", "{a}, {b}, {c} and {d} in the corners", "in the corners {a}, {b}, {c} and {d}",
          "{a} and {b} above {c} and {d}", "{a} and {b} at the top, {c} and {d} at the bottom",
          "{c} and {d} below {a} and {b}")  # fmt: skip
_GROUPS = ("{}", "{}", "a group of {}")
_GROUP_PLACES: dict[tuple[Slot, ...], tuple[str, ...]] = {
    ((-1, 0), (1, 0)): ("", "", " side by side", " next to each other"),
    ROW: ("", "", " in a row", " side by side"),
    CORNERS: ("", "", " in the corners", ", one in each corner"),
}
_INSIDE = ("{a} inside {b}", "{a} in {b}", "{b} with {a} inside", "{b} with {a} in it", "{a} within {b}",
           "{b} around {a}", "{a} in the middle of {b}")  # fmt: skip


def article(phrase: str) -> str:
    """Return the phrase with its article, if its noun has one."""
    if phrase.rpartition(" ")[2] in UNCOUNTED:
        return phrase
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("uni") else "a ") + phrase


def _unique(thing: Thing, scene: Scene) -> str:
    """Name a thing so that no other of the scene is meant.

    The shape alone where only one thing has it.
    """
    alike = [other for other in scene.things if other.shape == thing.shape]
    return thing.shape if thing.shape and len(alike) == 1 else thing.name


class Phrases:
    """Puts scenes into words, drawn from the same seed as the scenes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pick = world.random.choice

    def thing(self, thing: Thing) -> str:
        """Return "a small red star"."""
        size = f"{self.pick(_SIZES[thing.size])} " if thing.size in _SIZES else ""
        return self.named(size + thing.name)

    def named(self, phrase: str) -> str:
        """Return an indefinite phrase.

        Now and then "some" or "one" stands for the article.
        """
        if phrase.rpartition(" ")[2] in UNCOUNTED:
            return f"some {phrase}" if self.world.chance(0.3) else phrase
        return f"one {phrase}" if self.world.chance(0.04) else article(phrase)

    def the(self, thing: Thing, scene: Scene) -> str:
        """Return a definite phrase for a thing that a reference shows."""
        if any(other.kind == thing.kind and other is not thing for other in scene.things):
            return f"the {thing.name} {self.pick(PLACES[thing.slot])}"
        short = _unique(thing, scene)
        name = thing.name if self.world.chance(0.5) else short
        return f"the {name} {self.pick(PLACES[thing.slot])}" if self.world.chance(0.06) else "the " + name

    def background(self, background: int) -> str:
        """Return a painted background's name: "the desert"."""
        return self.pick(_NAMES[BACKGROUNDS[background]])

    def setting(self, background: int) -> str:
        """Return where a background puts things: "on the sand"."""
        name = BACKGROUNDS[background]
        return self.pick(_FLAT).format(name) if name in COLOURS else self.pick(_SETTINGS[name])

    def beside(self, slot: Slot, first: str, second: str) -> str:
        """Describe two things, the first in `slot`, the other opposite."""
        return self.pick(_BESIDE[slot]).format(a=first, b=second)

    def in_row(self, names: list[str]) -> str:
        return self.pick(_ROWS).format(**dict(zip("abc", names, strict=True)))

    def in_column(self, names: list[str]) -> str:
        return self.pick(_COLUMNS).format(**dict(zip("abc", names, strict=True)))

    def in_corners(self, names: list[str]) -> str:
        return self.pick(_FOURS).format(**dict(zip("abcd", names, strict=True)))

    def content(self, scene: Scene) -> str:
        """Describe the things of a scene and their places, without the background."""
        things = scene.things
        slots = tuple(thing.slot for thing in things)
        if len(things) > 1 and len({(thing.kind, thing.size) for thing in things}) == 1 and slots in _GROUP_PLACES:
            return self._group(scene)
        if nested(scene):
            big = f"{self.pick(_SIZES[BIG])} " if self.world.chance(0.3) else ""
            small = f"{self.pick(_SIZES[SMALL])} " if self.world.chance(0.3) else ""
            outer, inner = scene.things
            inner, outer = article(small + inner.name), article(big + outer.name)
            return self.pick(_INSIDE).format(a=inner, b=outer)
        if slots in (ROW, COLUMN) and all(thing.size == SMALL for thing in things):
            # Three only fit when small, so that the size goes without saying.
            names = [self.named(thing.name) for thing in things]
            return self.in_row(names) if slots == ROW else self.in_column(names)
        names = [self.thing(thing) for thing in things]
        if slots == CORNERS and self.world.chance(0.7):
            return self.in_corners(names)
        if len(names) == 2 and slots[0] in _BESIDE and slots[1] == (-slots[0][0], -slots[0][1]):
            return self.beside(slots[0], *names)
        places = [self.pick(PLACES[slot]) for slot in slots]
        if len(names) == 1:
            unsaid = slots[0] == MIDDLE and self.world.chance(0.7)
            return names[0] if unsaid else f"{names[0]} {places[0]}"
        phrases = [f"{name} {place}" for name, place in zip(names, places, strict=True)]
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    def _group(self, scene: Scene) -> str:
        """Return "three small stars"."""
        thing, count = scene.things[0], len(scene.things)
        # A row is always small, so that the size may be left out.
        sized = thing.size == SMALL and (count != 3 or self.world.chance(0.7))
        number = "a pair of" if count == 2 and self.world.chance(0.15) else COUNTS[count - 2]
        size = f"{self.pick(_SIZES[SMALL])} " if sized else ""
        *colour, noun = thing.name.split(" ")
        things = f"{number} {size}{' '.join((*colour, plural(noun)))}"
        return self.pick(_GROUPS).format(things) + self.pick(_GROUP_PLACES[tuple(t.slot for t in scene.things)])

    def finish(self, sentence: str) -> str:
        """Capitals and full stops come and go, as people type."""
        if self.world.chance(0.7):
            sentence = sentence.replace("a orange", "an orange")
        if self.world.chance(0.25):
            sentence = sentence[0].upper() + sentence[1:]
        return sentence + "." if self.world.chance(0.2) else sentence

    def describe(self, scene: Scene) -> str:
        """Return a whole prompt for a scene."""
        content, setting = self.content(scene), self.setting(scene.background)
        opening = self.pick(OPENINGS)
        if self.world.chance(0.15):
            return f"{setting}, {content}"
        return f"{opening} {content}{self.pick((' ', ' ', ' ', ', '))}{setting}".strip()
