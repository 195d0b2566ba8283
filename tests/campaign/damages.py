"""Damage to files: at rest in a finished workspace, swapped among them, and in what a killed command left."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from campaign.cases import Case, Place
from campaign.crashes import STUDIES, operations
from campaign.injector import WRITE, Injector
from campaign.judge import Verdict, files, judged, refused
from campaign.reading import used
from campaign.studies import Study, made
from campaign.workers import Ended, command, run

HOWS = ("flip", "cut", "number", "fact", "gone", "older")
TEXT = (".json", ".jsonl", ".csv")
NUMBER = re.compile(r"(?<![0-9a-f\"])\d")


def damages(home: Path) -> Iterator[Case]:
    """Every file of a finished workspace, damaged in one way: all ways for the first study, a drawn one for the second."""
    for name in STUDIES:
        study, other = made(home, name), made(home, name, seed=1)
        for file in sorted(study.reference("report")):
            ways = [how for how in HOWS if _applies(how, file)]
            for how in ways if name == STUDIES[0] else random.Random(file).sample(ways, 1):
                yield Case("damage", f"{name}-{how}-{file}", partial(_damaged, study, other, how, file))


def swaps(home: Path) -> Iterator[Case]:
    """Two files or folders of one kind change places: each is valid, and each is where the other belongs."""
    for name in STUDIES:
        study = made(home, name)
        for one, other in _pairs(study):
            yield Case("swap", f"{name}-{one}--{other.partition('/')[2]}", partial(_swapped, study, one, other))


def progress(home: Path) -> Iterator[Case]:
    """What a killed command left is damaged before the same command runs again."""
    study = made(home, STUDIES[0])
    for stage, shares in (("extract", (0.5, 0.9)), ("train", (0.3, 0.6, 0.9)), ("evaluate", (0.3, 0.7))):
        for share in shares:
            left = _interrupted(study, stage, share)
            ready = study.reference(("nothing", "extract", "train")[("extract", "train", "evaluate").index(stage)])
            found = files(left)
            done = tuple(
                f"{name.removesuffix('manifest.json')}"
                for name in found
                if name.count("/") == 2 and name.endswith("/manifest.json")
            )
            for file in sorted(name for name in found if name not in ready and not name.startswith(done)):
                for how in (how for how in HOWS[:5] if how != "fact" and _applies(how, file)):
                    name = f"{stage}-{share}-{how}-{file}"
                    yield Case("progress", name, partial(_went_on, study, stage, left, how, file))


def _applies(how: str, file: str) -> bool:
    return {"number": file.endswith(TEXT), "fact": file.endswith("manifest.json")}.get(how, True)


def _damaged(study: Study, other: Study, how: str, file: str, place: Place) -> Verdict:
    path = place.fill(study.after("report")) / file
    twin = _twin(other, file) if how == "older" else None
    if (how == "older" and twin is None) or not harm(path, how, random.Random(f"{how}-{file}"), twin):
        return Verdict("harmless", "nothing to change")
    verdict = used(study, place, file)
    return Verdict(verdict.outcome, f"{how} {file}: {verdict.detail}")


def harm(path: Path, how: str, draw: random.Random, twin: Path | None = None) -> bool:
    """Damage a file; False if that leaves it as it is."""
    before = path.read_bytes()
    after: bytes | None = before
    if how == "gone":
        after = None
    elif how == "older" and twin:
        after = twin.read_bytes()
    elif how == "cut":
        after = before[: draw.choice([0, max(0, len(before) - 1), len(before) // 2])]
    elif how == "flip" and before:
        at = draw.randrange(len(before))
        after = before[:at] + bytes([before[at] ^ 1 << draw.randrange(8)]) + before[at + 1 :]
    elif how == "number":
        after = _with_another_number(before.decode(), draw).encode()
    elif how == "fact":
        after = _with_another_fact(before, draw)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return after != before


def _with_another_number(text: str, draw: random.Random) -> str:
    places = [match.start() for match in NUMBER.finditer(text)]
    if not places:
        return text
    at = draw.choice(places)
    return text[:at] + str((int(text[at]) + 1) % 9 + 1) + text[at + 1 :]


def _with_another_fact(content: bytes, draw: random.Random) -> bytes:
    record = json.loads(content)
    facts = [name for name, value in record.get("facts", {}).items() if isinstance(value, int | float)]
    if facts:
        record["facts"][draw.choice(facts)] += 7
    return json.dumps(record).encode() if facts else content


def _twin(other: Study, file: str) -> Path | None:
    """The same file of a study that differs in the seed of its model: as valid, with other bytes."""
    kind, folder, *rest = file.split("/")
    label = folder if kind == "reports" else folder.rpartition("-")[0]
    found = [
        path
        for path in (other.after("report") / kind).iterdir()
        if path.name.removesuffix(f"-{path.name.rpartition('-')[2]}") == label or path.name == label
    ]
    twin = found[0].joinpath(*rest) if len(found) == 1 else None
    return twin if twin and twin.is_file() else None


def _pairs(study: Study) -> list[tuple[str, str]]:
    names = sorted(study.reference("report"))
    by_array: dict[str, list[str]] = {}
    for name in names:
        if "/c/" in name or "/commits/" in name:
            by_array.setdefault(name.rpartition("/c/")[0] or name.rpartition("/")[0], []).append(name)
    pairs = [pair for chunks in by_array.values() for pair in list(pairwise(chunks))[:2]]
    for kind in ("saes", "evaluations", "probes"):
        folders = sorted({"/".join(name.split("/")[:2]) for name in names if name.startswith(f"{kind}/")})
        for one, other in pairwise(folders):
            pairs.append((one, other))
            inside = [name.removeprefix(one) for name in names if name.startswith(f"{one}/") and name.count("/") == 2]
            pairs += [(one + file, other + file) for file in inside if other + file in names]
    return pairs


def _swapped(study: Study, one: str, other: str, place: Place) -> Verdict:
    workspace = place.fill(study.after("report"))
    first, second, between = workspace / one, workspace / other, workspace / "between"
    if first.is_file() and first.read_bytes() == second.read_bytes():
        return Verdict("harmless", "the same content")
    first.rename(between)
    second.rename(first)
    between.rename(second)
    verdict = used(study, place, one)
    if verdict.outcome == "equal" or one.split("/", maxsplit=1)[0] in ("stores", "probes"):
        return verdict
    # The remedy is for both places.
    for name in (one, other):
        shutil.rmtree(workspace / "/".join(name.split("/")[:2]), ignore_errors=True)
    ended = Ended(0, "")
    for stage in ("train", "evaluate", "report"):
        ended = run(command(*study.argv(stage, workspace)), place.folder)
    return judged(ended, workspace, study.reference("report")) if verdict.outcome == "stuck" else verdict


def _interrupted(study: Study, stage: str, share: float) -> Path:
    """The workspace after a stage that was killed at this share of its changes."""
    left = study.toml.parent / f"killed-{stage}-{share}"
    if not left.exists():
        place = Place(study.toml.parent / f"killing-{stage}-{share}")
        workspace = place.fill(study.before(stage))
        at = int(share * len(operations(study, stage, WRITE)))
        ended = run(command(*study.argv(stage, workspace), before=Injector(workspace, (WRITE,), at)), place.folder)
        assert ended.code == -9, ended.output
        shutil.rmtree(workspace / ".locks", ignore_errors=True)
        workspace.rename(left)
    return left


def _went_on(study: Study, stage: str, left: Path, how: str, file: str, place: Place) -> Verdict:
    workspace = place.fill(left)
    if not harm(workspace / file, how, random.Random(f"{how}-{file}")):
        return Verdict("harmless", "nothing to change")
    ended = run(command(*study.argv(stage, workspace)), place.folder)
    if bad := refused(ended):
        return bad
    remedy = "--deep" if stage == "extract" else "--force"
    if ended.code == 0:
        verdict = judged(ended, workspace, study.reference(stage))
        # Rows that were committed are checked when they are read, as those of a whole store are.
        if (
            verdict.outcome != "silent"
            or not file.startswith(("stores/", "probes/"))
            or not _verify_finds(workspace, file, place)
        ):
            return verdict
    if "move it away" in ended.last_line:
        shutil.rmtree(workspace / "/".join(file.split("/")[:2]))
    again = judged(run(command(*study.argv(stage, workspace, remedy)), place.folder), workspace, study.reference(stage))
    return Verdict("detected" if again.outcome == "equal" else again.outcome, f"{ended.last_line}; then {again.detail}")


def _verify_finds(workspace: Path, file: str, place: Place) -> bool:
    artefact = workspace / "/".join(file.split("/")[:2])
    ended = run(command("store", "verify", "--deep", str(artefact)), place.folder)
    return ended.code == 1 and not ended.has_traceback
