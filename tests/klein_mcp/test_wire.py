"""Messages come out of the wire as they went in, anything else is refused."""

import json
import struct
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import contract
from engine.contract import (
    Aspect,
    Busy,
    ChangeMask,
    EngineError,
    Event,
    Exact,
    Fix,
    InvalidJob,
    Job,
    KeepSource,
    Loading,
    Native,
    Queued,
    Result,
    Stage,
    Step,
)
from klein_mcp.daemon import wire

texts = st.text(max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
seeds = st.integers(0, 2**63 - 1)
sides = st.integers(1, 5)
pictures = st.builds(
    lambda h, w, data: np.frombuffer(data.ljust(h * w * 3, b"\0")[: h * w * 3], np.uint8).reshape(h, w, 3),
    sides,
    sides,
    st.binary(max_size=75),
)
jobs = st.builds(
    Job,
    prompt=texts,
    references=st.lists(pictures, max_size=3).map(tuple),
    size=st.one_of(
        st.just(Native()),
        st.builds(Exact, st.integers(16, 2048), st.integers(16, 2048)),
        st.builds(Aspect, st.integers(1, 99), st.integers(1, 99)),
        st.builds(KeepSource, st.booleans()),
    ),
    seed=seeds,
    model=texts,
    steps=st.none() | st.integers(1, 50),
    guidance=st.none() | numbers,
    find_change=st.booleans(),
)
changes = st.builds(
    ChangeMask,
    opacity=pictures.map(lambda picture: picture[:, :, 0]),
    whole=st.booleans(),
    faint=numbers,
    faint_box=st.none() | st.tuples(*[st.integers(0, 9)] * 4),
    shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    drift=numbers,
)
paintings = st.builds(
    Result,
    image=pictures,
    seed=seeds,
    model=texts,
    fingerprint=texts,
    steps=st.integers(1, 50),
    guidance=numbers,
    ms=st.dictionaries(texts, numbers, max_size=3),
    cache=st.dictionaries(st.sampled_from(["prompt", "references"]), st.sampled_from(["hit", "miss", "none"])),
    warnings=st.lists(texts, max_size=3).map(tuple),
    change=st.none() | changes,
    read_as=texts,
    painted=st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
)
messages = st.one_of(
    jobs,
    paintings,
    st.builds(Queued, st.integers(0, 99)),
    st.builds(Loading, texts, st.floats(0, 1)),
    st.builds(Stage, st.sampled_from(["prompt", "references", "denoise", "decode"])),
    st.builds(Step, st.integers(0, 50), st.integers(1, 50)),
)


@given(messages)
def test_a_message_comes_out_as_it_went_in(message):
    assert wire.decode(wire.encode(message)) == message


@given(st.lists(messages, max_size=4), st.integers(1, 50))
def test_a_stream_cut_anywhere_gives_the_same_messages(sent, size):
    stream = b"".join(map(wire.encode, sent))
    frames, got = wire.Frames(), []
    for start in range(0, len(stream), size):
        got += [wire.decode(frame) for frame in frames.feed(stream[start : start + size])]
    assert got == sent


@pytest.mark.parametrize("kind", [kind for kind in vars(contract).values() if isinstance(kind, type)])
def test_every_kind_of_the_contract_has_a_place_on_the_wire(kind):
    if issubclass(kind, EngineError):
        error = wire.decode(wire.encode(kind("What happened.", hint="What next.")))
        assert isinstance(error, EngineError)
        assert type(error) is kind
        assert (error.message, error.hint) == ("What happened.", "What next.")
    elif kind in (Job, *get_args(Event)):
        assert kind.__name__ in wire._KINDS


def test_a_busy_error_keeps_its_seconds():
    error = wire.decode(wire.encode(Busy("Full.", retry_after=7.5)))
    assert isinstance(error, Busy)
    assert error.retry_after == 7.5


@pytest.mark.parametrize("value", [0, 255])
def test_pixels_arrive_exactly_in_whatever_memory_order_they_lay(value):
    turned = np.rot90(np.full((2, 4, 3), value, np.uint8))
    job = wire.decode(wire.encode(Job("a", references=(turned,))))
    assert isinstance(job, Job)
    assert np.array_equal(job.references[0], turned)


def frame(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("!II", len(text), len(body)) + text + body


GOOD = wire.encode(Step(1, 4))


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\0\0\0",
        GOOD[:-1],
        GOOD + b"\0",
        frame(b"\xff\xfe"),
        frame(b"[1, 2"),
        frame([1, 2]),
        frame({"prompt": "no kind"}),
        frame({"kind": "Exception", "message": "x"}),
        frame({"kind": "Job", "prompt": "x", "colour": "red"}),
        frame({"kind": "Step", "done": 1}),
        frame({"kind": "Job", "prompt": "x", "references": [{"rgb8": [2, 2]}]}, bytes(11)),
        frame({"kind": "Job", "prompt": "x", "references": [{"rgb8": [2, 2]}]}, bytes(13)),
        frame({"kind": "Job", "prompt": "x", "references": [{"rgb8": [-1, -1]}]}, bytes(3)),
        frame({"kind": "Job", "prompt": "x", "references": [{"rgb8": ["2", 2]}]}, bytes(12)),
        frame({"kind": "Job", "prompt": "x", "references": [{"rgb8": [2]}]}, bytes(12)),
    ],
)
def test_bytes_that_are_no_message_are_refused_as_such(bad):
    with pytest.raises(wire.BadFrame):
        wire.decode(bad)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_never_anything_worse(noise):
    with pytest.raises(wire.BadFrame):
        wire.decode(noise)


def test_frame_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(wire.BadFrame):
        list(wire.Frames().feed(struct.pack("!II", 2**20, 2**31)))


def test_an_error_keeps_its_words_and_its_hint():
    error = wire.decode(wire.encode(InvalidJob("Too large.", hint="Ask for less.")))
    assert str(error) == "Too large. Ask for less."


def test_an_error_keeps_its_fix():
    fix = Fix("set", "device", choices=("cpu", "cuda"))
    error = wire.decode(wire.encode(InvalidJob("device is 'x'.", fix=fix)))
    assert isinstance(error, InvalidJob)
    assert error.fix == fix
