"""README, CONTRIBUTING and docs/ name only files, commands and modules that exist."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides

from firstsight.core import params
from firstsight.scenes.templates import TEMPLATES

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
CLI = ROOT / "firstsight/cli/app.py"
# Folders of the repository whose paths are checked where a page names one without a link. The pipeline's outputs
# (models/, evaluations/, most of data/) need not exist.
CHECKED = ("benchmarks", "docs", "firstsight", "metrics", "presets", "slurm", "stages", "tests")
# Patterns, and stand-ins for a name.
STANDS_FOR_MANY = re.compile(r"[*{}]|\bX\b|NAME")
# Where a command may begin.
START = r"(?:^|[;&(] *)"


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def code(text: str) -> str:
    """Return the code of a page: fenced blocks and inline code, one piece a line."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))])


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


@pytest.mark.system
def test_the_readme_shows_the_recorded_figures():
    """Those that git has; a run of your own changes metrics/, and not what README says of ours."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "metrics"], cwd=ROOT, check=False)
    if changed.returncode:
        pytest.skip("metrics/ is not what git has: another run's, or there is no git")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    quality, performance = (
        json.loads((ROOT / f"metrics/{name}.json").read_text(encoding="utf-8")) for name in ("quality", "performance")
    )
    for variant, row in performance.items():
        (line,) = [line for line in lines if line.startswith(f"{variant} ")]
        figures = quality[variant]["exact_match"], quality[variant]["f1"]
        assert line.split()[1] == f"{figures[0]:.3f}"
        assert f"  {figures[1]:.3f}  " in line
        assert f"  {row['latency_ms_p50']:.1f} ms" in line


def test_the_templates_are_counted():
    for name in ("README.md", "docs/data.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"(\d+)\s+question templates", text) == [str(len(TEMPLATES))], name


def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\((docs/\w[^)#]*|CONTRIBUTING\.md)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {ROOT / link for link in links} == {*DOCS, ROOT / "CONTRIBUTING.md"}


def test_paths_that_are_named_exist(page):
    pattern = rf"(?<![\w./-])(?:{'|'.join(CHECKED)})/[\w./*{{}}-]*"
    for path in re.findall(pattern, code(page.read_text(encoding="utf-8"))):
        assert STANDS_FOR_MANY.search(path) or (ROOT / path.rstrip(".")).exists(), path


def test_make_targets_that_are_named_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = set(re.findall(rf"{START}make ([a-z][a-z-]*)", code(page.read_text(encoding="utf-8")), re.MULTILINE))
    assert named <= targets, named - targets


def test_modules_that_are_named_exist(page):
    for module in re.findall(r"python -m ((?:stages|benchmarks)\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_parameters_that_are_named_exist(page):
    values = params.load(ROOT / "presets/smoke.yaml").model_dump()
    pattern = rf"(?<![\w./-])(?:{'|'.join(values)})(?:\.[a-z]\w*)+"
    for name in re.findall(pattern, code(page.read_text(encoding="utf-8"))):
        section = values
        for key in name.split("."):
            assert key in section, name
            section = section[key]


def test_values_of_experiments_are_quoted_as_dvc_reads_them(page, tmp_path, monkeypatch):
    """By the functions with which `dvc exp run` reads them; those of a queue are lists."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for line in re.findall(r"^dvc exp run -S .*", code(page.read_text(encoding="utf-8")), re.MULTILINE):
        given = [word for word in shlex.split(line, comments=True)[3:] if word != "-S"]
        shutil.copy(ROOT / "presets/smoke.yaml", "params.yaml")
        for file, overrides in to_path_overrides(given).items():
            apply_overrides(file, overrides)
        paths.append(params.load().data.path)
    if page.name in ("README.md", "data.md"):
        assert "my data/數據, a=b.jsonl" in paths


@pytest.mark.skipif(not CLI.exists(), reason="there is no firstsight/cli/app.py")
def test_commands_that_are_named_exist(page):
    tree = list(ast.walk(ast.parse(CLI.read_text(encoding="utf-8"))))
    known = {node.id.replace("_", "-") for node in tree if isinstance(node, ast.Name)}
    known |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    pattern = rf"{START}firstsight ((?:--)?[a-z][a-z-]*)"
    named = set(re.findall(pattern, code(page.read_text(encoding="utf-8")), re.MULTILINE))
    assert named <= known, named - known


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_a_page_opens_with_what_it_answers(path):
    title, blank, opening = path.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ")
    assert blank == ""
    assert re.match(r"This page answers \w", opening), opening


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_runs_on_a_gpu_is_run_by_the_command_for_it(path):
    """As many marks as tests that are skipped without a GPU; one for a file whose tests run on either device."""
    text = path.read_text(encoding="utf-8")
    skipped = re.findall(r"^@pytest\.mark\.skipif\(not torch\.cuda\.is_available\(\)", text, re.MULTILINE)
    either = re.findall(r"^from training_steps import DEVICE\b", text, re.MULTILINE)
    marks = re.findall(r"^(?:@|pytestmark = .*)pytest\.mark\.gpu\b", text, re.MULTILINE)
    assert len(marks) == len(skipped) + len(either)
