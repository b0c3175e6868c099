"""Streamed text is the whole text, in whole characters."""

import pytest

from moejax.serve.text import TextStream, stream_text


def decode(ids):
    """A byte-level vocabulary of 256."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("text", ["", "plain", "naïve 日本語 🙂🙂 e\u0301nd", "🙂"])
def test_pieces_are_whole_characters_and_join_to_the_text(text, size):
    data = list(text.encode())
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    pieces = list(stream_text(decode, chunks))
    assert "".join(pieces) == text
    assert all(piece and "\ufffd" not in piece for piece in pieces)


def test_text_shows_as_soon_as_it_is_there():
    pieces = stream_text(decode, iter([[104, 105], [0xF0, 0x9F], [0x99, 0x82], [33]]))
    assert list(pieces) == ["hi", "🙂", "!"]


def test_bytes_that_never_become_a_character_show_at_the_end():
    data = [97, 0xF0, 0x9F]
    assert "".join(stream_text(decode, [[b] for b in data])) == decode(data)


def test_broken_bytes_in_the_middle_do_not_stop_the_stream():
    data = [97, 0xFF, 98, 99]
    pieces = list(stream_text(decode, [[b] for b in data]))
    assert "".join(pieces) == "a\ufffdbc"
    assert pieces[0] == "a"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_is_found_across_pieces_and_never_shown(size):
    data = list(b"one, two; three, four")
    stream = TextStream(decode, ("; th", "zz", ", f"))
    pieces = [stream.push(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(pieces) == "one, two" and stream.stopped
    assert stream.num_ids == len("one, two; th")
    assert stream.push([97], last=True) == ""


def test_what_might_become_a_stop_waits_and_then_shows():
    stream = TextStream(decode, ("abc",))
    pieces = [stream.push(list(text.encode())) for text in ("xa", "b", "ab", "d")]
    assert pieces == ["x", "", "ab", "abd"]
    assert stream.push(list(b"ab"), last=True) == "ab"
    assert not stream.stopped and stream.num_ids == 8


def test_the_first_of_two_stops_counts():
    stream = TextStream(decode, ("d", "bc"))
    assert stream.push(list(b"abcd")) == "a"
    assert stream.num_ids == 3
