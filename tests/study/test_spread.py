"""The plan of a study on several GPUs, by arithmetic."""

from dataclasses import replace
from itertools import pairwise

import pytest

from pipeline.study.experiment import Experiment
from pipeline.study.gpu_hours import Evaluating, predict
from pipeline.study.plan import Plan, make_plan
from pipeline.study.spread import EFFICIENCY, Spread, spread


@pytest.fixture(scope="module")
def gemma() -> Plan:
    return make_plan(Experiment.load("gemma-2-2b"))


def of_cards(found: Spread) -> dict[str, float]:
    return {stage.name: stage.work for stage in found.stages if stage.name != "tokenize"}


def test_one_gpu_takes_what_the_study_takes(gemma: Plan) -> None:
    one, found = predict(gemma), spread(gemma, 1)
    assert sum(of_cards(found).values()) == pytest.approx(3600 * one.hours, rel=1e-3)
    assert found.disk == int(one.disk)
    assert found.wall == pytest.approx(3600 * one.hours + found.stages[0].wall, rel=1e-3)


def test_more_gpus_take_less_time_and_never_less_work(gemma: Plan) -> None:
    found = [spread(gemma, workers) for workers in (1, 2, 4, 8, 64)]
    for few, many in pairwise(found):
        assert many.wall < few.wall
        assert all(many_work >= 0.999 * of_cards(few)[name] for name, many_work in of_cards(many).items())
    for one in found:
        efficiency = EFFICIENCY if one.workers > 1 else 1.0
        for stage in one.stages[1:]:
            assert stage.wall >= 0.999 * stage.work / one.workers / efficiency
            assert stage.wall >= stage.longest


def test_a_text_is_tokenized_once_however_many_gpus_there_are(gemma: Plan) -> None:
    assert spread(gemma, 64).stages[0] == spread(gemma, 1).stages[0]
    assert spread(make_plan(Experiment.load("synthetic")), 2).stages[0].wall == 0


def test_every_random_sae_and_baseline_is_counted(gemma: Plan) -> None:
    experiment = gemma.experiment

    def with_nulls(draws: int) -> Evaluating:
        evaluate = experiment.evaluate.model_copy(update={"null_draws": draws})
        return Evaluating.of(replace(gemma, experiment=experiment.model_copy(update={"evaluate": evaluate})))

    two, three, four = (with_nulls(draws) for draws in (2, 3, 4))
    assert four.each - three.each == pytest.approx(three.each - two.each)
    assert three.each - two.each > three.baseline  # its rows are encoded once more, to find a threshold
    of_a_seed = [sae for sae in gemma.saes if (sae.seed, sae.layer) == (0, 5)]
    alone = sum(two.seconds([sae]) - two.heldout - two.texts for sae in of_a_seed)
    together = two.seconds(of_a_seed) - two.heldout - two.texts
    assert alone - together == pytest.approx((len(of_a_seed) - 1) * two.baseline)
