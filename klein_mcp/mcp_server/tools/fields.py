"""Arguments that several tools share: type, limits, description."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from engine.contract import MAX_SEED, MIN_SIDE
from engine.families.klein.variants import VARIANTS
from klein_mcp.errors import DESCRIBED
from klein_mcp.images.outputs import FORMATS, Format
from klein_mcp.limits import EXACT, MAX_SIDE
from klein_mcp.mcp_server.tools.edit_chain import MAX_STEPS
from klein_mcp.mcp_server.tools.leniency import (
    as_choice,
    as_list,
    as_number,
    as_reference,
    as_references,
    from_json_list,
    is_placeholder,
)

MAX_PROMPT = 4000
"""Characters; klein reads 512 tokens, about 2,000 characters of English."""

MAX_PATH = 2000
"""Characters; Linux allows 4,096, Windows 260 where nobody changed it."""

COUNTED_BACK = (" last, last~1, A to D of the last sheet,", " last, last~1,")
"""Parts of descriptions that offer references which count back from a client's latest image."""

NOTHING = {"seed": -1, "width": 0, "height": 0, "max_size": 0, "size": 0, "aspect_ratio": "auto", "background": "auto"}
"""Values for "nothing", by models that must fill in every argument.

-1 is a random seed in other tools, and "auto" OpenAI's word for what the model decides."""

MAX_REFERENCES = max(row.max_references for row in VARIANTS.values())


