"""A model as the config names it: built, its weights loaded, cut at the nodes. Not frozen, checked or run here.

A new provider is a function and a line in `_PROVIDERS`; or in a package of its own, see `plugins.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from pipeline import config, plugins
from pipeline.config import Preprocess
from pipeline.errors import BackboneError, PipelineError, nearest
from pipeline.storage import Store


def build(settings: config.Backbone) -> tuple[nn.Module, Preprocess]:
    """The model with its weights loaded, and the preprocessing that belongs to them. Not frozen yet."""
    provider, _, name = settings.model.partition("/")
    with torch.random.fork_rng(devices=[]):  # whoever calls this keeps their own random state
        if settings.weights.startswith("seed:"):
            torch.manual_seed(int(settings.weights.partition(":")[2]))
        model, preprocess, loaded = _provider(provider)(name, settings)
    if not loaded:
        load_weights(model, settings.weights)
    return model, settings.preprocess or preprocess


def modules(settings: config.Backbone) -> tuple[str, ...]:
    """What a model of the user's own is imported from; none for those of a library."""
    provider, _, name = settings.model.partition("/")
    return (name.partition(":")[0],) if provider == "python" else ()


def cut(model: nn.Module, nodes: Mapping[str, config.Node]) -> nn.Module:
    """The part of the model's graph that the nodes need, returning a dictionary of column to raw output.

    Raises:
        BackboneError: a node that the graph does not have, with the nearest that it has.
    """
    try:
        leaves = get_graph_node_names(model, tracer_kwargs=_tracer(model), suppress_diff_warning=True)[1]
    except Exception as error:  # tracing runs the model's own code, which can raise anything
        return _Hooked(model, nodes, f"{type(error).__name__}: {error}")
    # `layer4` names the last node below it: torchvision takes every prefix of a node's path.
    names = dict.fromkeys(leaf.rsplit(".", up)[0] for leaf in leaves for up in range(leaf.count("."), -1, -1))
    for column, node in nodes.items():
        if node.node not in names:
            hint = nearest(node.node, names) or f"the last ones are {', '.join(leaves[-5:])}"
            raise BackboneError(f"backbone.nodes.{column}.node: the model has no node {node.node!r}; {hint}")
    # One node may fill several columns; torchvision's dictionary has one column a node.
    by_node = {node.node: f"n{number}" for number, node in enumerate(nodes.values())}
    extractor = create_feature_extractor(model, by_node, tracer_kwargs=_tracer(model), suppress_diff_warning=True)
    return Cut(extractor, {column: by_node[node.node] for column, node in nodes.items()})


