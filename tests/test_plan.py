"""The plan's sizes are the models' own, its formulas what PyTorch and peft really take on tiny models."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from conftest import ROOT, YAML_SAFE, make_sample, picture, run_stage, workspace, write_params
from egogpt_checkpoint import save_original
from families import SAVE, save_qwen2
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, Trainer, TrainingArguments, WhisperConfig

from firstsight.acquisition.egogpt_conversion import Speech, convert
from firstsight.acquisition.initialise import build_model
from firstsight.cli.plan import plan
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.variants import METHODS
from firstsight.export import folder
from firstsight.models.int4 import Int4Linear
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import language_model_prefix
from firstsight.packing.forward import answer_states
from firstsight.packing.pack import collate, encode, pack
from firstsight.planning import arithmetic, gpu_memory, hours, inference, plan_table
from firstsight.planning.hours import Effort
from firstsight.planning.model_shape import Shape
from firstsight.planning.shapes import EGOGPT_SPEECH, KNOWN, on_meta
from firstsight.planning.workload import Sizes, patches_and_tokens, reads_text_alone, workload
from firstsight.profiling import cost
from firstsight.training.optimizer import moments_bytes, trainer_name

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
GIB = 1 << 30
MARKS = ("<|image_pad|>", "<|video_pad|>", "<image>", "<video>", "<speech>")
VIDEO = Sizes("video", frames=16, pixels=200_704, questions=1, question_tokens=32, answer_tokens=16)


def known(source: str) -> Shape:
    return Shape(source, on_meta(params.Model(source=source, revision=None, init=None)))


@pytest.fixture(scope="module")
def teacher() -> Shape:
    return known("Qwen/Qwen2-VL-7B-Instruct")


@pytest.fixture(scope="module")
def student() -> Shape:
    return known("Qwen/Qwen2-VL-2B-Instruct")


@pytest.fixture
def preset() -> params.Params:
    return params.load(ROOT / "presets" / "qwen2-vl-7b-24gb.yaml")


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def but(section, **values):
    return section.model_copy(update=values)


def test_known_models_have_their_published_sizes(teacher, student):
    assert (teacher.parameters, teacher.vision) == (8_291_375_616, 675_759_104)
    assert (student.parameters, student.vision) == (2_208_985_600, 665_271_296)
    for source in (source for source in KNOWN if "EgoGPT" in source):
        egogpt = known(source)
        tower = sum(one.numel() for one in egogpt.model.model.vision_tower.parameters())
        projector = sum(one.numel() for one in egogpt.model.model.multi_modal_projector.parameters())
        assert (egogpt.language, tower, projector) == (7_615_616_512, 397_747_744, 16_980_992)
        assert egogpt.vision == tower + projector + 3584 + 300 * 3584  # and image_newline and silence


def test_sixteen_bit_weights_take_two_bytes_each(teacher, student):
    assert teacher.weights_bytes("bfloat16") == teacher.stored_bytes == 2 * teacher.parameters
    assert student.weights_bytes("auto") == student.stored_bytes == 2 * student.parameters


def test_a_video_is_a_token_for_four_patches_of_two_frames(student):
    patches, tokens = patches_and_tokens(student.model, VIDEO)
    assert patches == 8 * 448 * 448 / 14**2 == 8192
    assert 8192 / 4 + 48 < tokens < 8192 / 4 + 48 + 32


@pytest.fixture(scope="module", params=[*SAVE, "egogpt-grid", "egogpt-one_token"])
def checkpoint(request, settings, processor, tmp_path_factory) -> Path:
    """A tiny checkpoint of each family that can be planned."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in SAVE:
        SAVE[request.param](folder, settings, processor)
    else:
        save_original(folder / "original", request.param.removeprefix("egogpt-"))
        (folder / "converted").mkdir()
        convert(folder / "original", folder / "converted")
        return folder / "converted"
    return folder


