"""Each prompt, followed by an agent on the embedded model through the real server, ends with saved images."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import PromptReference
from PIL import Image

from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.nano.training.compositor import BACKGROUNDS
from engine.nano.training.frames import SQUARE
from engine.nano.training.scenes import BIG, MIDDLE, NORMAL, SMALL, Scene, Thing
from engine.nano.training.score import background_right, look
from engine.nano.training.sprites import KINDS
from engine.nano.words import COLOURS
from klein_mcp.mcp_server import prompts
from klein_mcp.mcp_server.prompts import IMAGES, PromptFile
from klein_mcp.mcp_server.tools import TOOLS
from tests.agent import Agent, steps
from tests.real_server import RealServer

PROMPTS = {file.name: file for file in prompts.prompt_files()}
ASKED_FOR = {
    "product_shot",
    "icon_set",
    "ui_mockup_assets",
    "game_sprites",
    "storyboard",
    "consistent_character",
    "style_transfer",
    "restyle_photo",
    "logo_exploration",
    "before_after_review",
    "iterate",
}


@dataclass(frozen=True)
class Run:
    """One prompt followed to its end."""

    arguments: Mapping[str, str]
    project: Path
    text: str
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]]
    saved: list[Path]


@pytest.fixture(scope="module")
def runs(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run | BaseException]:
    """Every prompt, in one session with one real server: what the completions offer first is what the user chose.

    The folders are the prompts' own, relative to the project, and all in one project.
    """
    folder = tmp_path_factory.mktemp("prompts")
    done: dict[str, Run | BaseException] = {}

    async def choose(client: Client, name: str, images: dict[str, str]) -> dict[str, str]:
        chosen = {}
        for argument in next(one for one in (await client.list_prompts()).prompts if one.name == name).arguments or ():
            if PROMPTS[name].arguments[argument.name].complete == IMAGES:
                chosen[argument.name] = images.get(argument.name, images["image"])
            elif argument.required:
                reference = PromptReference(type="ref/prompt", name=name)
                offered = await client.complete(reference, {"name": argument.name, "value": ""})
                chosen[argument.name] = offered.completion.values[0]
        return chosen

    async def follow_all() -> None:
        async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(folder))) as client:
            images = {}
            for argument, prompt in {"image": "an apple on a white background", "style": "a house at sunset"}.items():
                made = await Agent(client).call("generate_image", {"prompt": prompt, "seed": 5, "show": "none"})
                images[argument] = made["image"]
            for name in PROMPTS:
                chosen = await choose(client, name, images)
                got = await client.get_prompt(name, chosen)
                text = got.messages[0].content.text  # type: ignore[union-attr]
                agent = Agent(client)
                try:
                    saved = [Path(path) for path in await agent.follow(text)]
                    done[name] = Run(chosen, folder, text, agent.calls, saved)
                except (AssertionError, KeyError, MCPError) as exc:
                    done[name] = exc

    anyio.run(follow_all)
    return done


def scene(ground: str, *things: tuple[str, tuple[int, int]] | tuple[str, tuple[int, int], int]) -> Scene:
    """The scene of things, each a name, a place and maybe a size, on a background."""
    placed = (Thing(KINDS.index(name), size[0] if size else NORMAL, slot) for name, slot, *size in things)
    return Scene(BACKGROUNDS.index(ground), tuple(placed))


LEFT, RIGHT, CORNER = (-1, 0), (1, 0), (1, -1)
SHOWN: dict[str, tuple[Scene, ...]] = {
    "before_after_review": (scene("white", ("apple", MIDDLE)), scene("green", ("apple", MIDDLE))),
    "consistent_character": tuple(scene(ground, ("duck", MIDDLE)) for ground in ("white", "grass", "night", "snow")),
    "game_sprites": (scene("gray", ("bird", MIDDLE)),),
    "icon_set": tuple(scene("gray", (name, MIDDLE)) for name in ("house", "tree", "rocket")),
    "iterate": (scene("yellow", ("apple", MIDDLE)), scene("blue", ("apple", MIDDLE), ("yellow star", CORNER, SMALL))),
    "logo_exploration": (scene("gray", ("cyan star", MIDDLE)), scene("gray", ("black star", MIDDLE))),
    "new_background": (scene("green", ("apple", MIDDLE)), scene("blue", ("apple", MIDDLE))),
    "product_shot": (scene("white", ("apple", MIDDLE)), scene("white", ("apple", MIDDLE, BIG))),
    "restyle_photo": (scene("green", ("apple", MIDDLE)),),
    "storyboard": (
        scene("grass", ("dog", MIDDLE)),
        scene("blue", ("dog", LEFT), ("balloon", RIGHT)),
        scene("snow", ("dog", MIDDLE)),
    ),
    "style_transfer": (scene("sunset", ("apple", MIDDLE)),),
    "ui_mockup_assets": (
        scene("green", ("flower", RIGHT)),
        scene("white", ("book", MIDDLE)),
        scene("green", ("robot", MIDDLE)),
    ),
}
"""What the images that a prompt saves show, transparent ones over grey."""


def seen(path: Path, ground: str) -> np.ndarray:
    """A saved image as nano's scorer wants it: of nano's size, opaque."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    over = Image.new("RGBA", image.size, (*COLOURS.get(ground, (0, 0, 0)), 255))
    over.alpha_composite(image)
    return np.asarray(over.convert("RGB").resize((SQUARE, SQUARE), Image.Resampling.BOX))