class Cut(nn.Module):
    """A traced model that gives every column its node's output."""

    def __init__(self, extractor: nn.Module, outputs: dict[str, str]) -> None:
        super().__init__()
        self.extractor, self.outputs = extractor, outputs

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised (B, 3, H, W) to column and what the node gives."""
        outputs = self.extractor(images_BCHW)
        return {column: outputs[name] for column, name in self.outputs.items()}


class _Hooked(nn.Module):
    """For models that cannot be traced: the nodes are submodules, whose outputs forward hooks collect."""

    def __init__(self, model: nn.Module, nodes: Mapping[str, config.Node], why: str) -> None:
        super().__init__()
        self.model = model
        modules = dict(model.named_modules())
        self._seen: dict[str, torch.Tensor] = {}
        for column, node in nodes.items():
            if node.node not in modules or not node.node:
                hint = nearest(node.node, modules) or f"it has {', '.join(list(modules)[1:6])}, …"
                raise BackboneError(
                    f"backbone.nodes.{column}.node: the model cannot be traced ({why[:200]}), so a node has to be one of its "
                    f"submodules, and {node.node!r} is none; {hint}"
                )
            modules[node.node].register_forward_hook(self._collect(column))

    def _collect(self, column: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[column] = output

        return hook

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model(images_BCHW)
        seen, self._seen = self._seen, {}
        return seen


def _tracer(model: nn.Module) -> dict[str, Any]:
    """What torch.fx must not look into; timm keeps its own list for its models."""
    if not type(model).__module__.startswith("timm."):
        return {}
    from timm.models._features_fx import get_notrace_functions, get_notrace_modules

    return {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}


# Providers: name and settings to the model, its preprocessing, and whether the weights are in it already.

Built = tuple[nn.Module, Preprocess, bool]
Provider = Callable[[str, config.Backbone], Built]
"""Raises BackboneError where there is no such model. Weights that are not in the model yet are loaded into it from the file
that the config names."""


def _provider(name: str) -> Provider:
    if (known := _PROVIDERS.get(name)) is not None:
        return known
    added: Provider = plugins.load(plugins.BACKBONES, name)
    return added


def _torchvision(name: str, settings: config.Backbone) -> Built:
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        hint = nearest(name, models) or "for example resnet50, vit_b_16, convnext_tiny"
        raise BackboneError(f"backbone.model: torchvision has no classification model {name!r}; {hint}")
    enum = torchvision.models.get_model_weights(name)
    members = {member.name: member for member in enum}
    weights = members.get(settings.weights)
    if weights is None and not _is_elsewhere(settings.weights):
        raise BackboneError(
            f"backbone.weights: {name} has no weights {settings.weights!r}; allowed are {', '.join(members)}, "
            "the URL of a .safetensors or .pth file, or seed:N"
        )
    try:
        # Two old models warn unless they are told to initialise what is not loaded.
        extra = {"init_weights": True} if name in {"googlenet", "inception_v3"} and weights is None else {}
        model = torchvision.models.get_model(name, weights=weights, **extra)
    except OSError as error:
        raise BackboneError(f"backbone.weights: {settings.weights} of {name} could not be downloaded: {error}") from None
    # Without an enum member the preprocessing is that of the model's first weights: an architecture has its resolution.
    preset = (weights or next(iter(enum))).transforms()
    preprocess = Preprocess(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return model, preprocess, weights is not None or settings.weights.startswith("seed:")


def _timm(name: str, settings: config.Backbone) -> Built:
    try:
        import timm
        from timm.data.config import resolve_data_config
    except ImportError:
        raise BackboneError("backbone.model: timm is not installed; install frozen-pipeline[timm]") from None
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models()) or "timm.list_models() has them"
        raise BackboneError(f"backbone.model: timm has no model {name!r}; {hint}")
    pretrained = settings.weights == "pretrained"
    if not pretrained and not _is_elsewhere(settings.weights):
        raise BackboneError(
            f"backbone.weights: {settings.weights!r} is wrong for a timm model; allowed are pretrained, the URL of a "
            ".safetensors or .pth file, or seed:N"
        )
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # timm passes on whatever its hub client raises
        raise BackboneError(f"backbone.model: timm could not make {name!r}: {error}") from None
    data = resolve_data_config({}, model=model)
    interpolation = data["interpolation"]
    preprocess = Preprocess(
        resize=int(data["input_size"][1] / data["crop_pct"]),
        crop=data["input_size"][1],
        interpolation=interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    return model, preprocess, pretrained or settings.weights.startswith("seed:")


def _python(name: str, settings: config.Backbone) -> Built:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except ImportError as error:
        where = "modules are looked for in the working directory, in PYTHONPATH and among what is installed"
        raise BackboneError(f"backbone.model: {name} cannot be imported: {error}; {where}") from None
    except AttributeError as error:
        hint = nearest(function_name, [each for each in vars(module) if callable(getattr(module, each))])
        raise BackboneError(f"backbone.model: {name} cannot be imported: {error}" + (f"; {hint}" if hint else "")) from None
    if settings.weights != "builtin" and not _is_elsewhere(settings.weights):
        raise BackboneError(
            f"backbone.weights: {settings.weights!r} is wrong for a python model; allowed are builtin, the URL of a "
            ".safetensors or .pth file, package:MODULE/FILE, or seed:N"
        )
    model = function()
    if not isinstance(model, nn.Module):
        raise BackboneError(f"backbone.model: {name} returned {type(model).__name__}, not a torch.nn.Module")
    return model, Preprocess(), settings.weights == "builtin" or settings.weights.startswith("seed:")


_PROVIDERS: dict[str, Provider] = {"torchvision": _torchvision, "timm": _timm, "python": _python}
"""Also named in `config.PROVIDERS`."""


# Weights


def _is_elsewhere(weights: str) -> bool:
    return weights.startswith(("seed:", "package:")) or weights.endswith((".safetensors", ".pth", ".pt", ".bin"))


def load_weights(model: nn.Module, url: str) -> None:
    """Load a state dictionary without running anything that is in the file.

    Raises:
        BackboneError: no such file, not a plain state dictionary, or names and shapes that do not fit the model.
    """
    try:
        payload = Path(_package_file(url)).read_bytes() if url.startswith("package:") else Store().read(url)
    except (PipelineError, OSError) as error:
        raise BackboneError(f"backbone.weights: {error}") from None
    try:
        if url.endswith(".safetensors"):
            import safetensors.torch

            state: Any = safetensors.torch.load(payload)
        else:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a file from anyone: unpickling refuses in many ways
        raise BackboneError(f"backbone.weights: {url} is not a plain file of weights: {str(error).splitlines()[0]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise BackboneError(f"backbone.weights: {url} does not fit the model: {reason[:400]}") from None


def _package_file(url: str) -> str:
    """`package:MODULE/PATH` as a path inside an installed package, which is found but not run."""
    module_name, _, path = url.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module_name)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(f"package {module_name!r} is not installed; install it, or give the URL of a file")
    return str(Path(spec.submodule_search_locations[0]) / path)


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of SHA-256 over names, types, shapes and bytes of tensors."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()[:32]
