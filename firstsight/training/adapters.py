"""Prepare a model for training by a fine-tuning method: of all its weights, or of low-rank adapters (peft).

    full      every weight, in float32
    lora      low-rank updates of linear layers (Hu et al., 2021, arXiv:2106.09685), over frozen weights
    qlora     LoRA over frozen NF4 weights (Dettmers et al., 2023, arXiv:2305.14314)
    adalora   updates in SVD form whose ranks are allocated during training (Zhang et al., 2023, arXiv:2303.10512)

Without `train_vision`, the language model alone is trained; vision tower and projector are frozen.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from firstsight.core.errors import UserError
from firstsight.core.files import link_folder
from firstsight.core.params import Optimisation
from firstsight.models.architecture import is_encoder, linear_layers, sides
from firstsight.models.device import training_precision
from firstsight.models.loading import ADAPTER, load_model
from firstsight.models.quantized import language_model_prefix, stored_method

# The subfolder of a student's folder that holds its adapters, which are also merged into its weights.
MERGED_ADAPTER = "merged-adapter"
# The subfolder of a student's folder that holds the weights of the last step, if they are kept.
FINAL = "final"
# AdaLoRA's state per adapter weight: sensitivity, its moving average, and the moving average of its changes.
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class TrainableModel:
    """Load a model and prepare it for training by one of the methods; `model` includes the adapters.

    Args:
        folder: the model's folder.
        settings: `method`, `train_vision`, `adapter` and `seed` are used.
        steps: number of optimizer steps of the training, over which AdaLoRA schedules its ranks.
        classes: names of the classes, for an encoder: it gets a new head for them, unless it has one.
        without_tower: whether to train on cached visual tokens: vision tower and projector are out of the model, and in
            the CPU's memory, until it is saved.

    Raises:
        UserError: the folder's weights are quantized, or have an adapter and would get another; no layer has one of the
            names in `adapter.target_modules`, or `adapter.rank` exceeds the width of all; and as `load_model` raises.
    """

    def __init__(
        self,
        folder: Path,
        settings: Optimisation,
        device: str,
        steps: int,
        *,
        classes: Sequence[str] = (),
        without_tower: bool = False,
    ):
        if method := stored_method(folder):
            raise UserError(
                f"{folder}: expected weights that can be trained, found them quantized to {method}; take the model "
                "that it was quantized from, with method: qlora if memory is short"
            )
        if settings.method != "full" and (folder / ADAPTER).is_dir():
            raise UserError(
                f"{folder}: expected a model without an adapter of its own, because method is {settings.method}, found "
                f"{ADAPTER}/; set method to full, or take the model with the adapter merged (peft's merge_and_unload)"
            )
        self._folder, self._method, self._device = folder, settings.method, device
        set_seed(settings.seed)  # for the adapters' initial weights
        model = load_model(folder, training_precision(settings.method, device), device, classes=classes)
        self._peft: PeftModel | None = None
        if settings.method == "full":
            prefix = language_model_prefix(model)
            for name, parameter in model.named_parameters():
                language = name.startswith((prefix, "lm_head")) or is_encoder(model.config.model_type)
                parameter.requires_grad = settings.train_vision or language
            self.model = model
        else:
            self._peft = get_peft_model(model, _peft_config(model, folder, settings, steps))
            self.model = self._peft.get_base_model()
        self._tower = _tower(self.model) if without_tower else {}
        for name, module in self._tower.items():
            setattr(self.model.model, name, None)
            module.to("cpu")

    def regularisation(self) -> Tensor | None:
        """Return AdaLoRA's weighted penalty on singular vectors that are not orthonormal; None for other methods."""
        if self._method != "adalora":
            return None
        config = self._peft.peft_config["default"]
        factors = [
            product
            for layer in self.model.modules()
            if isinstance(layer, AdaLoraLayer)
            for left, right in [(layer.lora_A["default"], layer.lora_B["default"])]
            for product in (left @ left.T, right.T @ right)
        ]
        penalties = [torch.linalg.norm(one - torch.eye(len(one), device=one.device)) for one in factors]
        return config.orth_reg_weight * torch.stack(penalties).mean()

    def update_ranks(self, step: int) -> None:
        """Let AdaLoRA reallocate its ranks; to be called after each optimizer step, before gradients are zeroed."""
        if self._method == "adalora":
            self._peft.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed training needs besides the trained weights: AdaLoRA's importance scores and ranks."""
        if self._method != "adalora":
            return {}
        allocator, pattern = self._peft.base_model.rankallocator, self._peft.peft_config["default"].rank_pattern
        importance = {f"{kind}/{name}": one for kind in _IMPORTANCE for name, one in getattr(allocator, kind).items()}
        return importance | {f"ranks/{name}": torch.tensor(ranks) for name, ranks in (pattern or {}).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what `state_dict` returned; an empty state resets AdaLoRA to the start of training."""
        if self._method != "adalora":
            return
        allocator, config = self._peft.base_model.rankallocator, self._peft.peft_config["default"]
        by_kind: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_IMPORTANCE, "ranks")}
        for key, value in state.items():
            kind, name = key.split("/", 1)
            by_kind[kind][name] = value
        config.rank_pattern = {name: ranks.tolist() for name, ranks in by_kind["ranks"].items()} or None
        for kind in _IMPORTANCE:
            setattr(allocator, kind, {name: value.to(self._device) for name, value in by_kind[kind].items()})

    def save(self, folder: Path) -> None:
        """Save the trained weights, or link the base model's files and save the adapter in the subfolder `ADAPTER`."""
        if self._peft is None:
            self._save_weights(self.model, folder)
        else:
            link_folder(self._folder, folder)
            self._peft.save_pretrained(folder / ADAPTER)

    def save_merged(self, folder: Path) -> None:
        """Save the model with its adapters merged into the weights, in the dtype of the folder it was loaded from.

        The adapters alone are kept beside it, in the subfolder `MERGED_ADAPTER`.
        """
        if self._peft is not None:
            self._peft.save_pretrained(folder / MERGED_ADAPTER)
            (folder / MERGED_ADAPTER / "README.md").unlink()  # peft's form of a model card, which nobody has filled in
        for name, module in self._tower.items():
            setattr(self.model.model, name, module)
        if self._method in ("lora", "adalora"):
            self._save_weights(self._peft.merge_and_unload(), folder)
        elif self._method == "qlora":
            self._save_weights(self._merge_dequantized(), folder)
        else:
            self._save_weights(self.model, folder)

    def save_final(self, folder: Path) -> None:
        """Save the trained weights as they are after the last step: the whole model, or the adapter alone."""
        if self._peft is not None:
            self._peft.save_pretrained(folder)
            (folder / "README.md").unlink()  # as above
            return
        for name, module in self._tower.items():
            setattr(self.model.model, name, module)
        self._save_weights(self.model, folder)

    def _save_weights(self, model: PreTrainedModel, folder: Path) -> None:
        dtype = AutoConfig.from_pretrained(self._folder).dtype
        (model.to(dtype) if dtype is not None else model).save_pretrained(folder)

    def _merge_dequantized(self) -> PreTrainedModel:
        """Return the model with the adapters merged into its dequantized NF4 weights.

        Merging into the original weights instead would give another model than the one that was trained.
        """
        import bitsandbytes as bnb  # absent where nothing is quantized

        merged = load_model(self._folder, "auto", self._device)
        for name, layer in list(self.model.named_modules()):
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            if name.endswith(".base_layer") or not isinstance(base, bnb.nn.Linear4bit):
                continue
            weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
            if isinstance(layer, BaseTunerLayer):
                weight = weight + layer.get_delta_weight("default").float()
            target: Any = merged.get_submodule(name)
            stored = weight.T if isinstance(target, Conv1D) else weight
            target.weight.data.copy_(stored.to(target.weight.dtype))
        return merged


def _tower(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules beside the language model, by name: vision tower and projector."""
    return {name: module for name, module in model.model.named_children() if name != "language_model"}


def _peft_config(model: PreTrainedModel, folder: Path, settings: Optimisation, steps: int) -> PeftConfig:
    """Return peft's configuration of the adapters of `settings`."""
    adapter = settings.adapter
    common: dict[str, Any] = {
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": _target_modules(model, folder, settings),
    }
    if heads := _new_heads(model):
        common["modules_to_save"] = heads
    # GPT-2's layers store their weights with inputs first; peft would find out by itself, with a warning for each.
    common["fan_in_fan_out"] = any(isinstance(layer, Conv1D) for layer in linear_layers(model).values())
    if settings.method != "adalora":
        return LoraConfig(r=adapter.rank, **common)
    # Ranks start at 1.5 times the target; the budget falls to it between a tenth and four fifths of the steps.
    return AdaLoraConfig(
        init_r=-(-3 * adapter.rank // 2),
        target_r=adapter.rank,
        tinit=steps // 10,
        tfinal=steps // 5,
        deltaT=max(1, steps // 100),
        total_step=steps,
        **common,
    )


def _new_heads(model: PreTrainedModel) -> list[str]:
    """Return the names of an encoder's modules outside its body, which are trained whole; [] for other models."""
    if not is_encoder(model.config.model_type):
        return []
    outside = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return [name for name in outside if any(True for _ in getattr(model, name).parameters())]


def _target_modules(model: PreTrainedModel, folder: Path, settings: Optimisation) -> str:
    """Return a regular expression of the layers to adapt.

    They are the layers of the language model that `adapter.target_modules` names (null: all), and, with `train_vision`,
    every linear layer outside the language model except the head.

    Raises:
        UserError: no layer has one of these names, or `adapter.rank` exceeds the width of all.
    """
    prefix = language_model_prefix(model)
    layers = linear_layers(model)
    language = {name.rsplit(".", 1)[-1] for name in layers if name.startswith(prefix)}
    targets = settings.adapter.target_modules or sorted(language)
    for target in targets:
        if target not in language:
            raise UserError(
                f"{folder}: expected a linear layer named {target!r} in the language model, as adapter.target_modules "
                f"says, found {sorted(language)}; correct adapter.target_modules, or set it to null, which takes all"
            )
    chosen = [rf"{re.escape(prefix)}.*\.(?:{'|'.join(map(re.escape, targets))})"]
    if settings.train_vision and not is_encoder(model.config.model_type):
        chosen += [re.escape(name) for name in layers if not name.startswith((prefix, "lm_head"))]
    pattern = "|".join(f"(?:{one})" for one in chosen)
    widths = [min(sides(layer)) for name, layer in layers.items() if re.fullmatch(pattern, name)]
    if settings.adapter.rank > max(widths):
        raise UserError(
            f"{folder}: expected adapter.rank of at most {max(widths)}, the smaller side of the largest target "
            f"module, found {settings.adapter.rank}; lower it, or set method to full"
        )
    return pattern
