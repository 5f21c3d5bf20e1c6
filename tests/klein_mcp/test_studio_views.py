"""Lineage, sheets and picks: what the studio reads from the library and keeps in it."""

import contextlib
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.families.klein.folder import read_variant
from engine.families.klein.reading import read_prompt
from engine.families.klein.variants import EMBEDDED, VARIANTS
from engine.registry import NANO
from klein_mcp.errors import UnknownImage
from klein_mcp.images import picks, schema
from klein_mcp.images.index import Index
from klein_mcp.images.library import Record, Store
from klein_mcp.images.resolver import ImageResolver
from klein_mcp.jobs.request import ImageRequest, edit, generate
from klein_mcp.settings import Settings
from klein_mcp.studio import views
from klein_mcp.studio.engine_view import NANO_EXAMPLES
from klein_mcp.studio.picks import NEXT, claim


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "library")
    yield store
    store.close()


def put(store: Store, prompt: str | None = "an apple", seed: int = 1, client: str = "agent", **more: Any) -> Record:
    handle = store.new_handle()
    details: dict[str, Any] = {
        "client": client,
        "tool": "generate_image",
        "recipe": {"seed": str(seed), "model": "nano"},
        "prompt": prompt,
        "size": (64, 64),
        **more,
    }
    return store.put(handle.encode(), handle=handle, pixels=handle, **details)


def sheet(store: Store, seed: int, count: int, **more: Any) -> list[str]:
    return [put(store, seed=seed + k, **more).handle for k in range(count)]


def test_page_lists_newest_first_and_goes_on_from_its_cursor(library: Store) -> None:
    made = [put(library, prompt=f"image {k}", seed=10 * k).handle for k in range(5)]
    first = views.library_page(library, limit=3)
    rest = views.library_page(library, limit=3, cursor=first["next"] or "")
    assert [card["image"] for card in first["images"] + rest["images"]] == made[::-1]
    assert rest["next"] is None
    assert [card["image"] for card in views.library_page(library, search="image 2")["images"]] == [made[2]]


@pytest.mark.parametrize("search", ["äpfel TISCH", "ЁЛКА", unicodedata.normalize("NFD", "Äpfel"), "STRASSE", "100%_"])
def test_search_knows_no_letter_case_or_unicode_form(library: Store, search: str) -> None:
    made = put(library, prompt="ÄPFEL auf dem Tisch, ёлка, Straße, 100%_")
    put(library, prompt="Apfel auf dem Stuhl, 100 ml", seed=50)
    assert [card["image"] for card in views.library_page(library, search=search)["images"]] == [made.handle]


@pytest.mark.parametrize("cursor", ["", "x", "-1", "9" * 40, "1; DROP TABLE pictures"])
def test_page_treats_a_broken_cursor_as_none(library: Store, cursor: str) -> None:
    put(library)
    assert len(views.library_page(library, cursor=cursor)["images"]) == 1


def recorded(store: Store, first: int, count: int) -> list[str]:
    """Put a sheet whose recipes know their place, as calls make them."""
    each = [{"seed": str(first + k), "model": "nano", "sheet": [str(first), count]} for k in range(count)]
    return [put(store, recipe=recipe).handle for recipe in each]


def test_next_call_with_the_same_words_is_a_sheet_of_its_own(library: Store) -> None:
    """Its seeds may follow on those of the call before."""
    single, first, second = recorded(library, 3, 1), recorded(library, 4, 2), recorded(library, 6, 4)
    for handles in (first, second):
        assert views.image_details(library, handles[0])["siblings"] == handles
    assert views.image_details(library, single[0])["siblings"] == []
    references = ImageResolver(Settings(), library)
    assert [references.open(label, "agent").record.handle for label in "ABCD"] == second
    library.delete([second[1]])
    assert references.open("C", "agent").record.handle == second[2]
    with pytest.raises(UnknownImage, match="B of the latest sheet was deleted"):
        references.open("B", "agent")


@pytest.mark.parametrize("picked", [0, 1, 2])
def test_images_before_the_picked_one_leave_it_out(library: Store, picked: int) -> None:
    handles = [put(library, prompt=f"image {k}").handle for k in range(3)]
    library.picks.choose("agent", handles[picked])
    others = [handle for handle in reversed(handles) if handle != handles[picked]]
    references = ImageResolver(Settings(), library)
    seen = [references.open(f"last~{back}" if back else "last", "agent").record.handle for back in range(3)]
    assert seen == [handles[picked], *others]


