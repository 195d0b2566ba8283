import json

import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import Study

from pipeline.evaluate.examples import CONTEXTS, SHOWN, LatentStatistics, choose
from pipeline.models.language import load_tokenizer
from pipeline.sae.formats import read_sae
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore
from pipeline.study.evaluations import EVALUATIONS


def statistics(density: list[float], pairs: list[int], captured: list[int]) -> LatentStatistics:
    return LatentStatistics(
        density_F=torch.tensor(density, dtype=torch.float64), pairs_F=torch.tensor(pairs), captured_F=torch.tensor(captured)
    )


def test_the_most_and_least_captured_and_a_spread_of_densities() -> None:
    #          0    1    2    3    4    5    6    7    8    9   10   11   12
    density = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.1, 0.1, 0.1]
    pairs = [4, 4, 2, 2, 1, 4, 4, 0, 0, 0, 0, 0, 0]
    captured = [4, 1, 2, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0]
    chosen = choose(statistics(density, pairs, captured))
    assert [latent for latent, why in chosen.items() if why == "most captured"] == [0, 2, 4]
    assert [latent for latent, why in chosen.items() if why == "least captured"] == [5, 3, 1]
    assert [latent for latent, why in chosen.items() if why == "density"] == [6, 8, 10, 12]


def test_where_little_fires_little_is_shown() -> None:
    assert choose(statistics([0.5, 0.0, 0.1], [0, 0, 0], [0, 0, 0])) == {0: "density", 2: "density"}
    assert choose(statistics([0.0], [0], [0])) == {}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40))
def test_ten_latents_that_fire_are_shown_or_all_there_are(values: list[tuple[int, int, int]]) -> None:
    # A latent in a pair fires.
    density = [(fires or pairs) / 10 for fires, pairs, _ in values]
    chosen = choose(statistics(density, [p for _, p, _ in values], [min(p, c) for _, p, c in values]))
    assert len(chosen) == min(SHOWN, sum(d > 0 for d in density))
    assert all(density[latent] > 0 for latent in chosen)


def test_contexts_are_where_a_latent_fires_most_and_read_as_the_text_does(study: Study) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    shard = store.layout.shards - 1
    x_RD = torch.cat(list(rows_in_order(store, 2, [shard])))
    sequence, position, token = (
        store.read_field(name, *store.row_range(shard)) for name in ("sequence", "position", "token_id")
    )
    where = {(int(s), int(p)): row for row, (s, p) in enumerate(zip(sequence, position, strict=True))}
    assert study.plan.model
    tokenizer = load_tokenizer(str(study.workspace.folder(study.plan.model)))
    for planned in study.plan.saes:
        f_RF = read_sae(study.workspace.folder(planned.artefact)).encode(x_RD)
        shown = json.loads((study.workspace.folder(planned.evaluation) / EVALUATIONS["examples"].file).read_text())
        assert shown["reason"] is None
        assert len(shown["latents"]) == SHOWN
        for latent in shown["latents"]:
            f_R = f_RF[:, latent["latent"]]
            contexts = latent["contexts"]
            assert 0 < len(contexts) <= CONTEXTS
            assert len({context["sequence"] for context in contexts}) == len(contexts)
            assert [c["strength"] for c in contexts] == sorted((c["strength"] for c in contexts), reverse=True)
            assert abs(contexts[0]["strength"] - float(f_R.max())) < 1e-4
            for context in contexts:
                row = where[context["sequence"], context["position"]]
                assert abs(context["strength"] - float(f_R[row])) < 1e-4
                # The strongest of its sequence.
                assert float(f_R[torch.from_numpy(sequence == context["sequence"])].max()) <= context["strength"] + 1e-4
                assert context["token"] == tokenizer.decode([int(token[row])])
                assert context["before"]
