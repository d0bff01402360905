"""Searches: what is refused, how lists are fused, what filters let through."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from retriever_fakes import FakeEncoder, FakeIndex, bag_of_words, make_chunk

from chassis.errors import Code, PlatformError
from retriever.core.filters import Condition, Operator, parse_condition
from retriever.core.fusion import fuse
from retriever.core.search import Mode, Query, Searcher, make_query


def query(text: str = "zebra", **fields: object) -> Query:
    return make_query(**{"tenant": "acme", "text": text, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": " \n"}, "query"),
        ({"text": "x" * 40_000}, "query"),
        ({"text": "\ud800"}, "query"),
        ({"top_k": 101}, "top_k"),
        ({"top_k": 10**9}, "top_k"),
        ({"collection": 'a" or "1'}, "collection"),
        ({"collection": "ä"}, "collection"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": 'x" or tenant != "zzz'}, "tenant"),
        ({"vector": [float("nan")] * 384}, "query_vector"),
        ({"vector": [0.0] * 384}, "query_vector"),
        ({"min_score": float("nan")}, "min_score"),
        ({"conditions": [Condition("a", Operator.EQ, (1,))] * 33}, "filter"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_its_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(PlatformError) as raised:
        query(**fields)
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, param)


def test_a_query_has_the_documented_defaults() -> None:
    found = query()
    assert (found.scope.collection, found.top_k, found.mode) == ("default", 5, Mode.DENSE)


def test_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    fused = fuse([["a", "b", "c"], ["b", "d"]])
    assert fused == [
        ("b", pytest.approx(1 / 62 + 1 / 61)),
        ("a", pytest.approx(1 / 61)),
        ("d", pytest.approx(1 / 62)),
        ("c", pytest.approx(1 / 63)),
    ]


@given(st.lists(st.lists(st.text("abcdef", min_size=1, max_size=2), unique=True), max_size=3))
def test_fusion_names_each_key_once_and_keeps_the_order_of_a_single_list(rankings: list[list[str]]) -> None:
    fused = [key for key, _ in fuse(rankings)]
    assert sorted(fused) == sorted({key for ranking in rankings for key in ranking})
    if len(rankings) == 1:
        assert fused == rankings[0]


@pytest.mark.parametrize(
    ("operator", "values", "metadata", "holds"),
    [
        (Operator.EQ, ["1958"], {"k": 1958}, True),
        (Operator.EQ, ["1958"], {"k": "1958"}, False),
        (Operator.EQ, ["1"], {"k": True}, False),
        (Operator.EQ, ["1.0"], {"k": 1}, True),
        (Operator.EQ, ["null"], {"k": None}, True),
        (Operator.EQ, ["null"], {}, False),
        (Operator.NE, ['"a"'], {"k": "b"}, True),
        (Operator.NE, ['"a"'], {"k": "a"}, False),
        (Operator.NE, ['"a"'], {}, True),
        (Operator.LT, ["3"], {"k": 2}, True),
        (Operator.LE, ["3"], {"k": 3}, True),
        (Operator.GT, ['"b"'], {"k": "c"}, True),
        (Operator.GE, ["3"], {"k": 2.9}, False),
        (Operator.GE, ["3"], {"k": "4"}, False),
        (Operator.LT, ["3"], {"k": None}, False),
        (Operator.IN, ['"a"', "2"], {"k": 2}, True),
        (Operator.IN, ['"a"', "2"], {"k": "2"}, False),
        (Operator.EQ, ['"\\" or 1 == 1"'], {"k": "x"}, False),
    ],
)
def test_conditions_compare_values_of_one_type(
    operator: Operator, values: list[str], metadata: dict[str, object], holds: bool
) -> None:
    assert parse_condition("k", operator, values).holds(metadata) is holds


@pytest.mark.parametrize(
    ("key", "operator", "values"),
    [
        ("", Operator.EQ, ["1"]),
        ("k" * 200, Operator.EQ, ["1"]),
        ("k", Operator.EQ, []),
        ("k", Operator.EQ, ["1", "2"]),
        ("k", Operator.IN, ["1"] * 101),
        ("k", Operator.EQ, ["{"]),
        ("k", Operator.EQ, ["[1]"]),
        ("k", Operator.EQ, ["NaN"]),
    ],
)
def test_a_condition_that_means_nothing_is_refused(key: str, operator: Operator, values: list[str]) -> None:
    with pytest.raises(PlatformError) as raised:
        parse_condition(key, operator, values)
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, "filter")


class TestSearcher:
    @pytest.fixture
    async def searcher(self) -> Searcher:
        index = FakeIndex()
        chunks = [make_chunk("zebras", i, f"zebra zebra number{i}", metadata_json='{"n":0}') for i in range(60)]
        chunks += [
            make_chunk(f"d{i}", text=f"a zebra and other animals {i}", metadata_json=json.dumps({"n": i}))
            for i in range(1, 40)
        ]
        chunks.append(make_chunk("heat", text="heat in a boundary layer", metadata_json='{"n":-1}'))
        await index.write([(chunk, bag_of_words(chunk.text)) for chunk in chunks])
        return Searcher(FakeEncoder(), index)

    @pytest.mark.parametrize("mode", list(Mode))
    async def test_every_mode_finds_and_cuts_to_top_k(self, searcher: Searcher, mode: Mode) -> None:
        hits = await searcher.search(query("boundary layer", mode=mode, top_k=3))
        assert hits[0].document_id == "heat" and len(hits) <= 3
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    @pytest.mark.parametrize("mode", list(Mode))
    async def test_grouping_gives_each_document_once_however_many_chunks_lead(
        self, searcher: Searcher, mode: Mode
    ) -> None:
        hits = await searcher.search(query("zebra", mode=mode, top_k=20, group_by_document=True))
        assert len({hit.document_id for hit in hits}) == len(hits) == 20

    @pytest.mark.parametrize("mode", list(Mode))
    async def test_a_filter_finds_what_lies_far_down(self, searcher: Searcher, mode: Mode) -> None:
        condition = parse_condition("n", Operator.GE, ["38"])
        hits = await searcher.search(query("zebra zebra", mode=mode, top_k=5, conditions=[condition]))
        assert {hit.document_id for hit in hits} == {"d38", "d39"}

    async def test_hits_below_the_least_score_are_left_out(self, searcher: Searcher) -> None:
        hits = await searcher.search(query("heat in a boundary layer", min_score=0.9))
        assert [hit.document_id for hit in hits] == ["heat"]

    async def test_a_given_vector_is_used_in_place_of_the_encoder(self, searcher: Searcher) -> None:
        vector = [float(v) * 7 for v in bag_of_words("boundary layer heat in a")]
        (hit,) = await searcher.search(query("anything", vector=vector, top_k=1))
        assert hit.document_id == "heat" and hit.score == pytest.approx(1.0, abs=1e-3)
