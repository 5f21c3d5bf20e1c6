"""The words of nano's world, without torch or images.

They are those of its training code. The words that a set of weights knows are in its klein.json.
"""

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

SCENES = ("grass", "desert", "ocean", "night", "snow", "sunset", "clouds", "room", "beach", "forest", "space", "city")
"""The painted backgrounds, by the word each is known under here."""

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
    "lion": "LION FACE",
    "tiger": "TIGER",
    "monkey": "MONKEY",
    "gorilla": "GORILLA",
    "wolf": "WOLF FACE",
    "fox": "FOX FACE",
    "raccoon": "RACCOON",
    "cow": "COW",
    "sheep": "SHEEP",
    "camel": "BACTRIAN CAMEL",
    "giraffe": "GIRAFFE FACE",
    "rhino": "RHINOCEROS",
    "mouse": "MOUSE",
    "rabbit": "RABBIT",
    "squirrel": "CHIPMUNK",
    "hedgehog": "HEDGEHOG",
    "bat": "BAT",
    "bear": "BEAR FACE",
    "koala": "KOALA",
    "panda": "PANDA FACE",
    "kangaroo": "KANGAROO",
    "rooster": "ROOSTER",
    "eagle": "EAGLE",
    "swan": "SWAN",
    "owl": "OWL",
    "flamingo": "FLAMINGO",
    "peacock": "PEACOCK",
    "parrot": "PARROT",
    "crocodile": "CROCODILE",
    "lizard": "LIZARD",
    "snake": "SNAKE",
    "dragon": "DRAGON",
    "dinosaur": "SAUROPOD",
    "dolphin": "DOLPHIN",
    "shark": "SHARK",
    "bee": "HONEYBEE",
    "ladybug": "LADY BEETLE",
    "spider": "SPIDER",
    "scorpion": "SCORPION",
    "unicorn": "UNICORN FACE",
    "zebra": "ZEBRA FACE",
    "deer": "DEER",
    "lobster": "LOBSTER",
    "squid": "SQUID",
    "rose": "ROSE",
    "tulip": "TULIP",
    "palm": "PALM TREE",
    "pine": "EVERGREEN TREE",
    "clover": "FOUR LEAF CLOVER",
    "leaf": "MAPLE LEAF",
    "grapes": "GRAPES",
    "melon": "MELON",
    "watermelon": "WATERMELON",
    "lemon": "LEMON",
    "mango": "MANGO",
    "peach": "PEACH",
    "pear": "PEAR",
    "cherry": "CHERRIES",
    "kiwi": "KIWIFRUIT",
    "tomato": "TOMATO",
    "coconut": "COCONUT",
    "avocado": "AVOCADO",
    "eggplant": "AUBERGINE",
    "potato": "POTATO",
    "corn": "EAR OF MAIZE",
    "pepper": "HOT PEPPER",
    "cucumber": "CUCUMBER",
    "broccoli": "BROCCOLI",
    "onion": "ONION",
    "bread": "BREAD",
    "croissant": "CROISSANT",
    "pretzel": "PRETZEL",
    "cheese": "CHEESE WEDGE",
    "egg": "EGG",
    "taco": "TACO",
    "sandwich": "SANDWICH",
    "popcorn": "POPCORN",
    "cookie": "COOKIE",
    "chocolate": "CHOCOLATE BAR",
    "lollipop": "LOLLIPOP",
    "coffee": "HOT BEVERAGE",
    "teapot": "TEAPOT",
    "beer": "BEER MUG",
    "wine": "WINE GLASS",
    "cupcake": "CUPCAKE",
    "pie": "PIE",
    "train": "STEAM LOCOMOTIVE",
    "taxi": "TAXI",
    "truck": "DELIVERY TRUCK",
    "ambulance": "AMBULANCE",
    "bicycle": "BICYCLE",
    "ship": "SHIP",
    "anchor": "ANCHOR",
    "castle": "EUROPEAN CASTLE",
    "tent": "TENT",
    "church": "CHURCH",
    "volcano": "VOLCANO",
    "key": "KEY",
    "lock": "LOCK",
    "hammer": "HAMMER",
    "sword": "DAGGER KNIFE",
    "shield": "SHIELD",
    "bell": "BELL",
    "drum": "DRUM WITH DRUMSTICKS",
    "trumpet": "TRUMPET",
    "violin": "VIOLIN",
    "piano": "MUSICAL KEYBOARD",
    "phone": "MOBILE PHONE",
    "television": "TELEVISION",
    "laptop": "PERSONAL COMPUTER",
    "bulb": "ELECTRIC LIGHT BULB",
    "candle": "CANDLE",
    "pencil": "PENCIL",
    "scissors": "BLACK SCISSORS",
    "box": "PACKAGE",
    "gift": "WRAPPED PRESENT",
    "basket": "BASKET",
    "bucket": "BUCKET",
    "chair": "CHAIR",
    "bed": "BED",
    "door": "DOOR",
    "window": "WINDOW",
    "ladder": "LADDER",
    "magnet": "MAGNET",
    "compass": "COMPASS",
    "globe": "EARTH GLOBE EUROPE-AFRICA",
    "hourglass": "HOURGLASS",
    "watch": "WATCH",
    "trophy": "TROPHY",
    "football": "AMERICAN FOOTBALL",
    "ball": "SOCCER BALL",
    "basketball": "BASKETBALL AND HOOP",
    "dice": "GAME DIE",
    "kite": "KITE",
    "teddy": "TEDDY BEAR",
    "sunglasses": "DARK SUNGLASSES",
    "shirt": "T-SHIRT",
    "dress": "DRESS",
    "sock": "SOCKS",
    "shoe": "ATHLETIC SHOE",
    "boot": "WOMANS BOOTS",
    "backpack": "SCHOOL SATCHEL",
    "handbag": "HANDBAG",
    "gem": "GEM STONE",
    "bone": "BONE",
    "skull": "SKULL",
    "pumpkin": "JACK-O-LANTERN",
    "alien": "EXTRATERRESTRIAL ALIEN",
    "moon": "CRESCENT MOON",
    "sun": "SUN WITH FACE",
    "cloud": "CLOUD",
    "rainbow": "RAINBOW",
    "snowflake": "SNOWFLAKE",
    "fire": "FIRE",
    "drop": "DROPLET",
    "lightning": "HIGH VOLTAGE SIGN",
    "planet": "RINGED PLANET",
    "palette": "ARTIST PALETTE",
    "coin": "COIN",
    "bomb": "BOMB",
}
"""Noun -> the Unicode name of the emoji that stands for it."""