@pytest.mark.parametrize("name", PROMPTS)
def test_saved_images_show_what_the_prompt_promised(runs: dict[str, Any], name: str) -> None:
    """By the strict scorer of the embedded model: each thing in its place, on the right background."""
    run = runs[name]
    if isinstance(run, BaseException):
        raise run
    assert len(run.saved) == len(SHOWN[name])
    for path, wanted in zip(run.saved, SHOWN[name], strict=True):
        assert path.is_relative_to(run.project / (PROMPTS[name].arguments["folder"].default or ""))
        image = seen(path, BACKGROUNDS[wanted.background])
        for index, thing in enumerate(wanted.things):
            assert look(image, wanted, index).right(thing), f"{path.name} shows no {thing.name} there"
        assert background_right(image, wanted), f"{path.name} is not on {BACKGROUNDS[wanted.background]}"


TRANSPARENT = {
    "icon_set": {"subjects": "house, tree, rocket"},
    # Poses are beyond nano, which spoils the border of an image where it makes nothing of an instruction.
    "game_sprites": {"character": "a red bird", "poses": "on the left, on the right, at the bottom"},
    "logo_exploration": {"name": "Nordlicht", "idea": "a star"},
}
"""Prompts that end in transparent files, with arguments for their full version."""


def check_cut_out(path: Path) -> None:
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[..., 3]
    border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    # Observed: 0 at the border, 5 to 12 % of the image solid.
    assert border.max() == 0, path
    assert 0.02 < (alpha > 200).mean() < 0.6, path


@pytest.mark.parametrize("name", TRANSPARENT)
def test_prompt_ends_in_files_with_a_transparent_background(runs: dict[str, Any], name: str) -> None:
    assert runs[name].saved
    for path in runs[name].saved:
        check_cut_out(path)


@pytest.mark.anyio
@pytest.mark.parametrize("name", TRANSPARENT)
async def test_full_prompt_cuts_its_images_out_on_saving(server: RealServer, tmp_path: Path, name: str) -> None:
    async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(tmp_path))) as client:
        saved = await Agent(client).follow(PROMPTS[name].render(TRANSPARENT[name]))
    assert len(saved) >= 3
    for path in saved:
        check_cut_out(Path(path))


def test_edits_of_a_prompt_have_the_previous_image_as_parent(runs: dict[str, Any]) -> None:
    made = {tool: (arguments, payload) for tool, arguments, payload in runs["iterate"].calls}
    arguments, payload = made["edit_image"]
    assert [step["changed"]["share"] > 0.01 for step in payload["steps"]] == [True, True]
    assert payload["image"] != arguments["image"]


@pytest.mark.anyio
async def test_review_within_a_region_keeps_every_pixel_outside(server: RealServer, tmp_path: Path) -> None:
    given = {"image": "last", "change": "make the background green", "region": "0, 0, 64,128", "folder": str(tmp_path)}
    async with Client(server.stdio(KLEIN_WRITE_ROOTS=str(tmp_path))) as client:
        first = await Agent(client).call("generate_image", {"prompt": "an apple on a yellow background", "seed": 7})
        got = await client.get_prompt("before_after_review", {**given, "image": first["image"]})
        text = got.messages[0].content.text  # type: ignore[union-attr] - our prompts hold text alone
        before, after = await Agent(client).follow(text)
    with Image.open(before) as old, Image.open(after) as new:
        changed = (np.asarray(old.convert("RGB")) != np.asarray(new.convert("RGB"))).any(axis=-1)
    assert changed[:, :64].mean() > 0.2
    assert not changed[:, 64:].any()


