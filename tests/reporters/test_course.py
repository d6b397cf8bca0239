"""Memory through moments: what is drawn is what the samples and moments say."""

from __future__ import annotations

from memplan.footprint import Moment
from memplan.report.course import INSIDE, POINTS, of_moments, of_samples
from memplan.simulation import Sample


def samples(moment: str, changes: list[tuple[str, int]], start: int) -> list[Sample]:
    found, allocated = [], start
    for index, (category, change) in enumerate(changes):
        allocated += change
        found.append(
            Sample(
                index=index,
                moment=moment,
                allocated_bytes=allocated,
                reserved_bytes=2 * allocated,
                operator="",
                module="",
                category=category,
            )
        )
    return found


def test_each_stretch_is_drawn_at_its_largest_point() -> None:
    load = samples("load", [("weights", 100)] * 50, 0)
    step = samples("1.forward", [("activations", 70), ("activations", -70)] * 50, 5000)
    course = of_samples([*load, *step])

    assert [stretch.moment for stretch in course] == ["load", "1.forward"]
    assert [len(stretch.points) for stretch in course] == [13, 15]
    assert all(len(stretch.points) <= POINTS for stretch in course)
    assert course[0].points[-1].parts["weights"] == 5000
    for point in course[1].points:
        assert (point.allocated_bytes, point.reserved_bytes) == (5070, 10140)


def test_a_micro_batch_s_moments_come_again_in_their_order() -> None:
    told = []
    for moment, change in (("1.forward", 10), ("1.backward", -10)) * 2:
        start = told[-1].allocated_bytes if told else 0
        told += samples(moment, [("activations", change)], start)
    course = of_samples(told)

    assert [one.moment for one in course] == ["1.forward", "1.backward"] * 2
    assert [one.points[0].allocated_bytes for one in course] == [10, 0, 10, 0]


def test_moments_have_parts_that_sum_and_none_below_zero() -> None:
    """An estimate takes off of the weights what is not there yet while they load."""
    moment = Moment(
        label="load",
        allocated_bytes=60,
        reserved_bytes=80,
        breakdown={"weights": 100, "activations": -40},
    )
    (stretch,) = of_moments([moment])
    (point,) = stretch.points

    assert point.parts == {**dict.fromkeys(INSIDE, 0), "weights": 60}
    assert (point.allocated_bytes, point.reserved_bytes) == (60, 80)


def test_without_categories_nothing_is_drawn() -> None:
    moment = Moment(label="2.step", allocated_bytes=60, reserved_bytes=80)

    assert of_moments([moment]) == ()
