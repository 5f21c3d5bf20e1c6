"""Spellings, synonyms and related nouns of words a small model may know.

No model is named here.
"""

SYNONYMS: dict[str, str] = {
    word: known
    for known, words in {
        # spelling
        "gray": "grey greyish grayish silver silvery slate",
        "color": "colour recolor recolour tint dye",
        "center": "centre",
        "middle": "centre center",
        "donut": "doughnut",
        "airplane": "aeroplane plane jet aircraft jumbo",
        # colours
        "red": "scarlet crimson ruby maroon vermilion reddish",
        "orange": "amber tangerine",
        "yellow": "gold golden lemon mustard yellowish",
        "green": "lime emerald olive mint greenish",
        "cyan": "turquoise teal aqua",
        "blue": "navy azure cobalt indigo bluish",
        "purple": "violet magenta lilac lavender mauve",
        "pink": "rose fuchsia salmon pinkish",
        "brown": "tan chestnut bronze chocolate",
        "white": "ivory cream snow-white",
        "black": "ebony jet-black",
        # things
        "cat": "kitten kitty feline",
        "dog": "puppy pup doggy hound",
        "car": "automobile auto sedan",
        "rocket": "spaceship spacecraft",
        "sailboat": "boat yacht ship",
        "ship": "boat vessel yacht",
        "rabbit": "bunny hare",
        "burger": "hamburger cheeseburger",
        "flower": "blossom bloom sunflower daisy",
        "horse": "pony stallion mare",
        "pig": "piglet hog",
        "bird": "birdie",
        "duck": "duckling mallard",
        "frog": "toad",
        "turtle": "tortoise",
        "mouse": "rat",
        "cow": "bull calf ox",
        "sheep": "lamb",
        "rooster": "chicken hen cock",
        "house": "home cottage cabin hut building",
        "cake": "gateau",
        "mushroom": "toadstool fungus",
        "hat": "cap tophat",
        "crown": "tiara",
        "book": "novel",
        "ghost": "spook",
        "robot": "android droid",
        "ring": "annulus",
        "circle": "disc disk dot ball",
        "ball": "football soccer",
        "square": "box block",
        "star": "asterisk",
        "cross": "plus",
        "diamond": "rhombus lozenge",
        "phone": "telephone smartphone cellphone mobile",
        "television": "tv",
        "laptop": "computer",
        "bicycle": "bike",
        "gift": "present",
        "gem": "jewel",
        "truck": "lorry",
        "taxi": "cab",
        "train": "locomotive",
        "bulb": "lightbulb",
        "corn": "maize",
        "eggplant": "aubergine",
        "crocodile": "alligator",
        # grounds
        "background": "backdrop scenery wall",
        "grass": "lawn turf",
        "ocean": "water",
        "night": "nighttime midnight",
        "snow": "snowy",
        "sunset": "dusk sundown evening",
        "street": "road",
        "room": "kitchen bedroom",
        "space": "cosmos galaxy universe",
        # sizes and places
        "big": "enormous giant gigantic massive",
        "bigger": "greater taller wider",
        "small": "mini miniature",
        "left": "left-hand lefthand",
        "right": "right-hand righthand",
        "top": "upper",
        "bottom": "lower",
        "corner": "edge",
        # verbs
        "remove": "eliminate discard omit",
        "delete": "drop",
        "add": "insert include",
        "move": "relocate push slide drag",
        "replace": "substitute exchange",
        "change": "switch alter convert transform modify",
        "paint": "repaint create generate render produce",
        "enlarge": "magnify scale-up grow",
        "shrink": "reduce minify",
        # kinds of image
        "photo": "photograph snapshot",
        "drawing": "sketch illustration icon logo cartoon doodle clipart emoji sticker sprite",
        "picture": "pic graphic artwork artworks",
    }.items()
    for word in words.split()
    if word != known
}
"""Word -> its synonyms, which are replaced by it. If a synonym has two words, the later one is used."""