def test_every_promised_prompt_has_a_file() -> None:
    files = {path.stem for path in (Path(__file__).parents[1] / "prompts").glob("[!_]*.md")}
    assert set(PROMPTS) == files
    assert set(PROMPTS) >= ASKED_FOR


def chosen(file: PromptFile, *, optional: bool = False) -> dict[str, str]:
    """The first completion of each required argument, and of each optional one too."""
    return {
        name: "k7f3q2" if argument.complete == IMAGES else argument.complete[0]
        for name, argument in file.arguments.items()
        if argument.complete and (optional or argument.default is None)
    }


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("file", PROMPTS.values(), ids=PROMPTS)
def test_every_call_of_a_prompt_is_accepted_by_its_tool(file: PromptFile, optional: bool, small: bool) -> None:
    named: set[str] = set()
    for step in steps(file.render(chosen(file, optional=optional), small=small)):
        assert set(step) <= {"tool", "as", "arguments"}
        TOOLS[step["tool"]].parse(step["arguments"])
        used = {word.strip("<>").split(".")[0] for word in _words(step["arguments"]) if word.startswith("<")}
        assert used <= named, "a result is used before it is there"
        named.add(step.get("as", ""))


def test_entries_that_are_sentences_keep_their_commas() -> None:
    words = "a rainy street at night, neon signs on wet asphalt"
    backgrounds = PROMPTS["new_background"].arguments["backgrounds"]
    assert backgrounds.value(words) == [words]
    assert backgrounds.value(f"{words}; a beach") == backgrounds.value(f"{words}\na beach") == [words, "a beach"]
    assert PROMPTS["icon_set"].arguments["subjects"].value("house, tree") == ["house", "tree"]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("file", PROMPTS.values(), ids=PROMPTS)
def test_prompt_that_is_given_last_means_one_image_throughout(file: PromptFile, small: bool) -> None:
    """Each image that a step makes is the new `last`."""
    images = {name for name, argument in file.arguments.items() if argument.complete == IMAGES}
    given = {name: "last" if name in images else text for name, text in chosen(file).items()}
    made = False
    for step in steps(file.render(given, small=small)):
        assert not (made and "last" in _words(step["arguments"])), step
        made |= step["tool"] in ("generate_image", "edit_image", "compose_references")


@pytest.mark.parametrize("file", PROMPTS.values(), ids=PROMPTS)
def test_prompts_for_nano_say_so_and_keep_their_words_short(file: PromptFile) -> None:
    text = file.render(chosen(file), small=True)
    assert "The model here is `nano`" in text
    assert "nano" not in file.render(chosen(file)), "the real model's prompt speaks of another"
    for call in steps(text):
        words = call["arguments"].get("prompt", "")
        for sentence in words if isinstance(words, list) else [words]:
            assert len(sentence.split()) <= 14, sentence


@pytest.mark.parametrize("file", PROMPTS.values(), ids=PROMPTS)
def test_prompts_word_their_calls_as_the_guide_advises(file: PromptFile) -> None:
    """Prompts describe presence, never absence, and number their references."""
    calls = [step["arguments"] for step in steps(file.render(chosen(file)))]
    for call in calls:
        words = call.get("prompt", "a.")
        assert not re.search(r"\b(no|not|without|never|nothing|none|avoid)\b", words, re.IGNORECASE), words
        for number in re.findall(r"image (\d)", words, re.IGNORECASE):
            assert int(number) <= len(call["images"]), words
        if "images" in call:
            assert "image 1" in words.lower(), words