@pytest.mark.parametrize("side", [84, 56, 112])
@pytest.mark.parametrize(("kind", "frames"), [("none", 0), ("image", 1), ("frames", 3), ("video", 4)])
def test_patches_and_tokens_are_the_processors(checkpoint, kind, frames, side):
    """But for the text, which is estimated."""
    planned, processor = planned_model(checkpoint), load_processor(checkpoint)
    if reads_text_alone(planned.config) and kind != "none":
        assert patches_and_tokens(planned, Sizes(kind, frames, side**2, 2, 0, 0))[0] == 0
        return
    sample = make_sample("kitchen", kind, frames, [("What do I hold?", "a cup"), ("Where?", "here")])
    sample = replace(sample, frames=tuple(picture(number, side, side) for number in range(frames)))
    packed = pack(processor, sample, encode(processor, sample, sample.records))
    words = processor.tokenizer.get_vocab()
    marks = {words[token] for token in MARKS if token in words}
    patches, tokens = patches_and_tokens(planned, Sizes(kind, frames, side**2, 2, 0, 0))
    _, text = patches_and_tokens(planned, Sizes("none", 0, 0, 2, 0, 0))
    assert tokens - text == sum(token in marks for token in packed["input_ids"].tolist())
    pixels = [value for name, value in packed.items() if name.startswith("pixel_values")]
    if not pixels:
        assert patches == 0
    elif pixels[0].ndim == 2:
        assert patches == len(pixels[0])
    else:
        vision = planned.config.vision_config
        tiles = pixels[0].shape[0] * pixels[0].shape[1] if pixels[0].ndim == 5 else len(pixels[0])
        assert patches == tiles * (vision.image_size // vision.patch_size) ** 2


def planned_model(folder: Path):
    return on_meta(params.Model(source=str(folder), revision=None, init=None))


def test_a_local_checkpoint_is_planned_by_what_it_has(checkpoint):
    """Sizes and numbers of layers; a table of all stages, with this model as teacher and as student."""
    planned, real = planned_model(checkpoint), load_model(checkpoint, "float32", "cpu")
    assert planned.num_parameters() == real.num_parameters()
    shape = Shape(str(checkpoint), planned)
    visual = [
        parameter
        for name, parameter in real.named_parameters()
        if not name.startswith((language_model_prefix(real), "lm_head"))
    ]
    assert shape.vision == sum(parameter.numel() for parameter in visual)
    assert shape.weights_bytes("float32") == real.get_memory_footprint(return_buffers=False)
    loaded = tiny()
    model = params.Model(source=str(checkpoint), revision=None, init=None)
    loaded = but(loaded, models=but(loaded.models, teacher=model, student=model))
    work = workload(params.load(ROOT / "presets/qwen2-vl-7b.yaml").data, Path("elsewhere.yaml"))
    rows = plan_table.rows(loaded, work)
    assert "evaluate student-nf4" in plan_table.render(rows)
    distill = next(row for row in rows if row.stage == "distill")
    assert (distill.memory.activations > 0) and distill.effort.operations > 0


def test_what_egogpt_leaves_behind_is_fetched_all_the_same():
    encoder = WhisperConfig(
        d_model=1280,
        num_mel_bins=128,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        max_source_positions=1500,
    )
    with torch.device("meta"):
        speech = Speech(encoder, rate=5, width=2048, hidden_size=3584)
    assert sum(parameter.numel() for parameter in speech.parameters()) == EGOGPT_SPEECH


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_a_table(path, in_root):
    loaded = params.load(path)
    rows = plan_table.rows(loaded, workload(loaded.data, path))
    printed = plan_table.render(rows)
    for row in rows:
        assert row.stage in printed
        assert row.effort is None or row.effort.operations > 0
        assert row.memory is None or row.memory.total > gpu_memory.OVERHEAD
    trained = {"distill", "evaluate teacher"} if loaded.models.teacher else {"finetune-student"}
    quantized = {f"quantize-student {method}" for method in loaded.quantize.methods}
    assert {"download-models"} | quantized | trained <= {row.stage for row in rows}
    assert ("finetune-teacher" in printed) == loaded.finetune_teacher.enabled


@pytest.mark.parametrize(("name", "size"), [("egogpt-7b", 48), ("qwen2-vl-7b", 48), ("qwen2-vl-7b-24gb", 24)])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_presets_fit_the_gpu_they_are_for(name, size, method, in_root):
    """With the teacher loaded in 16 bits and fine-tuned too, as their comments promise."""
    path = ROOT / "presets" / f"{name}.yaml"
    loaded = params.load(path)
    loaded = but(loaded, finetune_teacher=but(loaded.finetune_teacher, enabled=True, method=method))
    loaded = but(loaded, targets=but(loaded.targets, precision="bfloat16"))
    rows = plan_table.rows(loaded, workload(loaded.data, path))
    assert plan_table.verdict(rows, "it", size * GIB).startswith("fits it with")
    assert plan_table.verdict(rows, "it", 8 * GIB).startswith("does not fit it: ")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_reads_a_file_that_exists_and_revisions_that_are_pinned_or_named(path):
    loaded = params.load(path)
    assert (ROOT / loaded.data.path).is_file()
    for model in filter(None, (loaded.models.teacher, loaded.models.student)):
        if model.source != "init":
            assert model.source in KNOWN
            assert re.fullmatch("main|[0-9a-f]{40}", model.revision)


def test_nothing_that_stages_depend_on_imports_the_plan():
    others = [path for folder in ("firstsight", "stages") for path in (ROOT / folder).rglob("*.py")]
    for path in others:
        if path.parent.name not in ("planning", "starting") and path.name not in ("plan.py", "start.py"):
            assert "firstsight.plan" not in path.read_text(), path


def test_what_should_take_less_takes_less(teacher, student, preset):
    def distilling(**train):
        return gpu_memory.distilling(student, teacher, but(preset, train=but(preset.train, **train)), VIDEO)

    adapters, full = distilling(), distilling(method="full")
    assert adapters.total < full.total
    assert distilling(method="qlora").weights < adapters.weights
    assert adapters.training < distilling(method="adalora").training
    assert full.total < distilling(method="full", train_vision=True).total
    assert adapters.activations > distilling(gradient_checkpointing=True).activations
    assert adapters.activations < distilling(batch_size=2).activations
    eight_bits = distilling(method="full", optimizer="adamw_8bit")
    paged = eight_bits.cached - full.cached
    assert eight_bits.training + paged < 0.7 * full.training
    assert eight_bits.needed < eight_bits.needed + paged < full.needed
    online = but(preset, targets=but(preset.targets, kind="online"))
    assert adapters.total < gpu_memory.distilling(student, teacher, online, VIDEO).total
    topk = but(preset, targets=but(preset.targets, kind="topk"))
    assert gpu_memory.distilling(student, teacher, topk, VIDEO).weights < adapters.weights
    weights = [teacher.weights_bytes(precision) for precision in ("nf4", "int4", "int8", "bfloat16", "float32")]
    assert weights == sorted(weights)


def test_the_loss_takes_a_chunk_of_logits_of_both_models_and_the_heads_gradient(teacher, student, preset):
    def loss(answer_tokens, **train):
        settings, sizes = but(preset.train, **train), replace(VIDEO, answer_tokens=answer_tokens)
        whole = gpu_memory.distilling(student, teacher, but(preset, train=settings), sizes).activations
        return whole - gpu_memory.training_activations(student, settings, sizes)

    logits = 151_936 * 4
    assert loss(16) == 2 * 16 * logits
    assert loss(8192) == 2 * 640 * logits
    assert loss(16, method="full") == 2 * 16 * logits + 1536 * logits


def test_caching_the_teacher_saves_its_passes(teacher, student, preset, in_root):
    work = workload(preset.data, ROOT / "presets" / "none.yaml")
    online = but(preset, targets=but(preset.targets, kind="online"))
    cached = arithmetic.distilling(student, teacher, preset, work)
    beside = arithmetic.distilling(student, teacher, online, work)
    assert beside - cached == pytest.approx(preset.train.epochs * arithmetic.caching(teacher, work))


def test_caching_visual_tokens_saves_the_towers_passes_and_its_memory(teacher, student, preset, in_root):
    work = workload(preset.data, ROOT / "presets" / "none.yaml")
    computed = but(preset, train=but(preset.train, visual_tokens="computed"))
    passes = arithmetic.distilling(student, teacher, computed, work) - arithmetic.distilling(
        student, teacher, preset, work
    )
    assert passes == pytest.approx(preset.train.epochs * arithmetic.looking(student, work))
    cached, beside = (gpu_memory.distilling(student, teacher, one, VIDEO) for one in (preset, computed))
    assert beside.weights - cached.weights == 2 * student.vision
    assert cached.activations < beside.activations
    looking = gpu_memory.looking(student, preset.train, VIDEO)
    assert looking.weights == student.stored_bytes
    assert looking.needed < beside.needed


def test_graphs_take_the_language_models_activations_where_passes_are_recorded(preset, student, teacher):
    """A mask for each pair of tokens, and for each token 28 values of H and 8 of the MLP, in 28 layers and one more."""

    def cached(**changes) -> float:
        changed = but(preset, train=but(preset.train, **changes))
        return gpu_memory.distilling(student, teacher, changed, VIDEO).cached

    _, tokens = patches_and_tokens(student.model, VIDEO)
    assert cached() == 29 * tokens * (28 * 1536 + 8 * 8960) + 2 * tokens**2
    assert cached(visual_tokens="computed") == cached(train_vision=True) == cached()
    assert cached(gradient_checkpointing=True) < cached() / 5
    dropping = but(preset.train.adapter, dropout=0.1)
    assert cached(adapter=dropping) > cached()
    assert cached(adapter=dropping, gradient_checkpointing=True) == cached(method="qlora") == 0


def test_what_visual_tokens_take_and_save_is_said_where_the_tower_is_frozen(preset, in_root):
    """2,048 tokens of 1,536 numbers of two bytes for each video of 16 frames."""
    work = replace(workload(preset.data, ROOT / "presets" / "none.yaml"), typical=VIDEO)
    samples = work.samples["train"] + work.samples["validation"]
    row = next(row for row in plan_table.rows(preset, work) if row.stage == "cache-visual-tokens")
    assert row.disk == samples * 2048 * 1536 * 2
    cached = r"visual tokens are cached, 5\.\d GB: with their stage, distill takes 5\d% of .*"
    assert re.fullmatch(cached, said_of(preset, work))
    choices = {"visual_tokens": "computed"}, {"train_vision": True}
    computed, trained = (but(preset, train=but(preset.train, **choice)) for choice in choices)
    assert re.fullmatch(r"visual tokens are computed .* cached, 5\.\d GB, .* 5\d% .*", said_of(computed, work))
    assert said_of(trained, work) is None
    for loaded in (computed, trained):
        assert "cache-visual-tokens" not in {row.stage for row in plan_table.rows(loaded, work)}


def test_what_exporting_takes_is_planned(preset, student, teacher, in_root):
    """Of Qwen2-VL-2B: 9.8 GB of float32 graphs, 2.6 GB in 8 bits, 1.5 GB in 4 bits; its sizes once exported."""
    work = workload(preset.data, ROOT / "presets" / "none.yaml")
    assert plan_table.render_exports(preset, work) is None
    both = but(preset, export=but(preset.export, formats=["onnx-int8", "onnx-w4a8"]))
    rows = {row.stage: row for row in plan_table.rows(both, work) if row.stage.startswith("export")}
    assert list(rows) == ["export-student onnx-int8", "export-student onnx-w4a8"]
    assert [round(row.disk / 1e9, 1) for row in rows.values()] == [2.6, 1.5]
    assert {row.scratch for row in rows.values()} == {student.exported_bytes("float32")}
    assert student.exported_bytes("float32") == pytest.approx(9.77e9, rel=0.001)
    line = r"export-student takes 17\.3 GiB of the machine's memory and, on two cores, [\d.]+ hours; .* takes [\d.]+"
    assert re.fullmatch(line, plan_table.render_exports(both, work))
    all_ = but(preset, export=but(preset.export, formats=["onnx"], teacher=True))
    rows = {row.stage: row for row in plan_table.rows(all_, work) if row.stage.startswith("export")}
    assert rows["export-student onnx"].scratch == 0
    assert rows["export-teacher onnx"].disk == teacher.exported_bytes("float32")
    student_line, teacher_line = plan_table.render_exports(all_, work).splitlines()
    assert student_line.startswith("export-student") and teacher_line.startswith("export-teacher")


def test_exporting_and_measuring_take_the_prompts_that_they_read(preset, student, in_root):
    """Qwen2-VL-2B's moments fill 10 parts of its decoder, 4 of its vision tower."""
    work = replace(workload(preset.data, ROOT / "presets" / "none.yaml"), typical=VIDEO)
    language, vision = arithmetic._reading(student, work)
    assert arithmetic.measuring(student, work, preset.evaluate) == pytest.approx(
        (12 * preset.evaluate.latency_runs + 6 * sum(preset.evaluate.throughput_batch_sizes)) * (language + vision)
    )
    plain, rounded = (arithmetic.exporting(student, work, preset.export, [one]) for one in ("onnx-int8", "onnx-w4a8"))
    assert plain == pytest.approx(2 * 32 * 2 * (language + vision))
    samples = preset.export.calibration_samples
    assert rounded - plain == pytest.approx(samples * (language + vision + 10 * language + 4 * vision))
    assert arithmetic.COMPARED == folder._COMPARED
    assert arithmetic.REPEATS == cost._REPEATS


def test_rounding_to_4_bits_by_inputs_takes_their_moments_before_there_are_rounded_weights(preset, student):
    whole, rounded = (student.weights_bytes(precision) for precision in ("bfloat16", "int4"))
    to_nearest, by_inputs = (
        gpu_memory.quantizing(student, "int4", but(preset.quantize, rounding_samples=samples), VIDEO)
        for samples in (0, 128)
    )
    assert to_nearest.needed - gpu_memory.OVERHEAD == whole + rounded
    # Two moments of the 8,960 inputs of down_proj in each layer alone are more than are held at once.
    read = inference.peak(inference.forward_pass(student, "bfloat16", 1, VIDEO))
    assert by_inputs.needed - gpu_memory.OVERHEAD == whole + max(rounded, (2 << 30) + read)


def test_a_student_without_a_teacher_and_with_a_frozen_tower_is_planned(preset, in_root):
    alone = but(preset, models=but(preset.models, teacher=None))
    assert said_of(alone, workload(preset.data, ROOT / "presets" / "none.yaml")) is None


def said_of(loaded, work):
    return plan_table.render_visual_tokens(loaded, work)


def tiny() -> params.Params:
    """The smoke preset with models of the default's width, which outweigh what surrounds their layers.

    Not params.yaml itself: it is the user's to change.
    """
    loaded = params.load(ROOT / "presets/smoke.yaml")
    teacher, student = loaded.models.teacher, loaded.models.student
    wider = {"hidden_size": 128, "intermediate_size": 384, "layers": 3, "heads": 4, "kv_heads": 2}
    seeing = {"vision_hidden_size": 128, "vision_layers": 3, "vision_heads": 4}
    narrower = {"hidden_size": 64, "intermediate_size": 192, "vision_hidden_size": 64}
    models = but(
        loaded.models,
        teacher=but(teacher, init=but(teacher.init, **wider, **seeing)),
        student=but(student, init=but(student.init, **narrower)),
    )
    return but(loaded, models=models)


def test_weights_gradients_and_moments_of_the_default_are_the_real_ones(processor):
    loaded = tiny()
    model = build_model(loaded.models.student.init, processor.tokenizer)
    shape = Shape("init", model)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert shape.trained(loaded.train) == model.num_parameters()
    assert shape.weights_bytes("float32") == model.get_memory_footprint(return_buffers=False)
    linear = shape.linear + sum(one.weight.numel() for one in shape.vision_linears)
    assert gpu_memory.distilling(shape, shape, loaded, VIDEO).training == gradients + moments + 2 * linear


def test_eight_bit_moments_are_the_real_ones(processor, tmp_path):
    """With the embedding's in float32, and but for tensors of fewer than 4,096 numbers, here the norms and biases."""
    wide = tiny()
    model = build_model(wide.models.teacher.init, processor.tokenizer)
    # It knows embeddings by their addresses, which weights of this model may have from those of earlier tests.
    GlobalOptimManager.get_instance().initialize()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, optim=trainer_name("adamw_8bit", "cpu")))
    optimizer = trainer.create_optimizer()
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    names = ("state1", "state2", "absmax1", "absmax2")
    large = [state for parameter, state in optimizer.state.items() if parameter.numel() >= 4096]
    real = sum(state[name].nbytes for state in large for name in names if name in state)
    small = sum(parameter.numel() for parameter in model.parameters() if parameter.numel() < 4096)
    planned = gpu_memory.moments(Shape("init", model), but(wide.train, optimizer="adamw_8bit"))
    assert planned - moments_bytes("adamw_8bit", small, 0) == pytest.approx(real, rel=1e-3)
    assert planned < 0.6 * gpu_memory.moments(Shape("init", model), wide.train)


