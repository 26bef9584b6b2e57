"""Switches as a user types them, and the chunks where they happen."""

import pytest

from streamt1_jax.config import StreamConfig
from streamt1_jax.errors import BadInputError
from streamt1_jax.segments import (
    Script,
    Segment,
    first_frame,
    parse_switch,
    plan_switches,
    scripts_of_lines,
)

STREAM = StreamConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5.25s=a blue square", (5.25, "a blue square")),
        (" 5s = a blue square ", (5.0, "a blue square")),
        ("84f=x=y", (5.25, "x=y")),
        (".5s=кот 🐈", (0.5, "кот 🐈")),
    ],
)
def test_a_switch_is_read(text, expected):
    assert parse_switch(text) == expected


@pytest.mark.parametrize("text", ["", "5.25", "5.25=x", "x=5.25s", "-1s=x", "1e3s=x", "nans=x", "5.25s"])
def test_another_form_is_refused(text):
    with pytest.raises(BadInputError, match="TIME=PROMPT"):
        parse_switch(text)


@pytest.mark.parametrize("text", ["5s=", "5s=  "])
def test_an_empty_prompt_is_refused(text):
    with pytest.raises(BadInputError, match="prompt is empty"):
        parse_switch(text)


@pytest.mark.parametrize(
    ("seconds", "chunk"), [(9 / 16, 1), (0.2, 1), (5.25, 7), (81 / 16, 7), (87 / 16, 8), (93 / 16, 8), (30, 40)]
)
def test_a_switch_goes_to_the_nearest_chunk(seconds, chunk):
    assert plan_switches([(seconds, "x")], STREAM, None) == (Segment(chunk, "x"),)


def test_chunks_begin_where_their_frames_do():
    assert [first_frame(chunk, STREAM) for chunk in range(4)] == [0, 9, 21, 33]


def test_switches_come_in_order():
    planned = plan_switches({3.0: "c", 1.0: "a", 2.0: "b"}, STREAM, 7)
    assert [segment.prompt for segment in planned] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ([(0, "x")], "outside the video, expected 0.5625 s to 4.3125 s"),
        ([(5, "x")], "outside the video"),
        ([(-1, "x")], "outside the video"),
        ([(1, "x"), (1.3, "y")], "'x' and 'y' both fall on chunk 2"),
        ([(float("nan"), "x")], "expected seconds"),
        ([(True, "x")], "expected seconds"),
        ([(1, " ")], "prompt is empty"),
    ],
)
def test_what_cannot_be_switched_is_refused(switches, words):
    with pytest.raises(BadInputError, match=words):
        plan_switches(switches, STREAM, 7)


def test_a_prompts_file_continues_a_video_by_a_line_with_its_time():
    lines = ["a red circle", "@5.25s a blue square", "@84f x", "@home a cat", "@10 s", "another"]
    assert scripts_of_lines(lines) == [
        Script("a red circle", ((5.25, "a blue square"), (5.25, "x"))),
        Script("@home a cat"),
        Script("@10 s"),
        Script("another"),
    ]
    assert scripts_of_lines(lines)[0].prompts == ["a red circle", "a blue square", "x"]


def test_a_prompts_file_does_not_begin_with_a_switch():
    with pytest.raises(BadInputError, match="a prompt above it"):
        scripts_of_lines(["@5s x"])