def _words(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [word for item in (value.values() if isinstance(value, dict) else value) for word in _words(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("file", PROMPTS.values(), ids=PROMPTS)
def test_every_argument_can_be_completed_or_has_a_default(file: PromptFile) -> None:
    for argument in file.arguments.values():
        assert argument.complete or argument.default is not None
        assert len(argument.description) <= 120
    assert "folder" in file.arguments
    assert len(file.title) <= 40
    assert len(file.description) <= 160


@settings(deadline=None)
@given(st.text(min_size=1, max_size=200).filter(str.strip))
def test_each_block_stays_one_tool_call_whatever_is_typed(typed: str) -> None:
    file = PROMPTS["logo_exploration"]
    calls = steps(file.render({"name": typed, "idea": "a star"}))
    lockup = next(call for call in calls if call.get("as") == "lockup")
    assert " ".join(typed.split()) in lockup["arguments"]["prompt"]
    assert len(calls) == 8


def test_template_syntax_in_arguments_is_left_as_typed() -> None:
    text = PROMPTS["iterate"].render({"idea": 'a "{{ 7 * 7 }}" {% raw %} <drafts>'})
    assert 'a "{{ 7 * 7 }}" {% raw %} <drafts>' in text
    assert "49" not in text


def test_a_list_may_be_split_by_commas_semicolons_or_lines() -> None:
    for typed in ("house, tree", "house; tree", "house\ntree", " house ;; tree; "):
        calls = steps(PROMPTS["icon_set"].render({"subjects": typed}))
        assert [call["arguments"]["path"] for call in calls if call["tool"] == "save_image"] == [
            "pictures/icons/house.png",
            "pictures/icons/tree.png",
        ]


@pytest.mark.anyio
async def test_completions_offer_matching_values_and_library_images(client: Client) -> None:
    async def offered(prompt: str, argument: str, typed: str) -> list[str]:
        reference = PromptReference(type="ref/prompt", name=prompt)
        return list((await client.complete(reference, {"name": argument, "value": typed})).completion.values)

    assert await offered("product_shot", "product", "red") == ["a red apple"]
    assert await offered("product_shot", "product", "submarine") == []
    assert await offered("restyle_photo", "photo", "") == []
    handles = [(await Agent(client).call("generate_image", {"prompt": "a cat"}))["image"] for _ in range(2)]
    assert await offered("restyle_photo", "photo", "") == handles[::-1]
    assert await offered("restyle_photo", "photo", handles[0][:5]) == handles[:1]
    assert await offered("no_such_prompt", "photo", "") == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("icon_set", {}, "subjects is missing: what the icons show, separated by commas."),
        ("icon_set", {"subject": "x"}, 'icon_set has no argument "subject". Did you mean subjects?'),
        ("icon_set", {"subjects": ","}, "subjects has 0 entries; 1 to 12 are possible."),
        ("iterat", {}, 'There is no prompt "iterat". Did you mean iterate? There are before_after_review, '),
        ("iterate", {"idea": "x" * 2001}, "idea has 2001 characters; at most 2000."),
        (
            "before_after_review",
            {"image": "last", "change": "x", "region": "here"},
            'region is "here"; it must look like 0, 0, 64, 64.',
        ),
        (
            "before_after_review",
            {"image": "last", "change": "x", "region": "0, 064, 64, 64"},
            'region is "0, 064, 64, 64"; it must look like 0, 0, 64, 64.',
        ),
    ],
)
async def test_wrong_prompt_arguments_are_explained(
    client: Client, name: str, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(MCPError) as exc:
        await client.get_prompt(name, arguments)
    assert exc.value.error.message.startswith(message)
    assert "\n" not in exc.value.error.message


@pytest.mark.anyio
async def test_tools_and_instructions_fit_the_limits_of_every_client(client: Client) -> None:
    """Claude Code cuts descriptions at 2 KB, claude.ai drops schemas over 16 KB."""
    tools = (await client.list_tools()).tools
    message = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]
    assert len(json.dumps(message, separators=(",", ":"))) <= 10_000
    for tool in message:
        assert 40 <= len(tool["description"].encode()) < 2000
        assert len(json.dumps(tool["inputSchema"])) < 16_000
    assert client.instructions is not None
    assert len(client.instructions.encode()) < 2000


@pytest.mark.anyio
async def test_guide_names_everything_the_embedded_model_knows(client: Client) -> None:
    from engine.nano import words

    own = json.loads((Path(words.__file__).parent / "weights" / "klein.json").read_text())
    listed = {str(resource.uri): resource for resource in (await client.list_resources()).resources}
    assert listed["klein://guide"].mime_type == "text/markdown"
    (content,) = (await client.read_resource("klein://guide")).contents
    guide = content.text  # type: ignore[union-attr]
    message = set(re.findall(r"\w+", guide))
    assert {*own["nouns"], *words.SHAPES, *words.COLOURS, *({*words.SCENES} & {*own["words"]})} <= message
    things = re.findall(r"- things: (.*)", guide)[0].split(", ")
    assert set(things) == {*own["nouns"]}, "nothing is promised that it was not taught"
    assert "paints {0} × {0} pixels".format(VARIANTS[EMBEDDED].native_size) in guide
    for tool in ("generate_image", "edit_image", "compose_references", "view_image", "save_image", "list_images"):
        assert tool in guide
    for habit in ("sentences, not tags", "subject first", "Light decides", "quotation marks", "hex code", "image 1"):
        assert habit in guide
    assert "never what is not" in guide
    assert len(guide.encode()) < 8000
