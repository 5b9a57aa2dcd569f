"""Untrusted text is shown, and steers neither a terminal nor a page."""

from __future__ import annotations

from iterdpo.escape import printable, revealed, visible


def test_what_a_terminal_would_obey_is_written_out_on_one_line() -> None:
    assert printable("red \x1b[31m\r\nbell \x07 \u202e \ud800 naïve 🎬") == (
        r"red \x1b[31m\r\nbell \x07 \u202e \ud800 naïve 🎬"
    )


def test_control_characters_become_their_pictures_and_lines_stay() -> None:
    assert visible("a\x1b[31m\x00\r\nb\tc \x85 \ud800") == "a␛[31m␀\nb\tc \ufffd \ufffd"
    assert visible("مرحبا \u202eevil\u202c") == "مرحبا \u202eevil\u202c"  # a page isolates directions itself


def test_what_a_browser_would_hide_is_shown() -> None:
    assert (
        revealed("a\x1b[31m \u202eevil\u202c\u200b \x07\r\nb\tc \ud800")
        == "a␛[31m ‹U+202E›evil‹U+202C›‹U+200B› ␇\nb\tc �"
    )
    assert revealed("👩‍👩‍👧 naïve مرحبا") == "👩‍👩‍👧 naïve مرحبا"
