"""Text comes in whole characters, stop strings never show, and nothing is lost on the way."""

from hypothesis import given
from hypothesis import strategies as st

from generator.backends.toy import EOS, ByteTokenizer
from generator.core.completion import Completion
from generator.core.events import Delta, FinishReason
from generator.core.requests import StopParams
from generator.core.sequences import TokenLogprob
from generator.core.text import IncrementalDecoder, StopMatcher


@given(st.text(), st.data())
def test_any_cut_of_the_bytes_gives_the_same_text_in_whole_characters(text: str, data: st.DataObject) -> None:
    raw, decoder, pieces = text.encode(), IncrementalDecoder(), []
    at = 0
    while at < len(raw):
        size = data.draw(st.integers(1, 4))
        pieces.append(decoder.add(raw[at : at + size]))
        at += size
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces) or "�" in text


@given(st.text(alphabet="ab "), st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=4), st.data())
def test_what_is_shown_ends_where_the_first_stop_begins(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher, shown, matched, at = StopMatcher(tuple(stops)), "", None, 0
    while at < len(text) and matched is None:
        size = data.draw(st.integers(1, 3))
        piece, matched = matcher.add(text[at : at + size])
        shown += piece
        at += size
        assert not any(stop in shown for stop in stops)
    if matched is None:
        assert not any(stop in text for stop in stops)
        assert shown + matcher.flush() == text
    else:
        read = text[:at]
        assert text.startswith(shown + matched)
        assert len(shown) == min(read.find(stop) for stop in stops if stop in read)


def _completion(stop: StopParams, most: int = 1000) -> Completion:
    return Completion(0, stop, most, frozenset({EOS}), ByteTokenizer())


def _feed(completion: Completion, tokens: list[int], scored: bool = False) -> list[Delta]:
    deltas = []
    for token in tokens:
        if completion.reason is not None:
            break
        delta = completion.add(token, TokenLogprob(token, -1.0) if scored else None)
        if delta is not None:
            deltas.append(delta)
    return deltas


def _text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_stop_string_over_many_tokens_never_shows() -> None:
    completion = _completion(StopParams(stop=("END",)))
    deltas = _feed(completion, list(b"say EN but END and more"), scored=True)
    assert _text(deltas) == "say EN but "
    assert (completion.reason, completion.stop_match) == (FinishReason.STOP, "END")
    assert bytes(t for delta in deltas for t in delta.token_ids) == b"say EN but "
    assert [lp.token_id for delta in deltas for lp in delta.logprobs] == list(b"say EN but ")
    assert completion.num_tokens == len(b"say EN but END")


def test_an_end_token_releases_what_was_held_back() -> None:
    completion = _completion(StopParams(stop=("END",)))
    deltas = _feed(completion, [*b"the EN", EOS])
    assert _text(deltas) == "the EN"
    assert (completion.reason, completion.stop_match, completion.num_tokens) == (FinishReason.STOP, "<end>", 7)


def test_ignore_eos_goes_on_and_adds_no_text() -> None:
    completion = _completion(StopParams(ignore_eos=True), most=4)
    deltas = _feed(completion, [*b"a", EOS, *b"bc"])
    assert _text(deltas) == "abc"
    assert completion.reason is FinishReason.LENGTH
    assert [t for delta in deltas for t in delta.token_ids] == [97, EOS, 98, 99]


def test_a_stop_id_ends_without_text() -> None:
    completion = _completion(StopParams(stop_token_ids=(ord("!"),)))
    assert _text(_feed(completion, list(b"hi!no"))) == "hi"
    assert completion.stop_match == "!"


def test_a_stop_string_before_min_tokens_is_text() -> None:
    completion = _completion(StopParams(stop=("x",), min_tokens=4), most=8)
    assert _text(_feed(completion, list(b"axbcxd"))) == "axbc"
    assert completion.reason is FinishReason.STOP


def test_a_character_cut_by_the_length_is_not_shown() -> None:
    completion = _completion(StopParams(), most=3)
    deltas = _feed(completion, list("a€".encode()))
    assert _text(deltas) == "a"
    assert completion.reason is FinishReason.LENGTH
    assert sum(len(delta.token_ids) for delta in deltas) == 3


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(1, 40))
def test_deltas_cover_every_token_once_and_in_order(tokens: list[int], most: int) -> None:
    completion = _completion(StopParams(stop=("ab",)), most)
    deltas = _feed(completion, tokens, scored=True)
    if completion.reason is None:
        last = completion.end(FinishReason.CANCELLED)
        deltas += [last] if last is not None else []
    covered = [t for delta in deltas for t in delta.token_ids]
    assert covered == tokens[: len(covered)]
    if completion.reason is not FinishReason.STOP:
        assert len(covered) == min(len(tokens), most)
