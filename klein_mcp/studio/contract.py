"""The data between the server and the studio's page, as JSON.

The page reads addresses and calls tools, through its host where it is an app in a chat, through /studio/read and
/studio/call where it is a page in a browser. Both ways carry exactly these shapes.

    klein://now?after=SEQ                 Now, as soon as it is newer than SEQ, after a second at the latest
    klein://library?limit&search&cursor   LibraryPage
    klein://images/HANDLE/details         ImageDetails
    klein://images/HANDLE                 the image, or the largest rendition that fits into a message
    klein://images/HANDLE/thumb           a small rendition
    klein://images/HANDLE/changes         where an edit changed it, white on black
    klein://engine                        EngineView
"""

from typing import TypedDict


class Card(TypedDict):
    """One image in a list.

    seed: as text, since JSON readers round numbers over 2^53.
    """

    image: str
    prompt: str | None
    source: str | None
    tool: str
    created: str
    width: int
    height: int
    parents: list[str]
    seed: str | None
    model: str | None
    alpha: bool
    picked: bool
    sheet: str | None
    """The same for all images of one call, None for an image that came alone."""


class Changed(TypedDict):
    """The pixels that an edit changed.

    share: 0 … 1. box: [x, y, width, height]. kept: whether all others are as they were. mask: whether /changes exists.
    """

    share: float
    box: list[int] | None
    kept: bool
    mask: bool


class ImageDetails(Card):
    """One image with its family.

    siblings: the images of its sheet, in order, or nothing. labels: their letters, by handle.
    family: its relatives and itself, oldest first, with the nearest parents that are not deleted.
    read_as: the prompt in the words the model knows, None where it took it as it was.
    again: whether generate_image can make it again with another seed.
    """

    bytes: int
    dtype: str | None
    steps: int | None
    region: list[int] | None
    mask: str | None
    read_as: str | None
    again: bool
    changed: Changed | None
    family: list[Card]
    siblings: list[str]
    labels: dict[str, str]


class LibraryPage(TypedDict):
    """Some images, newest first.

    next: the cursor of the following page, None at the end.
    """

    images: list[Card]
    next: str | None


class JobView(TypedDict):
    """One job that waits or runs.

    mine: whether it is the reader's own. who: whose it is, in words.
    call: the page's call that started it, where one did. preview: a data: address. fraction: 0 … 1.
    """

    job: str
    mine: bool
    call: str | None
    who: str
    state: str
    prompt: str
    model: str | None
    position: int
    seconds: float | None
    stage: str | None
    step: int | None
    steps: int | None
    fraction: float | None
    count: int
    index: int
    preview: str | None


class Now(TypedDict):
    """All jobs of the engine.

    library: another number whenever the library has changed.
    """

    seq: int
    library: int
    jobs: list[JobView]


class ModelView(TypedDict):
    """A model that can be asked for.

    examples: prompts in the words that it knows.
    """

    name: str
    licence: str
    installed: bool
    max_references: int
    examples: list[str]


class EngineView(TypedDict):
    """The engine, for a person.

    auto: the model that `auto` would take now. words: its state as a sentence.
    """

    words: str
    version: str
    loaded: str | None
    auto: str
    licence: str | None
    device: str | None
    dtype: str | None
    placement: str | None
    free_bytes: int | None
    seconds: float | None
    tuning: str | None
    models: list[ModelView]
    max_references: int
    examples: list[str]