UNCOUNTED = frozenset(
    (
        *("grapes", "scissors", "sunglasses", "corn", "bread", "popcorn", "cheese", "coffee", "beer", "wine"),
        *("broccoli", "fire", "lightning", "chocolate", "dice"),
    )
)
"""Nouns without an article, a plural or a number before them."""

_IRREGULAR = {
    "mouse": "mice",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "squid": "squid",
    "wolf": "wolves",
    "leaf": "leaves",
    "octopus": "octopuses",
    "cactus": "cactuses",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "snowman": "snowmen",
}


def plural(noun: str) -> str:
    """Return the plural of a noun or shape, if it is counted."""
    if noun in UNCOUNTED:
        return noun
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


COUNTS = ("two", "three", "four")
"""How many of a kind can be asked for, from two on."""

_OTHER_WORDS = """
    a above add against among an and around at away background beach below beside between big bigger bottom bring by
    center change city color corner corners delete desert disappear down draw drawing drop each enlarge erase field
    floor for forest from front get give grass group huge image in inside into it large larger left little make me
    meadow middle move near next night object ocean of on one other out outer over paint painting pair photo picture
    place plain please put remove replace rid right room row sand scene sea set shift shore show shrink side sitting
    sky small smaller snow some space standing stars street sunset swap take the tiny to top town trees turn under
    underneath up use winter with within woods
"""
"""Every other word of the training sentences."""


def known(nouns: int = len(NOUNS)) -> frozenset[str]:
    """Return every word of the training sentences.

    nouns: how many of NOUNS they are about, the first ones.
    """
    things = (*tuple(NOUNS)[:nouns], *SHAPES)
    return frozenset((*things, *map(plural, things), *COLOURS, *COUNTS, *_OTHER_WORDS.split()))
