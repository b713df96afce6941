"""Downloading, with the hub's real client against a hub on loopback; and what is refused of hubs and folders."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, YAML_SAFE, change, command, new_project, run_stage, stages_run, workspace, write_params
from hub_server import Hub, Repository, point_client_at
from huggingface_hub import constants, file_download
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from text_families import TEXT_SAVE, save_bert

from firstsight.acquisition import checks, hub_client
from firstsight.acquisition.initialise import CHAT_TEMPLATE, build_model, build_processor, train_tokenizer
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, read_json
from firstsight.core.params import Initialisation
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor

NAME = "tiny/qwen2-vl"
CARD = "---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n# Tiny\n"
TOKEN = "hf_secretsecretsecret"


def save_as_on_the_hub(init: Initialisation, folder: Path) -> None:
    """A checkpoint in the layout of Qwen/Qwen2-VL-2B-Instruct: flat config, old names, bfloat16 shards, split texts."""
    torch.manual_seed(init.seed)
    tokenizer = train_tokenizer((ROOT / init.corpus).read_text().splitlines(), init.vocabulary_size)
    model = build_model(init, tokenizer).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    processor = build_processor(tokenizer, init.max_pixels)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("dtype", "layer_types", "model_type", "pad_token_id", "sliding_window"):
        text.pop(key)
    vision = {key: value for key, value in config["vision_config"].items() if not key.startswith(("rope", "dtype"))}
    config |= text | {
        "vision_config": vision | {"in_chans": vision.pop("in_channels"), "spatial_patch_size": 14},
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": config.pop("dtype"),
        "transformers_version": "4.41.2",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License 2.0")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")


@pytest.fixture(scope="session")
def published(settings, tmp_path_factory) -> Path:
    """Checkpoints as the hub has them: `student` and `teacher`. Read only."""
    folder = tmp_path_factory.mktemp("published")
    for role in ("student", "teacher"):
        (folder / role).mkdir()
        save_as_on_the_hub(getattr(settings.models, role).init, folder / role)
    return folder


@pytest.fixture
def served(published, tmp_path, monkeypatch):
    """A hub that serves a copy of the student as NAME, and a client of it with an empty cache and without a token."""
    shutil.copytree(published / "student", tmp_path / "published")
    with Hub({NAME: Repository(tmp_path / "published")}) as server:
        point_client_at(server, tmp_path, monkeypatch)
        # Between the client's retries.
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        yield server


def download(tmp_path: Path, revision: str | None = None, name: str = NAME) -> str:
    """Download into a fresh folder `model`; a refusal leaves it empty."""
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    (tmp_path / "model").mkdir()
    return hub_client.download(name, revision, tmp_path / "model")


def refusal(tmp_path: Path, *arguments, **names) -> str:
    with pytest.raises(UserError) as error:
        download(tmp_path, *arguments, **names)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "model").iterdir())
    return str(error.value)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: fingerprint_files([path]) for path in folder.iterdir() if path.is_file()}


def test_a_branch_is_resolved_and_what_is_wanted_arrives_as_it_is(served, tmp_path):
    commit = download(tmp_path)
    source = served.repositories[NAME]
    assert commit == source.commit == download(tmp_path, commit) == download(tmp_path, "main")
    unwanted = {"pytorch_model.bin", "modeling.py"}
    published = contents(source.folder)
    assert contents(tmp_path / "model") == {name: published[name] for name in published.keys() - unwanted}
    assert len(served.fetched()) == len(set(served.fetched()))  # nothing twice
    assert len([name for name in published if name.endswith(".safetensors")]) > 2
    model, processor = load_model(tmp_path / "model", "float32", "cpu"), load_processor(tmp_path / "model")
    assert model.num_parameters() == checks.facts(tmp_path / "model")["parameters"]
    assert processor.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("family", [*TEXT_SAVE, "bert"])
def test_a_text_model_arrives_whole_and_answers_to_its_kind(served, language_models, tmp_path, family):
    """As the presets of texts and classes name them; an encoder has no head of these classes yet."""
    classes = ("plant", "animal") if family == "bert" else ()
    folder = tmp_path / family
    folder.mkdir()
    if classes:
        save_bert(folder)
    else:
        shutil.copytree(language_models[family], folder, dirs_exist_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    repository = served.repositories[f"someone/{family}"] = Repository(folder)
    assert download(tmp_path, name=f"someone/{family}") == repository.commit
    published = contents(folder)
    wanted = {name: published[name] for name in published.keys() - {"pytorch_model.bin"}}
    # Old encoders come without tokenizer.json, which exports need.
    added = {"tokenizer.json"} - published.keys()
    found = contents(tmp_path / "model")
    assert {name: found[name] for name in found.keys() - added} == wanted
    model = load_model(tmp_path / "model", "float32", "cpu", classes=classes)
    assert load_processor(tmp_path / "model").tokenizer("two plants")["input_ids"]
    assert type(model).__name__.endswith("ForSequenceClassification" if classes else ("ForCausalLM", "LMHeadModel"))


def test_weights_are_linked_from_the_cache_and_texts_copied(served, tmp_path):
    commit = download(tmp_path)
    for cached in (tmp_path / f"cache/models--tiny--qwen2-vl/snapshots/{commit}").iterdir():
        if (here := tmp_path / "model" / cached.name).exists():
            # What rewrites a text in place leaves the hub's cache as it is.
            assert here.samefile(cached) == (cached.suffix == ".safetensors")


def test_a_transfer_that_breaks_off_is_resumed(served, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of the client's 10 MB, only whole ones are kept
    shard = first_shard(served)
    served.broken[shard] = (20000, 2)
    download(tmp_path)
    ranges = [request.range for request in served.requests if request.path == f"/cdn/{NAME}/{shard}"]
    assert ranges == [None, "bytes=20000-", "bytes=40000-"]
    assert contents(tmp_path / "model")[shard] == contents(served.repositories[NAME].folder)[shard]


def test_after_a_transfer_that_fails_a_rerun_fetches_what_is_missing(served, tmp_path):
    shard = first_shard(served)
    served.broken[shard] = (0, 100)
    assert "expected an answer from the hub, found" in refusal(tmp_path)
    came = set(served.fetched()) - {shard}
    served.broken.clear()
    served.requests.clear()
    download(tmp_path)
    assert shard in served.fetched()
    assert not came & set(served.fetched())


@pytest.mark.parametrize("name", ["shard", "config.json"])
def test_wrong_bytes_are_refused_and_fetched_anew(served, tmp_path, name):
    name, algorithm = (first_shard(served), "sha256") if name == "shard" else (name, "git-sha1")
    served.wrong.add(name)
    assert f"{NAME}/{name}: expected {algorithm} " in refusal(tmp_path)
    served.wrong.clear()
    served.requests.clear()
    download(tmp_path)
    assert name in served.fetched()
    assert contents(tmp_path / "model")[name] == contents(served.repositories[NAME].folder)[name]


def test_offline_the_cache_is_enough_and_its_absence_is_said(served, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "expected main in the hub's cache, because HF_HUB_OFFLINE is set" in refusal(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    commit = download(tmp_path)
    expected = contents(tmp_path / "model")
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert download(tmp_path, revision) == commit
        assert contents(tmp_path / "model") == expected
    assert served.requests == []
    assert "because HF_HUB_OFFLINE is set" in refusal(tmp_path, "0" * 40)


def test_no_network_is_no_reason_to_guess_a_commit(served, tmp_path, monkeypatch):
    download(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert "expected an answer from the hub, found" in refusal(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    edit(served.repositories[NAME].folder, "generation_config.json", top_k=1)
    served.down = 1
    assert "expected main to stay at one commit" in refusal(tmp_path)
    assert download(tmp_path) == served.repositories[NAME].commit


def test_missing_and_gated_repositories_and_revisions(served, tmp_path, monkeypatch):
    assert "nobody/nothing: expected a hub repository or a local folder" in refusal(tmp_path, name="nobody/nothing")
    assert "a/b/c: expected a local folder, or a hub repository as owner/name" in refusal(tmp_path, name="a/b/c")
    assert f"{NAME}: expected a revision 'v2', found none" in refusal(tmp_path, "v2")
    assert f"{NAME}: expected a revision '{'0' * 40}', found none" in refusal(tmp_path, "0" * 40)
    served.repositories[NAME].gated = True
    assert f"{NAME}: expected access to a gated repository, found none; accept its terms" in refusal(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    served.refused = TOKEN
    assert "expected a token that the hub accepts" in refusal(tmp_path)
    served.refused = None
    download(tmp_path)
    assert {request.authorization for request in served.requests if request.path.startswith("/cdn")} == {None}


def test_too_small_a_disk_is_said_before_the_weights_are_fetched(served, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert f"MB; free some for {NAME}, or point HF_HUB_CACHE to a larger disk" in refusal(tmp_path)
    assert not [name for name in served.fetched() if name.endswith(".safetensors")]


def first_shard(served: Hub) -> str:
    return min(name for name in served.repositories[NAME].files if name.endswith(".safetensors"))


def edit(folder: Path, name: str, **values) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def pickles_only(folder):
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    return "found pickles (pytorch_model.bin), which can run code when read"


def unknown_architecture(folder):
    edit(folder, "config.json", model_type="nothing_known")
    return "found model_type 'nothing_known'; name"


def remote_code(folder):
    edit(folder, "config.json", model_type="own", auto_map={"AutoModel": "modeling.Own"})
    return "found model_type 'own' with code of its own (auto_map), which is not run"


def no_config(folder):
    (folder / "config.json").unlink()
    return "expected a config.json that can be read"


def broken_config(folder):
    (folder / "config.json").write_text("[1]")
    return "expected a config.json that can be read"


def broken_index(folder):
    (folder / checks.INDEX).write_text("{}")
    return "expected a weight_map in model.safetensors.index.json"


def empty_index(folder):
    edit(folder, checks.INDEX, weight_map={})
    return "expected model.safetensors.index.json to name *.safetensors files, found no shard"


def pickle_in_the_index(folder):
    edit(folder, checks.INDEX, weight_map={"lm_head.weight": "pytorch_model.bin"})
    return "expected model.safetensors.index.json to name *.safetensors files, found pytorch_model.bin"


def code_in_the_index(folder):
    edit(folder, checks.INDEX, weight_map={"lm_head.weight": "modeling.py"})
    return "found modeling.py; get"


def several_kinds(folder):
    edit(folder, "config.json", model_type=["qwen2_vl"])
    return "found model_type ['qwen2_vl']"


def quantized_by_awq(folder):
    edit(folder, "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    return "quantized by bitsandbytes or FirstSight's int4, found them quantized by 'awq'"


def quantized_by_nobody(folder):
    edit(folder, "config.json", quantization_config=[4])
    return "found them quantized by [4]"


def adapter_in_its_folder(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return "found an adapter in its folder (adapter_config.json); merge it"


def adapter_of_pickles(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter/adapter_model.bin").write_bytes(b"a pickle")
    return "expected adapter/adapter_model.safetensors beside adapter/adapter_config.json"


def no_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    return "get its tokenizer, processor and chat template, or name a complete checkpoint"


def no_chat_template(folder):
    for path in folder.glob("chat_template*"):
        path.unlink()
    return "get its tokenizer, processor and chat template, or name a complete checkpoint"


def no_preprocessor(folder):
    (folder / "preprocessor_config.json").unlink()
    return "get its tokenizer, processor and chat template, or name a complete checkpoint"


def impossible_config(folder):
    edit(folder, "config.json", hidden_size="wide")
    return "expected a config.json that can be read, found"


def missing_shard(folder):
    min(folder.glob("model-*.safetensors")).unlink()
    return "shards that model.safetensors.index.json names, found no model-00001-of-"


EARLY = [
    pickles_only,
    unknown_architecture,
    remote_code,
    no_config,
    broken_config,
    broken_index,
    empty_index,
    pickle_in_the_index,
    code_in_the_index,
    several_kinds,
    quantized_by_awq,
    quantized_by_nobody,
    adapter_in_its_folder,
    adapter_of_pickles,
    no_tokenizer,
    no_chat_template,
    no_preprocessor,
    impossible_config,
    missing_shard,
]


@pytest.mark.parametrize("damage", EARLY)
def test_an_unfit_repository_is_refused_before_its_weights_are_fetched(served, tmp_path, damage):
    expected = damage(served.repositories[NAME].folder)
    assert expected in refusal(tmp_path)
    assert not [name for name in served.fetched() if name.endswith((".safetensors", ".bin", ".py"))]


def broken_shard(folder):
    shard = min(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return "expected safetensors, found a broken file"


def other_sizes(folder):
    edit(folder, "config.json", intermediate_size=128)
    return (
        "expected the weights that config.json describes, found 6 that do not fit (model.language_model.layers.0.mlp."
    )


def fewer_layers(folder):
    edit(folder, "config.json", num_hidden_layers=1)
    return "model.language_model.layers.1.input_layernorm.weight: not in the model"


def another_layer(folder):
    edit(folder, "config.json", num_hidden_layers=3)
    return "model.language_model.layers.2.input_layernorm.weight: missing"


def other_vocabulary(folder):
    edit(folder, "config.json", vocab_size=700)
    return "found 1 that do not fit (model.language_model.embed_tokens.weight: [672, 32] instead of [700, 32])"


def untied_without_a_head(folder):
    edit(folder, "config.json", tie_word_embeddings=False)
    return "found 1 that do not fit (lm_head.weight: missing)"


@pytest.mark.parametrize(
    "damage",
    [
        *EARLY,
        broken_shard,
        other_sizes,
        fewer_layers,
        another_layer,
        other_vocabulary,
        untied_without_a_head,
    ],
)
def test_an_unfit_folder_is_refused(published, tmp_path, damage):
    folder = Path(shutil.copytree(published / "student", tmp_path / "mine"))
    expected = damage(folder)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError) as error:
        hub_client.copy(folder, tmp_path / "model")
    assert expected in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "model").iterdir())


def test_a_config_that_contradicts_its_weights_is_refused_from_the_hub_too(served, tmp_path):
    expected = other_vocabulary(served.repositories[NAME].folder)
    assert expected in refusal(tmp_path)


def test_code_beside_an_architecture_that_transformers_knows_is_left_behind(published, tmp_path):
    folder = Path(shutil.copytree(published / "student", tmp_path / "mine"))
    edit(folder, "config.json", auto_map={"AutoModelForImageTextToText": "modeling.Own"})
    (tmp_path / "model").mkdir()
    hub_client.copy(folder, tmp_path / "model")
    assert not {"modeling.py", "pytorch_model.bin", "onnx"} & {path.name for path in (tmp_path / "model").iterdir()}
    assert load_model(tmp_path / "model", "auto", "cpu")


def test_a_tokenizer_of_vocabulary_and_merges_is_completed(published, tmp_path):
    """Stages depend on tokenizer.json."""
    folder = Path(shutil.copytree(published / "student", tmp_path / "mine"))
    expected = load_processor(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    (tmp_path / "model").mkdir()
    hub_client.copy(folder, tmp_path / "model")
    assert not (folder / "tokenizer.json").exists()
    assert read_json(tmp_path / "model/tokenizer.json", "download-models")["model"]["merges"]
    text = "What is in the cup?<|im_end|>\n<|vision_start|>"
    found = load_processor(tmp_path / "model").tokenizer
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.get_vocab() == expected.get_vocab()


def adapted(published: Path, folder: Path) -> None:
    """The student, and an adapter in the folder of its own, which changes what the student says."""
    shutil.copytree(published / "student", folder)
    model = get_peft_model(load_model(folder, "float32", "cpu"), LoraConfig(target_modules=["q_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    model.save_pretrained(folder / "adapter")
    (folder / "adapter/optimizer.pt").write_bytes(b"a pickle")


def test_an_adapter_of_the_model_comes_with_it(served, published, tmp_path):
    """From a folder and from the hub, without what else lies there."""
    adapted(published, tmp_path / "mine")
    shutil.copytree(tmp_path / "mine/adapter", served.repositories[NAME].folder / "adapter")
    expected = load_model(tmp_path / "mine", "float32", "cpu").state_dict()
    bare = load_model(published / "student", "float32", "cpu").state_dict()
    (tmp_path / "copied").mkdir()
    hub_client.copy(tmp_path / "mine", tmp_path / "copied")
    download(tmp_path)
    for folder in (tmp_path / "copied", tmp_path / "model"):
        inside = {path.name for path in (folder / "adapter").iterdir()}
        assert inside == {"adapter_config.json", "adapter_model.safetensors"}
        found = load_model(folder, "float32", "cpu").state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(bare[name], expected[name]) for name in expected)


def test_a_file_that_one_may_not_read_is_said(served, tmp_path):
    served.forbidden = True
    assert "expected permission to read it, found that the hub refuses it (403)" in refusal(tmp_path)
    served.forbidden = False
    served.forbidden_files = True
    assert "expected permission to read it, found that the hub refuses it (403)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("info", b"<html>Sign in to the network</html>"),
        ("info", b"{}"),
        ("info", b'{"id": "tiny/qwen2-vl", "siblings": []}'),
        ("tree", b"<html>Sign in to the network</html>"),
        ("tree", b'[{"type": "file"}]'),
        ("tree", b'[{"type": "file", "path": "config.json", "size": 3}]'),
        ("tree", b"[]"),
    ],
)
def test_what_is_no_hubs_answer_is_one_line(served, tmp_path, kind, answer):
    served.answers[kind] = answer
    line = refusal(tmp_path)
    assert line.startswith(f"{NAME}: expected ")
    assert "in its own protocol" in line or "that can be read, found [] at" in line


def test_the_facts_are_counted_from_what_is_stored(published, tmp_path):
    folder = Path(shutil.copytree(published / "student", tmp_path / "mine"))
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    found = checks.facts(folder)
    assert found["licence"] == "apache-2.0"
    assert (found["architecture"], found["model_type"]) == ("Qwen2VLForConditionalGeneration", "qwen2_vl")
    assert found["dtypes"] == {"BF16": found["parameters"]}
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    shard = min(folder.glob("*.safetensors"))
    save_file({name: tensor.float() for name, tensor in load_file(shard).items()}, shard)
    assert sum(checks.facts(folder)["dtypes"].values()) == found["parameters"]
    assert list(checks.facts(folder)["dtypes"]) == ["BF16", "F32"]
    embedding = next(
        one for path in folder.glob("*.safetensors") for name, one in load_file(path).items() if "embed_t" in name
    )
    save_file(load_file(shard) | {"lm_head.weight": embedding}, shard)
    assert checks.facts(folder)["parameters"] == found["parameters"]  # the head is tied, and stored all the same
    save_file(load_file(shard) | {"lm_head.weight": embedding + 1}, shard)
    assert checks.facts(folder)["parameters"] == found["parameters"] + embedding.numel()
    for card, licence in (
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: [\n---\n", "LICENSE"),
        ("no metadata", "LICENSE"),
    ):
        (folder / "README.md").write_text(card)
        assert checks.facts(folder)["licence"] == licence
    (folder / "LICENSE").unlink()
    assert checks.facts(folder)["licence"] is None


@pytest.mark.parametrize("method", ["int8", "nf4", "int4"])
def test_a_quantized_folder_is_taken_as_it_is_and_compared_with_its_config(smoke, tmp_path, method):
    folder = tmp_path / "mine"
    load_model(smoke / "models/student", method, "cpu").save_pretrained(folder)
    load_processor(smoke / "models/student").save_pretrained(folder)
    (tmp_path / "model").mkdir()
    hub_client.copy(folder, tmp_path / "model")
    assert {"int8": "I8", "nf4": "U8", "int4": "I32"}[method] in checks.facts(tmp_path / "model")["dtypes"]
    config = json.loads((folder / "config.json").read_text())
    for key in ("intermediate_size", "vocab_size", "num_hidden_layers"):
        edit(folder, "config.json", text_config=config["text_config"] | {key: config["text_config"][key] + 64})
        with pytest.raises(UserError, match=r"expected the weights that config\.json describes, found"):
            checks.check_weights(folder, "mine")


def test_a_quantized_student_is_refused_when_it_is_fetched(smoke, tmp_path):
    folder = workspace(tmp_path / "project")
    values = YAML_SAFE.load(folder / "params.yaml")
    values["models"]["student"] |= {"source": str(smoke / "models/student-nf4"), "init": None}
    write_params(folder, values)
    with pytest.raises(UserError, match=r"models\.student: expected weights that can be trained, found .* to nf4 in"):
        run_stage(folder, "download_models", "student")
    assert not (folder / "models/student").exists()


def name_models(folder: Path) -> None:
    values = YAML_SAFE.load(folder / "params.yaml")
    for role in ("teacher", "student"):
        values["models"][role] |= {"source": f"tiny/{role}", "init": None}
    write_params(folder, values)


@pytest.mark.system
def test_hub_models_go_through_the_stages(served, published, tmp_path, caplog):
    """From the hub's layout to a distilled student, and into the metrics."""
    served.repositories |= {f"tiny/{role}": Repository(published / role) for role in ("teacher", "student")}
    folder = workspace(tmp_path / "project")
    name_models(folder)
    change(folder, "finetune_teacher", enabled=False)
    change(folder, "train", epochs=1)
    log = logging.getLogger("firstsight")
    log.addHandler(caplog.handler)
    for role in ("teacher", "student"):
        run_stage(folder, "download_models", role)
    log.removeHandler(caplog.handler)
    for role in ("teacher", "student"):
        source = read_json(folder / f"models/{role}/source.json", "download-models")
        commit = served.repositories[f"tiny/{role}"].commit
        assert (source["source"], source["revision"], source["commit"]) == (f"tiny/{role}", None, commit)
        assert source["licence"] == "apache-2.0"
        assert f"main can move to another commit; to pin it, set models.{role}.revision: {commit}" in caplog.text
    for stage in ("build_egoqa_dataset", "finetune_teacher", "cache_teacher_targets", "distill"):
        run_stage(folder, stage)
    assert load_model(folder / "models/student-distilled", "auto", "cpu")