def test_images_of_one_call_share_a_sheet_and_others_do_not(library: Store) -> None:
    alone = put(library, seed=1).handle
    handles = sheet(library, 40, 3)
    put(library, seed=43, prompt="a pear")
    page = {card["image"]: card["sheet"] for card in views.library_page(library)["images"]}
    assert [page[handle] for handle in handles] == [handles[0]] * 3
    assert page[alone] is None
    assert views.image_details(library, handles[1])["siblings"] == handles
    assert views.image_details(library, alone)["siblings"] == []


def test_family_holds_ancestors_cousins_and_second_references(library: Store) -> None:
    root = put(library).handle
    child = put(library, "make it red", parents=[root]).handle
    cousin = put(library, "make it blue", parents=[root]).handle
    other = put(library, "a rocket").handle
    both = put(library, "together", parents=[child, other]).handle
    put(library, "unrelated", seed=9)
    for handle in (child, both):
        family = [card["image"] for card in views.image_details(library, handle)["family"]]
        assert set(family) == {root, child, cousin, both} | ({other} if handle == both else set())
    parents = {card["image"]: card["parents"] for card in views.image_details(library, both)["family"]}
    assert parents[both] == [child, other]


def test_family_leaves_out_deleted_images_and_survives_a_large_one(library: Store) -> None:
    root = put(library).handle
    children = [put(library, f"edit {k}", parents=[root]).handle for k in range(views.MOST_RELATIVES + 20)]
    library.delete([children[0]])
    family = [card["image"] for card in views.image_details(library, children[-1])["family"]]
    assert len(family) == views.MOST_RELATIVES
    assert {root, children[-1]} <= set(family)
    assert children[0] not in family


