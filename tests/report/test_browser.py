"""The browser of latents: what it is given, how much of it fits, and how it behaves in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import Study

from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.browsing import CONTEXTS, LATENTS, PAIRS
from pipeline.evaluate.capture import measure_capture
from pipeline.report.browser import browser
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.report.results import Row
from pipeline.sae.finished import open_sae

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


@pytest.fixture(scope="module")
def rows(study: Study) -> list[Row]:
    return list(collect(study.plan, study.workspace).rows)


def test_the_file_has_the_pairs_that_fire_together_most_and_their_texts(study: Study) -> None:
    (sae,) = [sae for sae in study.plan.saes if sae.arm == "full"]
    found = json.loads(study.workspace.verified(sae.apart["browsing"], "browsing.json").read_text())
    layer = LayerBench(study.plan, 2, study.workspace)
    on = Bench(layer, sae, open_sae(sae.artefact, study.workspace), ProbeScores(model={}, sae=None))
    capture, latents = on.once(measure_capture), {latent["latent"]: latent for latent in found["latents"]}
    first = [pair["latents"] for pair in found["pairs"]]
    strongest = capture.cofiring.by_strength.pair_P2[: capture.n].tolist()
    assert min(first, key=strongest.index) == strongest[0]
    for captured in (True, False):
        of_kind = [pair for pair in found["pairs"] if pair["captured"] == captured]
        assert len(of_kind) <= PAIRS
        assert [pair["strength"] for pair in of_kind] == sorted((pair["strength"] for pair in of_kind), reverse=True)
    assert {latent for pair in found["pairs"] for latent in pair["latents"]} <= set(latents)
    assert len(latents) == len(found["latents"]) <= LATENTS
    f_RF = torch.cat(list(on.latents))
    for number, latent in latents.items():
        assert latent["density"] == pytest.approx(float((f_RF[:, number] > 0).double().mean()))
        strengths = [one["strength"] for one in latent["contexts"]]
        assert strengths[0] == float(f_RF[:, number].max())
        assert strengths == sorted(strengths, reverse=True)
        assert 0 < len(strengths) <= CONTEXTS
    (pair,) = found["pairs"][:1]
    i, j = pair["latents"]
    assert pair["cosine"] == pytest.approx(float(on.sae.W_dec_FD[i] @ on.sae.W_dec_FD[j]), abs=1e-6)
    assert pair["strength"] == pytest.approx(float((f_RF[:, i] * f_RF[:, j]).sum()), rel=1e-4)


@pytest.mark.parametrize("room", [30_000, 90_000, 10_000_000])
def test_it_takes_no_more_room_than_it_has(rows: list[Row], room: int) -> None:
    data = browser(rows, room)
    assert data is not None
    assert len(data.encode()) < room + 1_000
    saes = json.loads(data)
    assert [sae["name"] for sae in saes] == [f"{row.arm}, seed 0, layer 2" for row in rows]
    for sae in saes:
        numbers = [latent[0] for latent in sae["latents"]]
        assert len(set(numbers)) == len(numbers) > 0
        assert {latent for pair in sae["pairs"] for latent in pair[:2]} <= set(numbers)
        densities = [latent[1] for latent in sae["latents"]]
        assert densities == sorted(densities, reverse=True)
    assert browser(rows, 100) is None
    assert browser([], room) is None


def test_a_text_cannot_end_the_script(rows: list[Row]) -> None:
    browsing = rows[0].browsing
    assert browsing is not None
    evil = browsing.latents[0].contexts[0].model_copy(update={"token": "</script><!--<script>\u2028"})
    latent = browsing.latents[0].model_copy(update={"contexts": (evil,)})
    row = rows[0].model_copy(update={"browsing": browsing.model_copy(update={"latents": (latent,), "pairs": ()})})
    data = browser([row])
    assert data is not None
    assert "<" not in data
    assert json.loads(data)[0]["latents"][0][4][0][2] == evil.token


def test_the_page_stays_small_and_results_json_has_no_texts(study: Study, tmp_path: Path) -> None:
    results = collect(study.plan, study.workspace)
    many = tuple(row.model_copy(update={"seed": seed}) for seed in range(60) for row in results.rows)
    page = Path(write_report(results.model_copy(update={"rows": many}), tmp_path))
    assert 3_000_000 < page.stat().st_size < 8_000_000
    assert '"captured": true' not in (tmp_path / "results.json").read_text()


def in_chromium(page: str, script: str, folder: Path) -> Any:
    """What a script finds on a page: it assigns to `found`."""
    wrapped = f"let found; {script}; document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';"
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{wrapped}</script></body>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    (text,) = re.findall("FOUND(.*)END", done.stdout, re.DOTALL)
    return json.loads(html.unescape(text))


@needs_chromium
def test_it_searches_and_moves_by_keyboard(study: Study, tmp_path: Path) -> None:
    page = Path(write_report(collect(study.plan, study.workspace), tmp_path / "report")).read_text()
    data = json.loads(re.findall(r'id="browser-data">(.*?)</script>', page, re.DOTALL)[0])
    latent = data[1]["latents"][3]
    found = in_chromium(
        page,
        f"""
        const get = (name) => document.getElementById("browser-" + name), list = get("list");
        const set = (name, value) => {{ get(name).value = value; get(name).dispatchEvent(new Event("input")); }};
        const press = (key) => list.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
        const titles = () => [...list.children].map((item) => item.firstChild.textContent);
        const shown = () => [...get("shown").querySelectorAll("h3")].map((title) => title.textContent);
        found = {{ count: get("count").textContent, saes: [...get("sae").options].map((option) => option.text) }};
        press("ArrowDown"); press("ArrowDown"); press("ArrowUp");
        found.second = shown();
        found.active = list.getAttribute("aria-activedescendant");
        press("End");
        found.last = [titles().length, shown()];
        set("sae", "1"); set("latent", "{latent[0]}");
        found.latent = [titles(), shown(), get("shown").querySelectorAll("mark").length];
        set("latent", ""); set("least", "{100 * latent[1]}");
        found.dense = titles();
        set("least", ""); set("text", "no such text anywhere");
        found.none = [titles(), shown(), get("count").textContent];
        set("text", ""); set("what", "captured");
        found.pair = [titles().length, shown()];
        """,
        tmp_path,
    )
    first, chosen = data[0], data[1]
    assert found["count"] == f"{len(first['latents'])} latents"
    assert found["saes"] == [sae["name"] for sae in data]
    assert found["second"] == [f"Latent {first['latents'][1][0]}"]
    assert found["active"] == "browser-1"
    assert found["last"] == [len(first["latents"]), [f"Latent {first['latents'][-1][0]}"]]
    assert f"Latent {latent[0]}" in found["latent"][0]
    assert found["latent"][2] > 0
    assert found["dense"] == [f"Latent {one[0]}" for one in chosen["latents"] if one[1] >= latent[1]]
    assert found["none"] == [[], [], "no latents"]
    captured = [pair for pair in chosen["pairs"] if pair[4]]
    assert found["pair"] == [len(captured), [f"Latent {number}" for number in captured[0][:2]]]