@pytest.mark.system
@pytest.mark.slow
def test_dvc_repro_downloads_from_the_hub_and_distils(served, published, tmp_path):
    """What a user types, in processes of their own, with nothing cached."""
    served.repositories |= {f"tiny/{role}": Repository(published / role) for role in ("teacher", "student")}
    project = new_project(tmp_path / "project")
    name_models(project)
    change(project, "finetune_teacher", enabled=False)
    change(project, "train", epochs=1)
    command(project, "git", "init", "--quiet")
    hub_at = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    ran = stages_run(project, "repro", "distill", **hub_at)
    assert {"download-models@teacher", "download-models@student", "cache-teacher-targets", "distill"} <= ran
    for role in ("teacher", "student"):
        source = read_json(project / f"models/{role}/source.json", "download-models")
        assert source["commit"] == served.repositories[f"tiny/{role}"].commit
    student = checks.facts(project / "models/student-distilled")
    assert student["dtypes"] == source["dtypes"] == {"BF16": source["parameters"]}
    for role, copies in (("teacher", ("teacher", "teacher-finetuned")), ("student", ("student",))):
        shard = min(path.name for path in (project / "models" / role).glob("*.safetensors"))
        name = f"models--tiny--{role}/snapshots/{served.repositories[f'tiny/{role}'].commit}/{shard}"
        downloaded = tmp_path / "hf/hub" / name
        everywhere = [project / "models" / copy / shard for copy in copies] + [
            path for path in (project / ".dvc/cache").rglob("*") if path.is_file() and path.samefile(downloaded)
        ]
        assert len(everywhere) == len(copies) + 1  # DVC's is one of them
        assert all(path.samefile(downloaded) for path in everywhere)
    requests = len(served.requests)
    assert stages_run(project, "repro", "distill", **hub_at) == set()
    assert len(served.requests) == requests


@pytest.mark.system
def test_a_token_is_neither_printed_nor_stored(served, tmp_path):
    """In processes of their own, as a user runs them: a download, and refusals; whatever they say and write."""
    served.repositories[NAME].gated = True
    folder = workspace(tmp_path / "project")
    values = YAML_SAFE.load(folder / "params.yaml")
    values["models"]["student"] |= {"source": NAME, "init": None}
    write_params(folder, values)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": served.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "home/hub"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(**variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "stages.download_models", "student"],
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    unprintable = run(HF_TOKEN=f"{TOKEN}\x0b.")
    done = run(HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert done.returncode == 0, done.stderr
    served.refused = TOKEN
    refused = run(HF_TOKEN=TOKEN)
    assert (unprintable.returncode, refused.returncode) == (1, 1)
    assert unprintable.stderr.startswith("error: HF_TOKEN: expected printable ASCII characters")
    assert refused.stderr.startswith(f"error: {NAME}: expected a token that the hub accepts")
    assert f"Bearer {TOKEN}" in {request.authorization for request in served.requests}
    for process in (done, refused, unprintable):
        assert TOKEN not in process.stdout + process.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