@pytest.mark.parametrize("precision", METHODS)
def test_quantized_weights_are_the_real_ones(precision, tmp_path):
    """At widths that fill blocks of 64, and but for NF4's scales, which bitsandbytes keeps beside the weights."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 128, "mlp_ratio": 4},
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    shape = Shape("tiny", model)
    loaded = load_model(tmp_path, precision, "cpu")
    real = loaded.get_memory_footprint(return_buffers=False)
    layers = [one for one in loaded.modules() if isinstance(one, Int4Linear)]
    real += sum(one.weight_packed.nbytes + one.weight_scale.nbytes for one in layers)
    # What is kept is float32 on the CPU and half of that on CUDA.
    kept = 4 * (shape.parameters - shape.linear)
    # INT4's scales are float32 on the CPU, too, and of 16 bits on CUDA.
    scales = {"int8": 0, "nf4": 1 / 64 + 4 / (64 * 256), "int4": -2 / 64}[precision] * shape.linear
    assert shape.weights_bytes(precision) - kept / 2 == pytest.approx(real - kept + scales)


@pytest.mark.parametrize("train_vision", [False, True])
def test_adapters_are_as_large_as_pefts(train_vision, processor):
    loaded = tiny()
    settings = but(loaded.train, method="lora", train_vision=train_vision)
    model = build_model(loaded.models.teacher.init, processor.tokenizer)
    shape = Shape("init", model)
    names = "|".join(settings.adapter.target_modules)
    pattern = rf".*language_model.*\.({names})"
    if train_vision:
        pattern += r"|.*visual\.blocks\..*\.(qkv|proj|fc1|fc2)|.*visual\.merger\.mlp\.(0|2)"
    adapted = get_peft_model(model, LoraConfig(r=settings.adapter.rank, target_modules=pattern))
    assert shape.trained(settings) == adapted.get_nb_trainable_parameters()[0]


def test_an_adapter_on_no_layer_is_one_line(student, preset):
    settings = but(preset.train, adapter=but(preset.train.adapter, target_modules=["query"]))
    with pytest.raises(UserError, match=r"adapter.target_modules: expected linear layers of .*, found query"):
        student.trained(settings)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_are_what_autograd_saves(method, processor, tmp_path):
    """Under bfloat16 autocast, on a sequence long enough for its layers to outweigh what surrounds them."""
    SAVE["Qwen2VLForConditionalGeneration"](tmp_path, tiny(), processor)
    settings = but(tiny().train, method=method, train_vision=method == "full", batch_size=2)
    model = load_model(tmp_path, "float32", "cpu").train()
    shape = Shape("tiny", model)
    questions = [
        (f"What is in the {name} hand, and in the other?", "a cup, a ball " * 12) for name in ("left", "right")
    ]
    samples = [make_sample(name, "video", 8, questions) for name in ("a", "b")]
    batch = collate(
        [pack(processor, one, encode(processor, one, one.records)) for one in samples], processor.tokenizer.pad_token_id
    )
    tokens = batch["input_ids"].shape[1]
    copies = 2 * (shape.linear + sum(one.weight.numel() for one in shape.vision_linears))
    if method == "lora":
        model = model.to(torch.bfloat16)
        batch["pixel_values_videos"] = batch["pixel_values_videos"].to(torch.bfloat16)
        config = LoraConfig(r=4, target_modules=settings.adapter.target_modules)
        model = get_peft_model(model, config).get_base_model()
        copies = 0
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        hidden, _ = answer_states(model, batch, batch["labels"])
    found = sum(size for _, size in saved.values()) - copies

    patches, around = patches_and_tokens(shape.model, Sizes("video", 8, 84 * 84, 0, 0, 0))
    assert 2 * patches == len(batch["pixel_values_videos"])
    sizes = Sizes("video", 8, 84 * 84, 1, tokens - around, 0)
    layer, block = gpu_memory.layer_bytes(shape, settings, sizes)
    expected = layer * shape.layers + (block * shape.vision_layers if settings.train_vision else 0)
    assert found == pytest.approx(expected, rel=0.1)
    assert expected < gpu_memory.training_activations(shape, settings, sizes)
    assert hidden.requires_grad


def test_a_built_data_set_is_counted_unless_its_settings_are_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace(tmp_path))
    run_stage(tmp_path, "build_egoqa_dataset")
    values = YAML_SAFE.load(tmp_path / "params.yaml")

    def data_line(locked: dict | None) -> str:
        if locked:
            built = {"params": {"params.yaml": {"data": locked}}}
            with (tmp_path / "dvc.lock").open("w") as file:
                YAML().dump({"schema": "2.0", "stages": {"build-egoqa-dataset": built}}, file)
        plan()
        return capsys.readouterr().out.splitlines()[1]

    counted = "questions about 48 media"
    assert "data/egoqa" in data_line(None)
    assert counted in data_line(None)
    assert counted in data_line(values["data"])
    for other in ({"max_pixels": 6272}, {"synthetic": values["data"]["synthetic"] | {"scenes": 9}}, {"seeds": 1}):
        line = data_line(values["data"] | other)
        assert counted not in line
        assert line.endswith("48 rendered scenes; data/egoqa was built earlier, with other settings")
    size = sum(path.stat().st_size for path in (tmp_path / "data/egoqa").iterdir())
    assert workload(params.load(tmp_path / "params.yaml").data, Path("other.yaml")).disk == pytest.approx(size, rel=0.5)
    data_line(values["data"])
    assert workload(params.load(tmp_path / "params.yaml").data, params.PARAMS_FILE).disk == size


def test_what_is_taken_of_the_data_is_what_is_planned(in_root):
    loaded = params.load(ROOT / "presets/egogpt-7b.yaml")
    work = workload(loaded.data, Path("other.yaml"))
    assert (work.samples["train"], work.samples["validation"]) == (400, 100)
    assert "400 to train, 100 to validate" in work.source
    many = workload(but(loaded.data, train_samples=64_000), Path("other.yaml"))
    assert many.samples["train"] == 64_000
    assert many.samples["test"] == pytest.approx(20_000, rel=0.01)
    assert arithmetic.caching(known(loaded.models.teacher.source), many) > 50 * arithmetic.caching(
        known(loaded.models.teacher.source), work
    )
    rows = plan_table.rows(loaded, many)
    assert next(row for row in rows if row.stage == "build-egoqa-dataset").disk == many.disk > 50 * work.disk


def test_original_egogpt_is_planned_as_it_will_be_converted(tmp_path):
    save_original(tmp_path / "original")
    (tmp_path / "converted").mkdir()
    convert(tmp_path / "original", tmp_path / "converted")
    planned, converted = planned_model(tmp_path / "original"), planned_model(tmp_path / "converted")
    assert planned.config.to_dict() == converted.config.to_dict() | {"_name_or_path": planned.config.name_or_path}
    assert planned.num_parameters() == converted.num_parameters()
    assert Shape("it", planned).stored_bytes == Shape("it", converted).stored_bytes


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ({"corpus": "/bin/true"}, r"init\.corpus: expected a text file to train the tokenizer on, found 'utf-8' codec"),
        ({"embedding_rows": 300}, r"init\.embedding_rows: expected at least \d+, a row for every token, found 300"),
    ],
)
def test_an_init_that_makes_no_model_is_one_line(init, line, in_root):
    model = tiny().models.student
    with pytest.raises(UserError, match=line):
        on_meta(but(model, init=but(model.init, **init)))


def test_a_rank_that_no_layer_has_is_one_line(student, preset):
    settings = but(preset.train, adapter=but(preset.train.adapter, rank=100_000))
    with pytest.raises(UserError, match=r"adapter\.rank: expected at most 1536, .*, found 100000"):
        student.trained(settings)


def test_more_logits_than_there_are_tokens_and_a_smaller_teacher_are_said(tmp_path, monkeypatch, capsys):
    document = YAML_SAFE.load(ROOT / "presets/smoke.yaml")
    document["models"]["teacher"], document["models"]["student"] = (
        document["models"][role] for role in ("student", "teacher")
    )
    document["targets"] |= {"kind": "topk", "k": 10**9}
    monkeypatch.chdir(workspace(tmp_path))
    write_params(tmp_path, document)
    plan()
    printed = capsys.readouterr().out
    assert "the teacher has fewer parameters than the student" in printed
    assert "targets.k is 1,000,000,000, more than there are tokens: all of at most 672 are kept" in printed
    loaded = params.load(tmp_path / "params.yaml")
    work = workload(loaded.data, Path("params.yaml"))
    capped = but(loaded, targets=but(loaded.targets, k=672))
    assert [row.disk for row in plan_table.rows(loaded, work)] == [row.disk for row in plan_table.rows(capped, work)]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("no/such/folder/anywhere", "or a hub repository as owner/name, found neither; correct models"),
        ("/nonexistent", "or a hub repository as owner/name, found neither; correct models"),
        ("someone/some-model-never-downloaded", "hf download someone/some-model-never-downloaded config.json"),
    ],
)
def test_a_model_of_unknown_size_is_one_line(source, line):
    with pytest.raises(UserError, match=line) as error:
        on_meta(params.Model(source=source, revision=None, init=None))
    assert "\n" not in str(error.value)


def test_a_text_only_model_is_said_to_see_nothing(settings, processor, tmp_path, monkeypatch, capsys):
    save_qwen2(tmp_path, settings, processor)
    document = YAML_SAFE.load(ROOT / "presets/qwen2-vl-7b.yaml")
    document["models"]["student"]["source"] = str(tmp_path)
    write_params(tmp_path, document)
    plan(tmp_path / "params.yaml")
    assert f"{tmp_path} reads text alone: for it media are not counted" in capsys.readouterr().out


def test_a_csv_file_without_a_column_of_media_has_none(in_root):
    preset = params.load(ROOT / "presets/text-smoke.yaml")
    assert "not built yet; assumed 1,000 questions of" in workload(preset.data, Path("other.yaml")).source


@pytest.mark.parametrize(("tokens", "records"), [(None, "questions of 256"), (64, "texts of 64")])
def test_where_all_models_read_text_alone_no_media_are_assumed(settings, processor, tmp_path, capsys, tokens, records):
    save_qwen2(tmp_path, settings, processor)
    document = YAML_SAFE.load(ROOT / "presets/qwen2-vl-7b.yaml")
    for model in document["models"].values():
        model["source"] = str(tmp_path)
    document["data"] |= {"source": "csv", "path": "rows.csv", "max_tokens": tokens}
    write_params(tmp_path, document)
    plan(tmp_path / "params.yaml")
    printed = capsys.readouterr().out
    assert re.search(rf"not built yet; assumed [\d,]+ {records} tokens", printed)
    assert "media" not in printed


# 1,532 tokens of four images of 448 x 448 pixels, 52 of them answers, as in docs/benchmarks.md.
STEP = Sizes("image", frames=4, pixels=448**2, questions=1, question_tokens=432, answer_tokens=52)


@pytest.mark.parametrize(
    ("method", "vision", "visual_tokens", "seconds"),
    [("full", True, "computed", 0.282), ("lora", False, "cached", 0.062)],
)
def test_the_hours_of_a_step_are_what_was_measured(method, vision, visual_tokens, seconds, student, preset):
    work = workload(preset.data, Path("other.yaml"))
    work = replace(work, samples={"train": 1, "validation": 0, "test": 0}, typical=STEP)
    assert patches_and_tokens(student.model, STEP) == (4096, 1532)
    settings = but(preset.train, method=method, train_vision=vision, visual_tokens=visual_tokens, epochs=1)
    settings = but(settings, gradient_checkpointing=False)
    low, high = Effort(arithmetic.finetuning(student, settings, work), trains=True).hours(
        hours.known("NVIDIA H100 80GB HBM3")
    )
    assert 0.99 * low <= seconds / 3600 <= 1.01 * high


def test_the_hours_of_targets_and_answers_are_what_was_measured(teacher, preset):
    h100 = hours.known("NVIDIA H100 80GB HBM3")
    work = workload(preset.data, Path("other.yaml"))
    work = replace(work, samples={"train": 4.96, "validation": 0, "test": 0}, typical=VIDEO)
    assert Effort(arithmetic.caching(teacher, work)).hours(h100) == pytest.approx([1 / 3600] * 2, rel=0.01)
    work = replace(work, questions={"test": 1})
    operations = arithmetic.answering(teacher, work, 16)
    for precision, seconds in (("bfloat16", 0.454), ("int8", 1.405)):
        low, high = Effort(operations, tokens=16, precision=precision).hours(h100)
        assert low <= seconds / 3600 <= high


def test_questions_that_the_teacher_answers_take_hours_of_their_own(in_root, preset):
    preset = but(preset, data=but(preset.data, unanswered="teacher", labelled_fraction=0.25))
    work = workload(preset.data, Path("other.yaml"))
    caching = next(row for row in plan_table.rows(preset, work) if row.stage == "cache-teacher-targets")
    batches = -(-work.questions["train"] * 0.75 // preset.targets.batch_size)
    assert caching.effort.tokens == batches * work.typical.answer_tokens


def test_classes_are_read_behind_each_question_and_nothing_is_generated(in_root):
    def planned(preset):
        work = workload(preset.data, Path("other.yaml"))
        return {row.stage: row for row in plan_table.rows(preset, work)}, work

    preset = params.load(ROOT / "presets/dbpedia-qwen.yaml")
    named = but(preset, data=but(preset.data, classes=[f"class {number}" for number in range(20)]))
    (ten, work), (twenty, _) = planned(preset), planned(named)
    assert "assumed 100,000 questions of 256 tokens; 10,000 to train, 1,000 to validate" in work.source
    assert work.disk == 0
    assert ten["cache-teacher-targets"].disk == 11_000 * 4 * (10 + 1)
    assert twenty["cache-teacher-targets"].disk == 11_000 * 4 * (20 + 1)
    for stage in ("cache-teacher-targets", "distill", "finetune-student", "evaluate teacher", "evaluate student"):
        few, many = ten[stage].effort, twenty[stage].effort
        # Sequences of 24 + 262 tokens and 160 or 320 of names, which alone pass the head.
        assert 1.3 < many.operations / few.operations < 1.7
        assert ten[stage].memory.total < twenty[stage].memory.total
    assert ten["evaluate student"].effort.tokens == 0
    # A teacher that is a language model is fine-tuned on one name, as an answer.
    assert ten["finetune-teacher"] == twenty["finetune-teacher"]


def test_an_encoder_reads_no_names_and_is_not_quantized(in_root):
    preset = params.load(ROOT / "presets/dbpedia-bert-tiny.yaml")
    asked = but(preset, quantize=but(preset.quantize, methods=["int8"]))
    work = workload(preset.data, Path("other.yaml"))
    found = {row.stage: row for row in plan_table.rows(asked, work)}
    assert "quantize-student int8" not in found
    named = but(asked, data=but(preset.data, classes=[f"class {number}" for number in range(20)]))
    again = {row.stage: row for row in plan_table.rows(named, work)}
    assert again["distill"].effort == found["distill"].effort
    assert again["cache-teacher-targets"].effort.operations > found["cache-teacher-targets"].effort.operations


def test_gpus_are_known_by_the_names_that_pytorch_gives_them():
    names = {
        "NVIDIA H100 80GB HBM3": "NVIDIA H100",
        "NVIDIA H200": "NVIDIA H200",
        "NVIDIA A100-SXM4-40GB": "NVIDIA A100",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA L4": "NVIDIA L4",
    }
    assert {name: hours.known(name).name for name in names} == names
    # The PCIe model has three quarters of the other's peak; the L40 is no L4; RTX 8000 has no bfloat16.
    assert [hours.known(name) for name in ("NVIDIA H100 PCIe", "NVIDIA L40", "Quadro RTX 8000", "")] == [None] * 4


def test_ranges_of_hours_have_the_digits_that_matter():
    assert hours.between(0.612, 1.54) == "0.61-1.5"
    assert hours.between(9.94, 1234.5) == "9.9-1,234"
    assert hours.between(0.051, 0.0512) == "0.05"


def test_models_that_are_too_small_for_hours_have_none(in_root, capsys):
    plan(ROOT / "presets/smoke.yaml")
    assert "hours on" not in capsys.readouterr().out
    plan(ROOT / "presets/qwen2-vl-7b.yaml")
    assert re.search(r"hours on +cache-teacher-targets .*distill +evaluate +all\n", capsys.readouterr().out)


@pytest.mark.system
def test_the_command_prints_a_table_and_a_verdict():
    command = [sys.executable, "-m", "firstsight", "plan", "presets/qwen2-vl-7b-24gb.yaml"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cache-teacher-targets" in printed
    assert re.search(r"\nfits 80 GiB with .* to spare\n", printed)
    refused = subprocess.run([*command[:-1], "nowhere.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: nowhere.yaml: expected a parameter file")
