"""The rooms of firstsight/ are what dvc.yaml says that stages depend on, and data flows one way between them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, YAML_SAFE

PIPELINE = {
    stage: definition.get("do", definition) for stage, definition in YAML_SAFE.load(ROOT / "dvc.yaml")["stages"].items()
}
DECLARED = {
    stage: {dependency for dependency in definition["deps"] if dependency.startswith("firstsight")}
    for stage, definition in PIPELINE.items()
}


def imports(path: Path) -> set[Path]:
    """Files of firstsight/ that `path` imports itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("firstsight.")}
    return {file for file in found if file.exists()}


def imported(path: Path, seen: set[Path]) -> set[Path]:
    """Files of firstsight/ that `path` imports, directly or through others of them."""
    for file in imports(path) - seen:
        seen.add(file)
        imported(file, seen)
    return seen


def script(stage: str) -> Path:
    return ROOT / f"stages/{stage.replace('-', '_')}.py"


def files(room: str) -> set[Path]:
    return {path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_declares_the_rooms_that_it_imports(stage):
    """None missing, which would leave the stage stale; none too many, which would run it again for nothing."""
    used = imported(script(stage), set())
    assert {str(file.parent.relative_to(ROOT)) for file in used} == DECLARED[stage]
    assert all((ROOT / room).is_dir() for room in DECLARED[stage])
    assert len(DECLARED[stage]) <= 8
    assert f"stages/{script(stage).name}" in PIPELINE[stage]["deps"]
    assert f"stages.{script(stage).stem}" in PIPELINE[stage]["cmd"]


@pytest.mark.parametrize("stage", PIPELINE)
def test_a_stage_uses_at_least_half_of_each_room(stage):
    used = imported(script(stage), set())
    for room in DECLARED[stage]:
        assert 2 * len(files(room) & used) >= len(files(room)), (room, sorted(files(room) - used))


def test_each_file_of_a_room_is_used_by_a_stage_that_declares_the_room():
    used = {stage: imported(script(stage), set()) for stage in PIPELINE}
    for room in set.union(*DECLARED.values()):
        users = set.union(*(used[stage] for stage in PIPELINE if room in DECLARED[stage]))
        assert files(room) - users == set(), room


def test_rooms_import_each_other_one_way_and_never_a_stage():
    rooms: dict[str, set[str]] = {}
    for path in (ROOT / "firstsight").rglob("*.py"):
        room = path.parent.relative_to(ROOT).as_posix()
        rooms.setdefault(room, set()).update(file.parent.relative_to(ROOT).as_posix() for file in imports(path))
        assert "import stages" not in path.read_text()
        assert "from stages" not in path.read_text()
    for room, others in rooms.items():
        others.discard(room)
    list(TopologicalSorter(rooms).static_order())  # raises CycleError, which names the cycle


def test_the_pipeline_reads_in_one_sitting():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 170
