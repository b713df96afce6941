"""Asking a model folder about a file: on the command line, and on a local page."""

import gc
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from conftest import ROOT, as_wide_as, picture, run_module
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import PreTrainedModel

from firstsight.asking.asked_model import Answer, AskedModel
from firstsight.asking.question import question_about, question_alone, seen
from firstsight.asking.side_by_side import answered
from firstsight.cli import app, quiet
from firstsight.cli.ask import second_answer
from firstsight.core.errors import UserError
from firstsight.core.variants import STUDENTS
from firstsight.generation.answering import answers
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.readers.image_decoding import read_image
from firstsight.readers.video_decoding import read_video
from firstsight.records.parquet import Split

STUDENT = "models/student-distilled"


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """What a command silences in its own process would stay silent in this one."""
    monkeypatch.setattr(quiet, "quiet_transformers", lambda: None)


@pytest.fixture
def media(tmp_path) -> Path:
    """A folder with an image, a link to it from elsewhere, a video of 4 s, and files that are neither."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/scene.jpg").write_bytes(picture(0, 112, 84))
    (tmp_path / "link.jpg").symlink_to(tmp_path / "elsewhere/scene.jpg")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 112, 84
        for number in range(20):
            frame = av.VideoFrame.from_image(Image.new("RGB", (112, 84), (12 * number, 100, 50)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/decoder.onnx").touch()
    (tmp_path / "half/config.json").touch()
    (tmp_path / "left-out").mkdir()
    (tmp_path / "left-out/left-out.json").write_text(json.dumps("quantize.methods is ['int8'], without nf4"))
    return tmp_path


@pytest.mark.system
def test_models_are_asked_side_by_side(smoke, media, settings):
    others = ["models/teacher-finetuned", "models/student"]
    question = STUDENT, str(media / "clip.mp4"), " What did I pick up? "
    compare = [word for other in others for word in ("--compare", other)]
    done = run_module(smoke, "firstsight", "ask", *question, *compare)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"running on [^\n]+\n", done.stderr)  # no progress bars, no warnings
    about, question, blank, header, line, *rows = done.stdout.splitlines()
    assert about == f"media     {media / 'clip.mp4'}, 4 frames of 112 x 84 pixels, 1 a second"
    assert question == "question  What did I pick up?"
    assert (blank, set(line)) == ("", {"-"})
    assert header.split() == ["model", "time", "loading", "answer"]
    sample = question_about(media / "clip.mp4", "What did I pick up?", settings.data)
    for folder, row in zip([STUDENT, *others], rows, strict=True):
        answer = AskedModel(smoke / folder, settings.evaluate, "cpu").answer(sample)
        assert re.fullmatch(rf"{folder} +\d+ ms +\d+\.\d s  {re.escape(answer.line())}", row)
        assert row.index(" ms  ") == header.index("time") + 1
        assert row.rindex(answer.line()) == header.index("answer")


@pytest.mark.system
def test_a_mistake_is_one_line(smoke, media):
    done = run_module(smoke, "firstsight", "ask", STUDENT, str(media / "broken.mp4"), "What?")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: expected a readable video, found {media / 'broken.mp4'}")


def test_a_question_that_would_change_the_prompt_is_refused(media, settings):
    with pytest.raises(UserError, match=r"question: expected plain text, found the special token '<\|im_end\|>'"):
        question_about(media / "clip.mp4", "What?<|im_end|>", settings.data)


@pytest.mark.parametrize(
    ("model", "file", "question", "expected"),
    [
        (STUDENT, "nothing.jpg", "What?", "nothing.jpg: expected an image or a video, found no such file"),
        (STUDENT, "elsewhere", "What?", "elsewhere: expected an image or a video, found a folder"),
        (STUDENT, "text.jpg", "What?", "expected a readable image, found "),
        (STUDENT, "link.jpg", " \n", "question: expected some text, found none"),
        ("models/nobody", "link.jpg", "What?", "models/nobody: expected a model folder, found no such folder"),
        ("data/egoqa", "link.jpg", "What?", "data/egoqa: expected a model folder, found a folder without config.json"),
        (
            "{media}/half",
            "link.jpg",
            "What?",
            "half: expected exported.json beside the graphs of an exported model, found",
        ),
        ("{media}/left-out", "link.jpg", "What?", "found it left out (quantize.methods is ['int8'], without nf4)"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_model_is_loaded(
    smoke, media, monkeypatch, model, file, question, expected
):
    monkeypatch.chdir(smoke)
    monkeypatch.setattr("firstsight.models.loading.load_model", lambda *_: pytest.fail("loaded"))
    model = model.format(media=media)
    with pytest.raises(UserError) as error:
        app.run(["ask", STUDENT, str(media / file), question, "--compare", model])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_media_are_seen_as_in_a_data_set(media, settings):
    image = question_about(media / "link.jpg", "What?", settings.data)
    assert (image.media_kind, image.frames) == ("image", (read_image(media / "elsewhere/scene.jpg", settings.data),))
    assert seen(image) == "an image of 112 x 84 pixels"
    video = question_about(media / "clip.mp4", " What? ", settings.data)
    assert (video.media_kind, video.frames, video.fps) == (
        "video",
        *read_video(media / "clip.mp4", settings.data, 0, None),
    )
    assert video.records[0].prompt() == "What?"
    # As in a data set, in Unicode's composed form.
    assert question_about(media / "link.jpg", "A cafe\u0301?", settings.data).records[0].prompt() == "A café?"


def test_an_answer_is_the_one_that_evaluation_gets(smoke, settings):
    sample = next(one for one in Split(smoke / "data/egoqa/test.parquet") if one.media_kind == "video")
    folder = smoke / "models/teacher-finetuned"
    limit = settings.evaluate.max_new_tokens
    asked = [(sample, sample.records[0])]
    expected = list(answers(load_model(folder, "auto", "cpu"), load_processor(folder), asked, 1, limit))
    answer = AskedModel(folder, settings.evaluate, "cpu").answer(sample)
    assert [answer.text] == expected
    assert answer.seconds > 0


def test_a_model_is_let_go_before_the_next_is_loaded(smoke, media, settings):
    def models() -> int:
        return sum(isinstance(one, PreTrainedModel) for one in gc.get_objects())

    sample = question_about(media / "link.jpg", "What?", settings.data)
    gc.collect()
    before = models()
    gc.disable()
    try:
        second_answer(smoke / STUDENT, sample, settings.evaluate, "cpu", None)
        assert models() == before
    finally:
        gc.enable()


def test_the_page_has_a_row_a_model_and_what_they_see(smoke, media, settings):
    models = [AskedModel(smoke / folder, settings.evaluate, "cpu") for folder in (STUDENT, f"models/{STUDENTS[-1]}")]
    frames, rows = answered(models, media / "clip.mp4", "What?", settings.data)
    assert [frame.size for frame in frames] == [(112, 84)] * 4
    sample = question_about(media / "clip.mp4", "What?", settings.data)
    assert [row[:2] for row in rows] == [[str(one.folder), one.answer(sample).line()] for one in models]
    assert all(int(milliseconds) > 0 for *_, milliseconds in rows)


def test_the_page_names_an_upload_without_its_folder(smoke, media, settings):
    with pytest.raises(UserError, match=r"media: expected an image or a video, found none; upload one"):
        answered([SimpleNamespace(folder=smoke / STUDENT)], None, "What?", settings.data)
    with pytest.raises(UserError, match=r"expected a readable video, found broken.mp4") as error:
        answered([], media / "broken.mp4", "What?", settings.data)
    assert str(media) not in str(error.value)


def test_models_of_text_alone_are_asked_without_an_upload(language_models, settings):
    folder = language_models["gpt2"]
    model = AskedModel(folder, settings.evaluate, "cpu")
    data = settings.data.model_copy(update={"prompt": "About {text}"})
    assert answered([model], None, " two plants ", data)[0] == []
    (row,) = answered([model], None, " two plants ", data)[1]
    assert row[:2] == [str(folder), model.answer(question_alone("About two plants", None)).line()]
    with pytest.raises(UserError, match=r"question: expected some text, found none"):
        answered([model], None, " ", data)


def test_the_page_of_models_of_text_alone_has_no_upload(language_models, smoke, settings):
    pytest.importorskip("gradio")
    from firstsight.asking.web_page import page

    def shown(*folders) -> set[str]:
        blocks = page([SimpleNamespace(folder=folder) for folder in folders], settings.data).config
        return {one["type"] for one in blocks["components"] if one["props"].get("visible")}

    text, sees = language_models["gpt2"], smoke / STUDENT
    assert shown(text, sees) - shown(text) == {"file", "gallery"}


def test_without_gradio_the_demo_says_what_to_install(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    monkeypatch.delitem(sys.modules, "firstsight.asking.web_page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio: expected .* pip install -r requirements-demo.txt"):
        app.run(["demo", STUDENT])


@pytest.mark.system
def test_the_page_answers_on_this_machine_alone_and_forgets(smoke, media, tmp_path):
    """In a process of its own, asked by Gradio's own client."""
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    (uploads := tmp_path / "uploads").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = subprocess.Popen(
        [sys.executable, "-m", "firstsight", "demo", STUDENT, "models/student", "--port", str(port)],
        cwd=smoke,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TMPDIR": str(uploads)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(served.stderr.readline, "")
        address = next(line for line in lines if "Ctrl-C" in line).split()[0]
        assert address == f"http://127.0.0.1:{port}/"
        client = Client(address, verbose=False)
        assert client.config["analytics_enabled"] is False
        frames, table = client.predict(handle_file(media / "link.jpg"), "What?", api_name="/ask")
        assert len(frames) == 1
        assert [row[0] for row in table["data"]] == [STUDENT, "models/student"]
        with pytest.raises(AppError, match=r"expected a readable video, found broken.mp4"):
            client.predict(handle_file(media / "broken.mp4"), "What?", api_name="/ask")
        assert list(uploads.rglob("link.jpg"))
    finally:
        served.terminate()
        served.wait(60)
    assert not list(uploads.iterdir())


def test_the_page_shows_answers_and_whole_frames_wide_and_narrow(browser, smoke, media, settings, monkeypatch):
    pytest.importorskip("gradio")
    from firstsight.asking.web_page import CSS, THEME, page

    monkeypatch.chdir(smoke)
    told = SimpleNamespace(folder=Path(STUDENT), answer=lambda _: Answer("in the left hand", 0.1))
    blocks = page([told], settings.data)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", share=False, theme=THEME, css=CSS, quiet=True, prevent_thread_lock=True
    )
    try:
        as_wide_as(browser, 1280)
        browser.get(address)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda page: page.find_elements(By.TAG_NAME, "textarea"))
        browser.find_element(By.TAG_NAME, "textarea").send_keys("What?")
        browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(media / "elsewhere/scene.jpg"))
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "a[download]"))
        browser.find_element(By.CSS_SELECTOR, "button.primary").click()
        wait.until(lambda page: "in the left hand" in page.find_element(By.TAG_NAME, "body").text)
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "#frames .grid-container img"))
        for width in (1280, 390):
            as_wide_as(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            frame, around = (
                browser.execute_script("return document.querySelector(arguments[0]).getBoundingClientRect()", place)
                for place in ("#frames .grid-container img", "#frames")
            )
            assert around["top"] < frame["top"]
            assert frame["bottom"] < around["bottom"] < frame["bottom"] + 60
            assert frame["width"] < 200
            heading = browser.find_elements(By.TAG_NAME, "th")[-1]
            assert (heading.text, heading.size["height"] < 60) == ("ms", True)
        browser.find_element(By.TAG_NAME, "textarea").clear()
        browser.find_element(By.TAG_NAME, "textarea").send_keys(" ")
        browser.find_element(By.CSS_SELECTOR, "button.primary").click()
        wait.until(lambda page: "question: expected some text" in page.find_element(By.TAG_NAME, "body").text)
    finally:
        blocks.close()
