"""Arguments that several tools share: type, limits, description."""

import json
from typing import Annotated, Any, Literal

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

from engine.families.klein.variants import VARIANTS
from klein_mcp.limits import MAX_SEED, MAX_SIDE, MIN_SIDE

MAX_PROMPT = 4000
"""Characters; klein reads 512 tokens, about 2,000 characters of English."""

MAX_REFERENCES = max(row.max_references for row in VARIANTS.values())


class Arguments(BaseModel):
    """Base model of tool arguments. Unknown arguments are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _unquoted(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept a list as JSON text, and null for an omitted argument.

        Some clients send these.
        """
        field = cls.model_fields[info.field_name or ""]
        if value is None and not field.is_required():
            return field.default
        if isinstance(value, str) and value.lstrip().startswith("[") and field.annotation is not str:
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value


def _whole_number(value: Any) -> Any:
    """Accept a number as text, as our own results give a seed."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _known_model(name: str) -> str:
    if name != "auto" and name not in VARIANTS:
        raise ValueError("unknown model")  # the message comes from the schema's enum
    return name


Prompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT),
    Field(description="What the image shows, in plain sentences."),
]
EditPrompts = Annotated[
    str | list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT)]],
    WithJsonSchema(
        {
            "type": ["string", "array"],
            "items": {"type": "string"},
            "description": "What to change, as an instruction. Or up to 8, each an edit of the result before it.",
        }
    ),
]
ComposePrompt = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT),
    Field(description='The new image; call the references "image 1", "image 2", ….'),
]
ImageRef = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    Field(description="A handle (k7f3q2), last, last~1, A to D of the last sheet, or an absolute path."),
]
Images = Annotated[
    list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]],
    Field(
        min_length=1,
        max_length=MAX_REFERENCES,
        description="References in order: handles, last, last~1, or absolute paths.",
    ),
]
Mask = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    Field(description="An image of the same size: white may change, black stays. With region: where both meet."),
]
Region = Annotated[
    list[int],
    Field(min_length=4, max_length=4, description="[x, y, width, height] in pixels of the image."),
]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE), BeforeValidator(_whole_number)]
Width = Annotated[Side, Field(description="Pixels; with height, instead of aspect_ratio.")]
EditWidth = Annotated[Side, Field(description="Pixels; with height, instead of the image's own size.")]
Height = Annotated[Side, Field(description="Pixels; with width.")]
Aspect = Annotated[
    Literal["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21"],
    Field(description="Shape at the model's best size."),
]
Count = Annotated[int, Field(ge=1, le=4, description="Number of images; the seed counts up.")]
Seed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED, description="Same seed, same image. Default: random."),
    BeforeValidator(_whole_number),
]
Model = Annotated[
    str,
    Field(
        description="auto: the best that is installed.",
        json_schema_extra={"enum": ["auto", *VARIANTS], "x-mcp-header": "Model"},
    ),
    AfterValidator(_known_model),
]
Background = Annotated[Literal["transparent"], Field(description="transparent: real alpha, measured.")]
Preserve = Annotated[
    Literal["auto", "off"],
    Field(description="auto: pixels that did not change stay the original's; off: as painted."),
]
Show = Annotated[
    Literal["inline", "link", "none"],
    Field(description="inline: a preview in the result. Default: what your client shows."),
]


JobHandle = Annotated[str, Field(min_length=1, max_length=64, description='The "job" of the previous result.')]
SavePath = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=2000),
    Field(description="File or folder: absolute, or from the project's folder."),
]
SaveFormat = Annotated[Literal["png", "jpeg", "webp"], Field(description="Default: by the path, else png.")]
SaveSize = Annotated[int, Field(ge=16, le=8192, description="Shrink to this long edge.")]
Strip = Annotated[bool, Field(description="Leave out how it was made.")]
Overwrite = Annotated[bool, Field(description="Replace a file that exists.")]
ViewSize = Annotated[int, Field(ge=64, le=1568, description="Long edge of what you see, in pixels.")]
CompareWith = Annotated[str, Field(min_length=1, description="Another image: shows both and their difference.")]
HistoryOf = Annotated[str, Field(min_length=1, description="Its ancestors, oldest first, and their branches.")]
SaveExact = Annotated[int, Field(ge=16, le=8192, description="Long edge to enlarge or shrink to.")]
Limit = Annotated[int, Field(ge=1, le=100, description="Entries per page.")]
Search = Annotated[str, Field(max_length=200, description="Words in the prompt, or part of a path.")]
Cursor = Annotated[str, Field(max_length=40, description='The "next" of the previous page.')]