ALTERNATIVES: dict[str, tuple[str, ...]] = {
    "boat": ("sailboat", "ship"),
    "ship": ("sailboat",),
    "yacht": ("sailboat", "ship"),
    "centre": ("center", "middle"),
    "football": ("ball", "circle"),
    "soccer": ("ball", "circle"),
    "ball": ("circle",),
    "box": ("square",),
    "rose": ("flower", "pink"),
    "tulip": ("flower",),
    "lemon": ("yellow",),
    "chocolate": ("brown",),
    "beach": ("sand", "desert"),
    "shore": ("beach", "sand", "desert"),
    "coast": ("beach", "sand", "desert"),
    "seaside": ("beach", "sand", "desert"),
    "lake": ("sea", "ocean"),
    "lawn": ("grass",),
    **dict.fromkeys(("forest", "woods", "woodland", "jungle", "rainforest"), ("forest", "meadow", "grass")),
    **dict.fromkeys(("park", "garden", "yard", "pasture", "prairie", "countryside"), ("meadow", "grass")),
    "water": ("ocean",),
}
"""Words that can be read in more than one way, nearest first."""

RELATED: dict[str, tuple[str, ...]] = {
    word: tuple(nouns.split())
    for words, nouns in {
        "astronaut cosmonaut alien": "alien robot rocket",
        "person people man woman boy girl child kid baby human portrait character figure hero princess prince king "
        "queen knight wizard witch pirate soldier doctor chef": "robot snowman ghost",
        "lion tiger leopard panther cheetah lynx": "lion tiger cat",
        "wolf fox coyote jackal": "wolf fox dog",
        "bear panda koala": "bear panda dog",
        "cow goat donkey zebra deer camel giraffe unicorn bull": "cow horse pig",
        "sheep lamb llama alpaca": "sheep horse pig",
        "rhino rhinoceros hippo mammoth": "rhino elephant",
        "chicken rooster hen goose swan turkey": "rooster duck bird",
        "eagle owl parrot crow raven pigeon seagull flamingo": "eagle owl bird",
        "shark dolphin orca seal": "shark dolphin whale fish",
        "salmon tuna trout goldfish": "fish",
        "squid jellyfish starfish lobster shrimp": "octopus crab",
        "snake lizard dragon dinosaur crocodile worm": "dragon snake turtle frog",
        "bee ladybug spider beetle ant insect fly moth dragonfly": "bee butterfly snail",
        "rabbit mouse squirrel hamster hedgehog": "rabbit mouse cat",
        "monkey gorilla ape chimpanzee": "monkey gorilla dog",
        "truck van taxi jeep limousine motorcycle motorbike scooter ambulance": "truck car bus tractor",
        "train tram subway bicycle": "train bus car",
        "ferry canoe raft submarine": "ship sailboat",
        "drone glider zeppelin satellite ufo": "helicopter airplane rocket",
        "castle tower church building skyscraper palace barn school shop tent": "castle house",
        "bush hedge forest pine palm oak plant fern": "tree flower cactus",
        "rose tulip lily orchid bouquet": "rose flower",
        "cherry peach tomato plum grapes pear orange lemon melon mango fruit": "cherry apple strawberry banana",
        "potato onion pepper cucumber vegetable": "carrot mushroom",
        "bread toast croissant pie cupcake cookie dessert icecream": "cake donut",
        "sandwich taco hotdog burrito pasta noodles": "burger pizza",
        "piano violin drum trumpet flute ukulele": "violin guitar",
        "phone laptop television computer radio tablet screen": "camera clock",
        "watch hourglass timer": "watch clock",
        "newspaper magazine letter notebook diary": "book",
        "sun moon planet globe": "sun moon circle star",
        "helmet beanie": "hat crown",
        "gem jewel ruby crystal": "gem diamond",
        "wheel hoop donutring bracelet necklace": "ring circle",
        "parasol tent-roof": "umbrella",
        "kite blimp": "balloon",
        "skeleton zombie monster vampire demon": "ghost robot",
    }.items()
    for word in words.split()
}
"""Noun -> related nouns, nearest first."""

_FILLERS = """
    very really quite rather just only simply slightly somewhat exactly precisely also now then nice beautiful pretty
    lovely cute adorable gorgeous stunning amazing shiny glossy matte fresh juicy ripe delicious tasty realistic
    detailed simple clean crisp sharp soft hard bright vivid dark pale warm cool single lone solid flat uniform
    entire whole existing current new some my your our its this that these those such kindly could you would can will
    want like need centred centered square-on high quality resolution hd highly isolated minimal minimalist minimalistic
    modern stylised stylized cartoonish photorealistic
"""
FILLERS = frozenset(_FILLERS.split())
"""Words without meaning for a small model. They are left out if the model does not know them."""

_NUMBERS = """
    two three four five six seven eight nine ten eleven twelve twenty hundred several many few some multiple
"""
NUMBERS = frozenset(_NUMBERS.split())
"""Words in place of an article, for which a small model may know no plural."""

