"""Tests that the variant table is complete and consistent."""

from engine.families.klein.variants import APACHE, EMBEDDED, NON_COMMERCIAL, VARIANTS

KLEINS = [row for name, row in VARIANTS.items() if name != EMBEDDED]


def test_the_family_is_complete() -> None:
    assert [row.name for row in KLEINS] == ["klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b", "klein-9b-kv"]
    assert {row.repo for row in KLEINS} == {
        f"black-forest-labs/FLUX.2-klein-{end}" for end in ("4B", "base-4B", "9B", "base-9B", "9b-kv")
    }


def test_the_4b_is_free_and_the_9b_is_not() -> None:
    for row in KLEINS:
        nine = "9b" in row.name
        assert (row.licence, row.gated, row.hidden) == (
            (NON_COMMERCIAL, True, 4096) if nine else (APACHE, False, 3072)
        ), row.name


def test_base_models_are_guided_and_distilled_ones_are_not() -> None:
    for row in KLEINS:
        assert (row.steps, row.guidance) == ((50, 4.0) if "base" in row.name else (4, 1.0))
        assert row.kv == row.name.endswith("-kv")


def test_files_are_the_published_ones() -> None:
    """Compare sizes and hashes with those on the hub's pages.

    The table's rows name the sources.
    """
    files = [file for row in KLEINS for file in row.files]
    assert len({(file.repo, file.name) for file in files}) == len(files) == 14
    assert all(file.name.startswith("flux-2-klein-") and file.name.endswith(".safetensors") for file in files)
    assert len({file.sha256 for file in files if file.sha256}) == sum(1 for file in files if file.sha256)
    sizes = {row.name: [file.bytes for file in row.files if file.format == "bf16"] for row in KLEINS}
    assert {name: size for name, (size,) in sizes.items()} == {
        "klein-4b": 7_751_105_712,
        "klein-base-4b": 7_751_105_712,
        "klein-9b": 18_157_185_168,
        "klein-base-9b": 18_157_185_168,
        "klein-9b-kv": 18_157_185_168,
    }
    for row in KLEINS:
        assert row.files[0].repo == row.repo
        assert [file.format for file in row.files] == ["bf16", "fp8", "nvfp4"][: len(row.files)]
