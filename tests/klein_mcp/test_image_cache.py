"""Images in memory: the latest used are kept, within a budget, from any thread."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from klein_mcp.images.cache import ImageCache


@pytest.fixture
def cache() -> ImageCache[bytes]:
    return ImageCache(10, len)


def test_image_used_least_recently_is_evicted(cache: ImageCache[bytes]):
    cache.add("a", b"1234")
    cache.add("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.add("c", b"1234")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"1234", None, b"1234")


def test_image_added_again_counts_once_and_as_used(cache: ImageCache[bytes]):
    cache.add("a", b"12345")
    cache.add("b", b"12345")
    cache.add("a", b"12345")
    cache.add("c", b"12345")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"12345", None, b"12345")


def test_image_beyond_the_budget_evicts_no_other(cache: ImageCache[bytes]):
    cache.add("a", b"1234")
    cache.add("b", bytes(11))
    assert (cache.get("a"), cache.get("b")) == (b"1234", None)


def test_many_threads_keep_the_budget(cache: ImageCache[bytes]):
    choice = random.Random(1)
    names = [choice.choice("abcdefgh") for _ in range(4000)]

    def use(name: str) -> None:
        assert cache.get(name) in (None, b"1234")
        cache.add(name, b"1234")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, names))
    assert sum(cache.get(name) is not None for name in "abcdefgh") == 2
