"""The `firstsight` command and the stages' command lines: help, version, wrong arguments; and the installed package."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from conftest import ROOT, run_module
from packaging.requirements import Requirement
from typer.testing import CliRunner

import firstsight
from firstsight.cli import app
from firstsight.cli.arguments import TRAINED
from firstsight.core.errors import UserError
from firstsight.core.variants import VARIANTS

COMMANDS = ("start", "plan", "repro", "table", "ask", "demo", "card", "publish", "clean-scratch")
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))
# Of the modules of firstsight that the interpreter has loaded, the files.
PROBE = """
import sys
import firstsight.core.params
from firstsight.core.stage import main

def run():
    print(*sorted(module.__file__ for name, module in sys.modules.items()
                  if name.startswith("firstsight") and getattr(module, "__file__", None)), sep="\\n")

main(run, ())
"""


def text(*arguments: str) -> str:
    done = CliRunner().invoke(app.app, arguments, prog_name="firstsight")
    assert done.exit_code == 0, done.output
    return done.output


def test_help_has_one_line_for_each_command():
    listed = text("--help").partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    for line in listed:
        assert re.fullmatch(r"  [a-z-]+ +[A-Z][^.]+\.", line), line
    assert text() == text("-h") == text("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_argument_has_a_help_text(command):
    shown = text(command, "--help")
    assert shown.startswith(f"Usage: firstsight {command} ")
    for line in re.findall(r"^  (?:-|[A-Za-z/]+ <).*$", shown, re.MULTILINE):
        assert re.search(r" {2}[A-Z]", line), line
    assert text(command, "-h") == shown


def test_the_version_is_that_of_the_package():
    assert text("--version") == f"firstsight {firstsight.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "firstsight: no such command 'nothing'; see firstsight --help"),
        (["--loud"], "firstsight: no such option: --loud; see firstsight --help"),
        (["ask", "models/student"], "firstsight ask: missing argument 'media'; see firstsight ask --help"),
        (["plan", "a", "b"], "firstsight plan: got unexpected extra argument(s) (b); see firstsight plan --help"),
        (["demo", "models/student", "--port", "x"], "firstsight demo: invalid value for '--port': "),
        (["card", "gpt"], f"gpt: expected a student, one of {', '.join(TRAINED)}; correct VARIANT"),
        (["publish", "teacher", "me/it"], f"teacher: expected a student, one of {', '.join(TRAINED)}"),
        (["table", "gpt"], f"gpt: expected a variant, one of {', '.join(VARIANTS)}"),
        (["plan", "nowhere.yaml"], "nowhere.yaml: expected a parameter file, found none"),
    ],
    ids=" ".join,
)
def test_a_wrong_argument_is_one_line(arguments, line):
    with pytest.raises(UserError) as error:
        app.run(arguments)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_package_that_is_missing_is_one_line_and_a_defect_is_not(monkeypatch):
    """As in an environment of requirements-device.txt, which asks exported models alone."""

    def missing(name: str) -> None:
        def imports(*_: object, **__: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(app, "app", imports)

    missing("pandas.core")
    with pytest.raises(UserError, match=r"^pandas: expected a package .* missing; pip install -r requirements.txt$"):
        app.run(["table"])
    missing("firstsight.nothing")
    with pytest.raises(ModuleNotFoundError):
        app.run(["table"])


@pytest.mark.parametrize("preset", ["qwen2-vl-7b", "smoke"])
def test_a_plan_is_printed_from_another_folder(tmp_path, monkeypatch, capsys, preset):
    """The smoke preset trains its tokenizer on a file of the repository."""
    monkeypatch.chdir(tmp_path)
    app.run(["plan", str(ROOT / f"presets/{preset}.yaml")])
    assert "cache-teacher-targets" in capsys.readouterr().out
    assert Path.cwd() == tmp_path


def test_clean_scratch_removes_what_stages_keep(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTSIGHT_SCRATCH", str(tmp_path))
    (tmp_path / "distill-0").mkdir()
    app.run(["clean-scratch"])
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_large_library():
    code = "import sys; from firstsight.cli.app import run; run(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert not {"torch", "transformers", "huggingface_hub", "numpy"} & {*loaded}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_what_dvc_gives_it(stage):
    """Each ends by `main`, told which arguments there are, so that --help and a typing mistake start nothing."""
    assert re.search(r"^    main\(run, \S.*\)$", (ROOT / f"stages/{stage}.py").read_text(), re.MULTILINE)


@pytest.mark.system
def test_help_of_a_stage_is_its_docstring_and_nothing_runs(tmp_path):
    done = run_module(tmp_path, "stages.evaluate", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert (ROOT / "stages/evaluate.py").read_text().startswith(f'"""{done.stdout}"""')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.system
def test_help_of_a_stage_that_accelerate_launches(tmp_path):
    launcher = "accelerate.commands.launch", "--quiet", "--mixed_precision", "no", "--dynamo_backend", "no"
    done = run_module(tmp_path, *launcher, "-m", "stages.finetune_teacher", "--help")
    assert done.returncode == 0
    assert (ROOT / "stages/finetune_teacher.py").read_text().startswith(f'"""{done.stdout}"""')


@pytest.mark.parametrize(
    ("choices", "arguments", "line"),
    [
        (("int8", "nf4"), [], "stages.probe: expected one of int8, nf4, found none; --help says what it does"),
        (("int8", "nf4"), ["int4"], "stages.probe: expected one of int8, nf4, found int4; --help says what it does"),
        (("int8",), ["int8", "x"], "stages.probe: expected one of int8, found int8 x; --help says what it does"),
        ((), ["--now"], "stages.probe: expected no argument, found --now; --help says what it does"),
    ],
)
def test_a_wrong_argument_of_a_stage_is_one_line(tmp_path, choices, arguments, line):
    clone(tmp_path, f"from firstsight.core.stage import main\nmain(lambda *_: print('ran'), {choices!r})\n")
    words = [sys.executable, "-m", "stages.probe", *arguments]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")


def test_the_package_asks_for_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    pinned = pins("requirements.txt")
    assert asked.keys() == pinned.keys()
    (demo,) = map(Requirement, project["optional-dependencies"]["demo"])
    asked[demo.name] = demo.specifier
    for name, version in {**pinned, **pins("requirements-demo.txt")}.items():
        assert version in asked[name], name
    assert pins("requirements-device.txt").items() < pinned.items()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def clone(folder: Path, probe: str) -> None:
    """Make a clone's firstsight and stages, with one more stage."""
    for name in ("firstsight", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "stages/probe.py").write_text(probe)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory) -> Path:
    """The bin folder of an environment that the package has been installed into, from a clone elsewhere.

    It finds the other packages in the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(ROOT / "firstsight", folder / "source/firstsight", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    words = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "venv/bin/python"),
        "install",
        "--quiet",
        "--no-deps",
    ]
    words += ["--no-build-isolation", "--no-index", *(["--editable"] if request.param == "editable" else [])]
    subprocess.run([*words, str(folder / "source")], check=True, capture_output=True)
    return folder / "venv/bin"


@pytest.mark.system
def test_the_installed_command_runs_in_any_folder(installed, tmp_path):
    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [installed / "firstsight", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    assert command("--version").stdout == f"firstsight {firstsight.__version__}\n"
    wrong = command("nothing")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: firstsight: no such command 'nothing'; see firstsight --help\n"
    shutil.copytree(ROOT / "metrics", tmp_path / "metrics")
    assert "student-distilled" in command("table").stdout
    if installed.parents[1].name.startswith("wheel"):
        templates = {path.name for path in installed.parent.rglob("firstsight/*/*.jinja")}
        assert templates == {path.name for path in (ROOT / "firstsight").rglob("*.jinja")}


@pytest.mark.system
def test_a_stage_of_a_clone_imports_the_clones_own_package(installed, tmp_path):
    """DVC runs queued experiments in copies of the repository, whose code may be another than what is installed."""
    clone(tmp_path, PROBE)
    words = [installed / "python", "-m", "stages.probe"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    files = [Path(line) for line in done.stdout.splitlines()]
    assert tmp_path / "firstsight/core/params.py" in files, done.stderr
    assert [file for file in files if not file.is_relative_to(tmp_path)] == []
