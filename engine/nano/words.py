"""The words nano was trained on, to recognise a prompt beyond them.

This module imports no torch and reads no images.
"""

import re

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 170, 70),
    "cyan": (70, 205, 220),
    "blue": (45, 90, 220),
    "purple": (130, 60, 190),
    "pink": (250, 150, 190),
    "brown": (130, 85, 50),
    "gray": (140, 140, 145),
    "white": (248, 248, 248),
    "black": (25, 25, 28),
}

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "ring", "cross")

SCENES = ("grass", "desert", "ocean", "night", "snow", "sunset")
"""The drawn backgrounds, by the word each is known under here."""

NOUNS: dict[str, str] = {
    "cat": "CAT",
    "dog": "DOG",
    "rocket": "ROCKET",
    "car": "AUTOMOBILE",
    "apple": "RED APPLE",
    "banana": "BANANA",
    "tree": "DECIDUOUS TREE",
    "house": "HOUSE BUILDING",
    "fish": "FISH",
    "bird": "BIRD",
    "horse": "HORSE",
    "elephant": "ELEPHANT",
    "frog": "FROG FACE",
    "pig": "PIG",
    "duck": "DUCK",
    "snail": "SNAIL",
    "turtle": "TURTLE",
    "penguin": "PENGUIN",
    "butterfly": "BUTTERFLY",
    "octopus": "OCTOPUS",
    "whale": "WHALE",
    "crab": "CRAB",
    "carrot": "CARROT",
    "pizza": "SLICE OF PIZZA",
    "cake": "BIRTHDAY CAKE",
    "strawberry": "STRAWBERRY",
    "pineapple": "PINEAPPLE",
    "mushroom": "MUSHROOM",
    "burger": "HAMBURGER",
    "donut": "DOUGHNUT",
    "bus": "BUS",
    "tractor": "TRACTOR",
    "helicopter": "HELICOPTER",
    "airplane": "AIRPLANE",
    "sailboat": "SAILBOAT",
    "umbrella": "UMBRELLA",
    "clock": "ALARM CLOCK",
    "book": "CLOSED BOOK",
    "guitar": "GUITAR",
    "camera": "CAMERA",
    "crown": "CROWN",
    "hat": "TOP HAT",
    "balloon": "BALLOON",
    "cactus": "CACTUS",
    "flower": "SUNFLOWER",
    "snowman": "SNOWMAN WITHOUT SNOW",
    "robot": "ROBOT FACE",
    "ghost": "GHOST",
}
"""Noun -> the Unicode name of the emoji that stands for it."""

_SENTENCE_WORDS = """
    a add an and against at away background beside below between bigger big bottom bring by center change color corner
    delete desert disappear down draw drawing enlarge erase field for from front get give grass huge image in into it
    large larger left little make meadow middle move near next night object ocean of on over above paint painting
    photo picture place plain please put remove replace rid right row sand scene sea set shift show me shrink side sky
    small smaller snow stars sunset swap take the tiny to top turn under up use winter with
"""
"""Every other word of the sentences nano was trained on."""

KNOWN = frozenset((*NOUNS, *SHAPES, *COLOURS, *_SENTENCE_WORDS.split()))

_WORD = re.compile(r"[^\W\d_]+")


def unknown(prompt: str) -> list[str]:
    """Return the prompt's words that nano was never trained on, without repeats.

    They come in the order of the prompt.
    """
    words = (word.lower() for word in _WORD.findall(prompt))
    return list(dict.fromkeys(word for word in words if word not in KNOWN))