class Arguments(BaseModel):
    """Base model of tool arguments. Unknown arguments are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _omitted(cls, value: Any, info: ValidationInfo) -> Any:
        """Take a placeholder in an optional argument as an omitted one."""
        name = info.field_name or ""
        field = cls.model_fields[name]
        if field.is_required():
            return value
        nothing = is_placeholder(value) or (name in NOTHING and _plain(value) == NOTHING[name])
        return field.default if nothing else value


def _plain(value: Any) -> Any:
    """Read a number, or a word in any letter case."""
    number = as_number(value)
    return number.strip().lower() if isinstance(number, str) else number


def _seed(value: Any) -> Any:
    """Refuse a number that a client may have rounded on its way."""
    if isinstance(value, int) and value > EXACT:
        raise ValueError("may be rounded")
    return as_number(value)


def _at_most(length: int) -> AfterValidator:
    """Check a length here: llama.cpp makes that many rules of a maxLength."""

    def check(value: str) -> str:
        if len(value) > length:
            counted = {"length": len(value), "most": length}
            raise PydanticCustomError(DESCRIBED, "has {length} characters; at most {most}", counted)
        return value

    return AfterValidator(check)


def _known_model(name: str) -> str:
    if name != "auto" and name not in VARIANTS:
        raise ValueError("unknown model")  # the message comes from the schema's enum
    return name


Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    _at_most(MAX_PROMPT),
    Field(description="What the image shows, in plain sentences."),
]
EditPrompts = Annotated[
    str | list[Annotated[str, StringConstraints(strip_whitespace=True)]],
    WithJsonSchema(
        {
            "type": ["string", "array"],
            "items": {"type": "string"},
            "description": "What to change, as an instruction. "
            f"Or up to {MAX_STEPS}, each an edit of the result before it.",
        }
    ),
    BeforeValidator(from_json_list),
]
ComposePrompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    _at_most(MAX_PROMPT),
    Field(description='The new image; call the references "image 1", "image 2", ….'),
]
ImageRef = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    Field(description="A handle (k7f3q2), last, last~1, A to D of the last sheet, or a path."),
    BeforeValidator(as_reference),
]
Images = Annotated[
    list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]],
    Field(
        min_length=1,
        max_length=MAX_REFERENCES,
        description="References in order: handles, last, last~1, or paths.",
    ),
    BeforeValidator(as_references),
]
Again = Annotated[str, Field(min_length=1, description="Not prompt: this image's recipe, at another size or model.")]
Replay = Annotated[str, Field(min_length=1, description="Not prompt: all edits that led to this image.")]
Mask = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    Field(description="An image of the same size: white may change, black stays. With region: where both meet."),
]
Region = Annotated[
    list[int],
    Field(min_length=4, max_length=4, description="[x, y, width, height] in pixels of the image."),
    BeforeValidator(as_list),
]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE), BeforeValidator(as_number)]
Width = Annotated[Side, Field(description="Pixels; with height, instead of aspect_ratio.")]
EditWidth = Annotated[Side, Field(description="Pixels; with height, instead of the image's own size.")]
Height = Annotated[Side, Field(description="Pixels; with width.")]
AspectRatio = Literal["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21"]
Aspect = Annotated[
    AspectRatio,
    Field(description="Shape at the model's best size."),
    BeforeValidator(lambda value: as_choice(value, get_args(AspectRatio))),
]
Count = Annotated[
    int, Field(ge=1, le=4, description="Number of images; the seed counts up."), BeforeValidator(as_number)
]
Seed = Annotated[
    int,
    Field(
        ge=0, le=MAX_SEED, description="Same seed, same image. Default: random.", json_schema_extra={"maximum": EXACT}
    ),
    BeforeValidator(_seed),
]
Model = Annotated[
    str,
    Field(
        description="auto: the best that is installed.",
        json_schema_extra={"enum": ["auto", *VARIANTS], "x-mcp-header": "Model"},
    ),
    AfterValidator(_known_model),
    BeforeValidator(lambda value: as_choice(value, ("auto", *VARIANTS))),
]
Background = Annotated[
    Literal["transparent"],
    Field(description="Real alpha, measured."),
    BeforeValidator(lambda value: as_choice(value, ("transparent",))),
]
CutOut = Annotated[
    Literal["transparent"],
    Field(description="Cut out of a plain background."),
    BeforeValidator(lambda value: as_choice(value, ("transparent",))),
]
Preserve = Annotated[
    Literal["auto", "off"],
    Field(description="auto: pixels that did not change stay the original's; off: as painted."),
    BeforeValidator(lambda value: as_choice(value, ("auto", "off"))),
]
ShowMode = Literal["inline", "link", "none"]
Show = Annotated[
    ShowMode,
    Field(description="inline: a preview in the result. Default: what your client shows."),
    BeforeValidator(lambda value: as_choice(value, get_args(ShowMode))),
]


JobHandle = Annotated[
    str,
    StringConstraints(strip_whitespace=True, to_lower=True),
    Field(min_length=1, max_length=64, description='The "job" of the previous result.'),
]
SavePath = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    _at_most(MAX_PATH),
    Field(description="File or folder: absolute, or from the project's folder."),
]
SaveFormat = Annotated[
    Format,
    Field(description="Default: by the path, else png."),
    BeforeValidator(lambda value: as_choice(value, FORMATS)),
]
SaveSize = Annotated[int, Field(ge=16, le=8192, description="Shrink to this long edge."), BeforeValidator(as_number)]
Strip = Annotated[bool, Field(description="Leave out how it was made.")]
Overwrite = Annotated[bool, Field(description="Replace a file that exists.")]
ViewSize = Annotated[
    int, Field(ge=64, le=1568, description="Long edge of what you see, in pixels."), BeforeValidator(as_number)
]
CompareWith = Annotated[str, Field(min_length=1, description="Another image: shows both, bright where they differ.")]
HistoryOf = Annotated[str, Field(min_length=1, description="Its ancestors, oldest first, and their branches.")]
SaveExact = Annotated[
    int, Field(ge=16, le=8192, description="Long edge to enlarge or shrink to."), BeforeValidator(as_number)
]
Limit = Annotated[int, Field(ge=1, le=100, description="Entries per page."), BeforeValidator(as_number)]
Search = Annotated[str, Field(max_length=200, description="Words in the prompt, or part of a path.")]
Cursor = Annotated[str, Field(max_length=40, description='The "next" of the previous page.')]