_GROUNDS = """
    grass lawn meadow field desert sand beach shore ocean sea water night sky snow winter sunset forest woods room
    floor space city town street
"""
GROUNDS = frozenset(_GROUNDS.split())
"""Grounds that a small model knows in one colour alone, if it knows them."""

_COLOUR_NAMES = "red orange yellow green cyan blue purple pink brown gray grey white black"
COLOUR_NAMES = frozenset(_COLOUR_NAMES.split())
"""Colours that a background may be named by alone, as in "on blue"."""

NO_STEMS = frozenset({"rid"})
"""Words that are no stems of others: riding is not from rid."""

VERBS = (
    "add",
    "change",
    "delete",
    "enlarge",
    "erase",
    "make",
    "move",
    "paint",
    "put",
    "remove",
    "replace",
    "shrink",
    "turn",
)
"""Beginnings of instructions, after synonyms are replaced."""

CONSTRAINTS = (
    "keep", "keeping", "leave", "leaving", "preserve", "preserving", "maintain", "maintaining", "retain", "retaining",
    "don't", "dont", "do not", "never", "avoid", "make sure", "ensure", "everything else", "all else", "the rest",
    "nothing else", "all other", "other than that", "no other", "be careful", "it should", "they should",
    "the composition", "the lighting", "the shadows", "while",
)  # fmt: skip
"""Beginnings of sentences and clauses that only ask for something to stay as it is."""

NEGATIONS = ("don't", "dont", "do not", "never", "avoid")
"""Beginnings of what is not wanted, to the end of the sentence."""

_BOTH = """
    rose lemon lime salmon mint olive chestnut chocolate cream ruby emerald amber gold silver tangerine lavender violet
"""
BOTH = frozenset(_BOTH.split())
"""Words for a thing and its colour. "a lemon" is a thing, "a lemon star" has a colour."""

_OFTEN_MISSPELT = """
    background picture drawing painting corner center middle bottom right between bigger smaller larger change delete
    enlarge remove replace shrink grass desert ocean night sunset forest beach meadow winter
"""
OFTEN_MISSPELT = frozenset(_OFTEN_MISSPELT.split())
"""Words besides things and colours that a misspelt word is compared with."""

_LOOK_ALIKES = """
    airline airplay align ambiance ambience ample apply back backtrack bandana baseball basset bead beech bench
    binder bitterly blackjack blank bleach blown boost borne brawn breach break bream bred breed broad brook brow
    brows bucked burner buttery came cameo canter carb caste cattle cellophane chai chain chance char charge cheery
    cheesy chock choir clack clever click cloak closer clout clove cloves clown cluck commuter compute computed
    cornea corned cornet coroner cover crag crass cress crib criss crock crocs crops crowd crude defer deplete deter
    donor dont dragoon dregs droop ducking duress elegant fibre flamenco flaming flask flowed foothill frock frond
    gary glass glebe glove grabs graces grades grads grams grape graphs grasp grate grater graves gravy greed greek
    greet gripe gross hamper hart hear heard hears heat hoarse horde hose hummer lager lander larder lightening
    lighting locomotion loin manga mange meddle money mono moose moron morse muddle muse nigh panting peace perch
    phonograph phony piazza poach pointing popper preach primer printer printing prone psalm rabbi rabbis racket
    remote rocked rocker root roster rouse sail sake sawn scissor seep shack shake shank shard share sheen sheer
    sheet shied shire shock short showman shrank shriek shrine shrunk sitar skill skirt sleep slider smock
    snare snarl spake spark squad squire stag stair stake stark steep stock subclass subset swain sweep swore sworn
    tangle telephony telephoto tenet tier toddy track trail trait traitor tress trick truce trumped trunk tuck wale
    whaler whine whit widow winder winger winner write
"""
LOOK_ALIKES = frozenset(_LOOK_ALIKES.split())
"""Words of English that a known word is one or two letters from. They are never corrected."""

_ENGLISH = "the of with and at from is are my this that"
ENGLISH = frozenset(_ENGLISH.split())
"""Words that tell English from its neighbours. "a", "an", "in" and "on" are words of others too."""

_FOREIGN = """
    ein eine einen einem einer eines der das dem den und auf im mit un une le les des du et sur dans avec el en con
    sobre una il di het een op em com uma
"""
FOREIGN = frozenset(_FOREIGN.split())
"""Short words of German, French, Spanish, Italian, Dutch and Portuguese that English does not have."""