def test_family_reads_few_of_many_images_of_one_base(library: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def leads_to_image(handle: str) -> str:
        return put(library, "add a star", parents=[put(library, "make it red", parents=[handle]).handle]).handle

    root = put(library).handle
    children = [put(library, f"edit {k}", parents=[root]).handle for k in range(300)]
    library.delete(children)
    read: list[Record] = []
    record = Index.record

    def counted(index: Index, row: tuple[Any, ...]) -> Record:
        read.append(record(index, row))
        return read[-1]

    monkeypatch.setattr(Index, "record", counted)
    assert [card["image"] for card in views.image_details(library, root)["family"]] == [root]
    assert len(read) < 20, "deleted leaves connect nothing"
    monkeypatch.setattr(views, "MOST_RELATIVES", 10)
    monkeypatch.setattr(views, "MOST_DELETED", 20)
    grandchildren = [put(library, "add a star", parents=[child]).handle for child in children]
    library.delete(grandchildren[:-1])
    deep = [leads_to_image(root) for _ in range(3)]
    read.clear()
    family = {card["image"] for card in views.image_details(library, root)["family"]}
    assert {root, *deep} <= family
    assert len(read) < 200


def test_details_say_whether_an_image_can_be_made_again(library: Store) -> None:
    def made(request: ImageRequest, **recipe: Any) -> str:
        return put(library, request.prompt, recipe={"model": "nano", "request": request.to_json(), **recipe}).handle

    root = made(generate("an apple"))
    edited = made(edit(root, "make it red", preserve="off"))
    cut_out = made(edit(root, "remove the background", background="transparent"), model="none")
    opened = put(library, None, tool="open", recipe={}).handle
    again = {handle: views.image_details(library, handle)["again"] for handle in (root, edited, cut_out, opened)}
    assert again == {root: True, edited: True, cut_out: False, opened: False}
    library.delete([root])
    assert not views.image_details(library, edited)["again"]


def test_deleted_images_still_connect_their_relatives(library: Store) -> None:
    root = put(library).handle
    middle = put(library, "make it red", parents=[root]).handle
    leaf = put(library, "add a star", parents=[middle]).handle
    cousin = put(library, "make it blue", parents=[root]).handle

    def parents(handle: str) -> dict[str, list[str]]:
        return {card["image"]: card["parents"] for card in views.image_details(library, handle)["family"]}

    library.delete([middle])
    whole = {root: [], leaf: [root], cousin: [root]}
    assert (parents(root), parents(leaf), parents(cousin)) == (whole, whole, whole)
    library.delete([root])
    assert parents(leaf) == parents(cousin) == {leaf: [], cousin: []}


def test_images_of_a_sheet_have_the_letters_that_tools_take(library: Store) -> None:
    handles = recorded(library, 3, 10)
    library.delete([handles[1]])
    labels = views.image_details(library, handles[0])["labels"]
    assert labels == dict(zip(handles[:1] + handles[2:], "ACDEFGHIJ", strict=True))
    assert ImageResolver(Settings(), library).open("C", "agent").record.handle == handles[2]


def test_details_of_an_unknown_image_say_so(library: Store) -> None:
    with pytest.raises(UnknownImage):
        views.image_details(library, "zzzzzz")


def test_pick_is_what_its_client_gets_until_it_makes_another_image(library: Store) -> None:
    handles = sheet(library, 1, 4)
    library.picks.choose("agent", handles[1], mask="mmmmmm")
    pick = library.picks.of("agent")
    assert pick is not None
    assert (pick.image, pick.mask) == (handles[1], "mmmmmm")
    assert library.picks.of("someone else") is None
    assert library.picks.images() == {handles[1]}
    put(library, "the next image", seed=77)
    assert library.picks.of("agent") is None
    assert library.picks.images() == set()


def test_pick_counts_though_the_clock_was_set_back(library: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = sheet(library, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(picks.time, "time", lambda: 1e9)
        library.picks.choose("agent", handles[0])
    pick = library.picks.of("agent")
    assert pick is not None
    assert pick.image == handles[0]
    put(library, "the next image")
    assert library.picks.of("agent") is None


def test_pick_of_an_older_library_counts_until_the_next_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:3])
        with contextlib.closing(Store(tmp_path)) as old:
            handle = put(old).handle
            old._index.write("INSERT INTO picks (client, image, created) VALUES ('agent', ?, 2e9)", handle)
    with contextlib.closing(Store(tmp_path)) as library:
        pick = library.picks.of("agent")
        assert pick is not None
        assert pick.image == handle
        library._index.write("UPDATE picks SET created = 1")
        assert library.picks.of("agent") is None


def test_pick_is_reported_once(library: Store) -> None:
    handle = put(library).handle
    assert library.picks.report("agent") is None
    library.picks.choose("agent", handle)
    first = library.picks.report("agent")
    assert first is not None
    assert first.image == handle
    assert library.picks.report("agent") is None
    library.picks.choose("agent", handle)
    assert library.picks.report("agent") is not None


def test_pick_of_a_deleted_image_counts_no_more(library: Store) -> None:
    handle = put(library).handle
    library.picks.choose("agent", handle)
    library.delete([handle])
    assert library.picks.of("agent") is None
    assert library.picks.report("agent") is None


def test_agent_claims_the_latest_pick_that_no_other_one_waits_for(library: Store) -> None:
    handles = sheet(library, 1, 5)
    mine, other = (f"front-end-{os.getpid()}-{name}" for name in ("mine", "other"))
    for client, handle in zip((NEXT, mine, "openai-token-0", other), handles, strict=False):
        library.picks.choose(client, handle)
    claim(library, mine)
    heard = library.picks.report(mine)
    assert heard is not None
    assert heard.image == handles[2]
    claim(library, mine)
    assert library.picks.report(mine) is None, "the older ones are dropped"
    assert library.picks.images() == {handles[2], handles[3]}
    library.picks.choose(NEXT, handles[0])
    library.picks.choose(mine, handles[4])
    claim(library, mine)
    heard = library.picks.report(mine)
    assert heard is not None
    assert heard.image == handles[4], "an agent's own later pick stays"


def test_revision_changes_with_every_new_and_every_deleted_image(library: Store) -> None:
    revisions = [library.revision()]
    handle = put(library).handle
    revisions.append(library.revision())
    library.delete([handle])
    revisions.append(library.revision())
    assert len(set(revisions)) == 3


def test_embedded_model_reads_every_example_of_its_own_as_it_is() -> None:
    nano = read_variant(NANO, VARIANTS[EMBEDDED])
    assert read_prompt("five cats on a green background", nano).warnings
    for example in NANO_EXAMPLES:
        reading = read_prompt(example, nano)
        assert (reading.text, reading.warnings) == (example, ())
