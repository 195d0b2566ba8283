"""SAEs cut into pieces for workers."""

from collections.abc import Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from pipeline.study.cutting import pieces
from pipeline.study.experiment import Experiment
from pipeline.study.gpu_hours import training_seconds
from pipeline.study.plan import make_plan

Group = list[tuple[int, float]]


def seconds(reading: float, piece: Sequence[tuple[int, float]]) -> float:
    return reading + sum(took for _, took in piece)


def last(cut: Sequence[Sequence[tuple[int, float]]], workers: int, reading: float) -> float:
    """When the last of so many workers ends, each taking the next piece when it is free."""
    ends = [0.0] * workers
    for piece in cut:
        ends.sort()
        ends[0] += seconds(reading, piece)
    return max(ends)


@given(
    st.lists(st.lists(st.floats(1, 5), max_size=40), max_size=4), st.integers(1, 20), st.sampled_from([0.001, 10.0, 1000.0])
)
def test_every_sae_is_in_one_piece_of_its_group(takes: list[list[float]], workers: int, reading: float) -> None:
    groups: list[Group] = [[(number, took) for took in group] for number, group in enumerate(takes)]
    cut = pieces(groups, workers, lambda piece: seconds(reading, piece))
    assert all(len({number for number, _ in piece}) == 1 for piece in cut)
    for number, group in enumerate(groups):
        assert sorted(chain(*(piece for piece in cut if piece[0][0] == number))) == sorted(group)
    each = [seconds(reading, piece) for piece in cut]
    assert workers == 1 or each == sorted(each, reverse=True)
    assert last(cut, workers, reading) <= 1.06 * last([group for group in groups if group], workers, reading)


def test_pieces_are_small_where_rows_are_cheap_and_large_where_they_are_dear() -> None:
    groups: list[Group] = [[(number, 1.0)] * 33 for number in range(3)]
    small, large, whole = (
        pieces(groups, workers, lambda piece, reading=reading: seconds(reading, piece))
        for workers, reading in ((8, 0.01), (8, 6.0), (1, 0.01))
    )
    assert max(map(len, small)) <= 4
    assert last(small, 8, 0.01) < 1.06 * 99 / 8
    assert len(large) == 8
    assert whole == groups


def test_arms_that_take_longer_share_a_piece_with_fewer() -> None:
    plan = make_plan(Experiment.load("gemma-2-2b"), layers=[5])
    cut = pieces([plan.to_train], 4, lambda piece: training_seconds(piece, 2304))
    each = [training_seconds(piece, 2304) for piece in cut]
    assert sum(each) / 4 * 1.1 > last([[(0, took)] for took in each], 4, 0.0)
    assert len(set(map(len, cut))) > 1
