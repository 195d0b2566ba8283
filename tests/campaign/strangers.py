"""Artefacts of somebody else: sealed and absurd, or made of links and pipes. None may hang, lead out or show a traceback."""

import hashlib
import json
import os
import random
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from campaign.cases import Case, Place
from campaign.crashes import STUDIES
from campaign.judge import Verdict, files, refused
from campaign.reading import MAKES, readings
from campaign.studies import STAGES, Study, made
from campaign.workers import command, run

ABSURD: tuple[Any, ...] = (10**15, -1, 0, 1e308, "text", None, [], True)
THINGS = ("pipe", "folder", "outside", "itself", "nowhere", "device")
MEMORY = 16 * 2**30
"""Bytes of address space of a command: a number that is believed fails to be allocated instead of taking the machine."""


def strangers(home: Path) -> Iterator[Case]:
    """Numbers in files whose seals are right, things that are no files, and folders that are links."""
    for name in STUDIES:
        study = made(home, name)
        for file in sorted(study.reference("report")):
            draw = random.Random(f"{name}-{file}")
            if file.endswith(".json"):
                for value in draw.sample(ABSURD, 3):
                    case = f"{name}-{str(value)[:6]}-{file}"
                    yield Case("stranger", case, partial(_absurd, study, file, value))
            thing = draw.choice(THINGS)
            yield Case("stranger", f"{name}-{thing}-{file}", partial(_no_file, study, file, thing))
        for folder in sorted({"/".join(file.split("/")[:2]) for file in study.reference("report")}):
            yield Case("stranger", f"{name}-linked-{folder}", partial(_linked, study, folder))


def _absurd(study: Study, file: str, value: object, place: Place) -> Verdict:
    workspace = place.fill(study.after("report"))
    if not _replace_a_value(workspace / file, value, random.Random(f"{value}-{file}")):
        return Verdict("harmless", "no value in it")
    _reseal(workspace, file)
    return _survived(study, place, file)


def _no_file(study: Study, file: str, thing: str, place: Place) -> Verdict:
    path = place.fill(study.after("report")) / file
    path.unlink()
    if thing == "pipe":
        os.mkfifo(path)
    elif thing == "folder":
        path.mkdir()
    else:
        targets = {
            "outside": place.outside / "precious",
            "itself": path,
            "nowhere": place.folder / "none",
            "device": "/dev/zero",
        }
        path.symlink_to(targets[thing])
    return _survived(study, place, file)


def _linked(study: Study, folder: str, place: Place) -> Verdict:
    """An artefact that is a link to a folder of somebody else: it may be read, and nothing in it may change."""
    workspace, theirs = place.fill(study.after("report")), place.folder / "theirs"
    (workspace / folder).rename(theirs)
    (workspace / folder).symlink_to(theirs)
    before = files(theirs)
    verdict = _survived(study, place, folder)
    changed = [name for name, content in files(theirs).items() if before.get(name) != content] + [
        *before.keys() - files(theirs).keys()
    ]
    return Verdict("outside", f"{sorted(changed)[:3]}") if changed and verdict.outcome == "detected" else verdict


def _survived(study: Study, place: Place, file: str) -> Verdict:
    """Every command that meets the file ends, in one line where it fails."""
    workspace, kind = place.workspace, file.split("/", maxsplit=1)[0]
    at = next(at for at, stage in enumerate(STAGES) if kind in MAKES[stage])
    commands: list[tuple[str, ...]] = [study.argv("status", workspace)]
    if kind in ("stores", "probes"):
        artefact = str(workspace / "/".join(file.split("/")[:2]))
        commands += [("store", "info", artefact), ("store", "verify", "--deep", artefact), study.argv("extract", workspace)]
    for stage in STAGES[at + 1 :]:
        commands.append(study.argv(stage, workspace, *(("--force",) if stage in ("train", "evaluate") else ())))
    commands.append(("workspace", "check", "--experiment", str(study.toml), "--workspace", str(workspace)))
    commands.append(study.argv(STAGES[at], workspace, *(("--force",) if STAGES[at] != "report" else ())))
    for argv in commands:
        if bad := refused(run(command(*argv, before=_with_little_memory), place.folder)):
            return Verdict(bad.outcome, f"{argv[:2]}: {bad.detail}")
    if (workspace / file).exists() and kind != "reports":
        ended = run(lambda: readings(study, workspace, place.folder / "readings.json"), place.folder)
        if bad := refused(ended):
            return Verdict(bad.outcome, f"a notebook: {bad.detail}")
    return Verdict("detected", "")


def _with_little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _replace_a_value(path: Path, value: object, draw: random.Random) -> bool:
    record = json.loads(path.read_bytes())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            if key not in ("seal", "sha256"):
                places.append((node, key))
            if isinstance(item, dict | list):
                walk(item)

    walk(record)
    if not places:
        return False
    node, key = draw.choice(places)
    node[key] = value
    path.write_text(json.dumps(record))
    return True


def _reseal(workspace: Path, file: str) -> None:
    """Make the seal of a record, and what its artefact's manifest says of it, true of what it now holds."""
    from pipeline.artefacts.identity import sealed

    path, manifest = workspace / file, workspace / "/".join(file.split("/")[:2]) / "manifest.json"
    for record in dict.fromkeys((path, manifest)):
        if not record.exists():
            continue
        content = json.loads(record.read_bytes())
        name = path.relative_to(manifest.parent).as_posix()
        if record == manifest and record != path and isinstance(content.get("files"), dict) and name in content["files"]:
            body = path.read_bytes()
            content["files"][name] |= {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        if isinstance(content, dict) and "seal" in content:
            content = sealed({key: item for key, item in content.items() if key != "seal"})
        record.write_text(json.dumps(content))
