"""The frozen model: build, load weights, cut at the nodes, freeze, guard; a batch of pictures to named embeddings.

A forward pass is all that is needed: eval mode, `torch.inference_mode`, no parameter with a gradient. The guard checks that
this is so before and after, and that a row does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from pipeline import config
from pipeline.config import Preprocess
from pipeline.errors import BackboneError, GuardError, PipelineError, nearest
from pipeline.extract.decode import DECODE_VERSION
from pipeline.recipe import Recipe
from pipeline.storage import Store

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Two float32 embeddings of one picture are equal when they differ by at most this share of the largest value."""
_TOLERANCE = {"float32": TOLERANCE, "tf32": 5e-3, "bfloat16": 5e-2, "float16": 5e-3}
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the config says about the backbone, and nothing else: enough to build it anywhere."""

    backbone: config.Backbone
    decode: str
    precision: str
    optimize: bool = True
    """Whether faster equivalents of the model may run in its place. Not part of the recipe."""


class Backbone:
    """A frozen model on one device.

    Attributes:
        recipe: what determines its embeddings.
        preprocess: how the pictures have to be made.
    """

    def __init__(self, spec: Spec, device: str = "cpu") -> None:
        """Build, freeze and check.

        Raises:
            BackboneError: model, weights or a node do not exist or do not fit.
            GuardError: the model mixes the rows of a batch.
        """
        self.device = torch.device(device)
        self.precision = spec.precision
        model, self.preprocess = build(spec.backbone)
        weights_digest = state_digest(model.state_dict())
        self._module = self._placed(freeze(cut(freeze(model), spec.backbone.nodes)))
        self._nodes = dict(spec.backbone.nodes)
        self._mean_C = torch.tensor(self.preprocess.mean, device=self.device).mul_(255)
        self._std_C = torch.tensor(self.preprocess.std, device=self.device).mul_(255)
        if spec.precision != "tf32" and self.device.type == "cuda":
            # PyTorch lets convolutions use TF32 unless told otherwise: three decimal digits, chosen for the user.
            torch.backends.cudnn.allow_tf32 = False
        self._buffers_digest = self._digest_buffers()
        self.recipe = Recipe(
            fields={
                "model": spec.backbone.model,
                "weights": spec.backbone.weights,
                "weights_digest": weights_digest,
                "version": spec.backbone.version,
                "nodes": {column: node.model_dump() for column, node in self._nodes.items()},
                "preprocess": {
                    **self.preprocess.model_dump(mode="json"),
                    "decode": spec.decode,
                    "decode_version": DECODE_VERSION,
                },
                "precision": spec.precision,
            },
            widths=self._check_independence(),
        )
        self.optimized = self._fold() if spec.optimize else "eager"
        """What runs: `eager`, or `batchnorm folded`."""

    def launch(self, images_BHWC: torch.Tensor) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Start a forward pass; what is returned waits for it and gives column to (B, D) float32 in host memory.

        The pictures must stay unchanged until then. On a GPU every pass has a stream of its own, so the copy of one batch runs
        beside the computation of another; on a CPU the pass is done when this returns.
        """
        if self.device.type != "cuda":
            finished = {column: embeddings_BD.numpy() for column, embeddings_BD in self.embed(images_BHWC).items()}
            return lambda: finished
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            on_host = {}
            for column, embeddings_BD in self.embed(images_BHWC).items():
                on_host[column] = torch.empty(embeddings_BD.shape, dtype=torch.float32, pin_memory=True)
                on_host[column].copy_(embeddings_BD, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)

        def wait() -> dict[str, NDArray[np.float32]]:
            done.synchronize()
            return {column: embeddings_BD.numpy() for column, embeddings_BD in on_host.items()}

        return wait

    def new_batch(self, batch_size: int) -> torch.Tensor:
        """Memory for (B, crop, crop, 3) uint8 pictures, page-locked where a GPU copies from it."""
        side = self.preprocess.crop
        return torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    @torch.inference_mode()
    def embed(self, images_BHWC: torch.Tensor) -> dict[str, torch.Tensor]:
        """One forward pass.

        Args:
            images_BHWC: (B, crop, crop, 3) uint8 pictures, on any device.

        Returns:
            Column to (B, D) float32 on the backbone's device, pooled, normalised, and rounded where the precision says so.
            On a GPU the work may still be under way.
        """
        images_BCHW = images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # One fused pass over strided memory that already is channels-last; the uint8 tensor is all that crossed the bus.
        inputs_BCHW = (images_BCHW - self._mean_C[:, None, None]).div_(self._std_C[:, None, None])
        with torch.autocast(self.device.type, dtype=_AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST):
            outputs = self._module(inputs_BCHW)
        return {column: self._finish(outputs[column], node) for column, node in self._nodes.items()}

    def _finish(self, output: torch.Tensor, node: config.Node) -> torch.Tensor:
        """Pool (B, C, H, W), (B, T, C) or (B, D) to (B, D) float32, normalise, round."""
        if node.pool == "mean" and output.ndim > 2:
            output = output.float().mean(dim=(2, 3) if output.ndim == 4 else 1)
        elif node.pool == "cls" and output.ndim == 3:
            output = output[:, 0]
        embeddings_BD = output.flatten(1).float()
        if node.normalize == "l2":
            embeddings_BD = nn.functional.normalize(embeddings_BD, dim=1)
        return embeddings_BD.half().float() if self.precision in _AUTOCAST else embeddings_BD

    def check_frozen(self) -> None:
        """Hold the model to its promise.

        Raises:
            GuardError: a submodule in train mode, a parameter with a gradient, a buffer that changed.
        """
        for name, module in self._module.named_modules():
            if module.training:
                raise GuardError(f"backbone.model: submodule {name or 'root'!r} is in train mode; it was frozen in eval mode")
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                raise GuardError(f"backbone.model: parameter {name!r} has a gradient; it was frozen without")
        if self._digest_buffers() != self._buffers_digest:
            raise GuardError("backbone.model: a buffer changed while images were embedded; a frozen model has no memory")

    def _placed(self, module: nn.Module) -> nn.Module:
        # channels_last is the layout in which convolutions are fastest.
        return module.to(self.device).to(memory_format=torch.channels_last)

    def _fold(self) -> str:
        """Fold BatchNorm into the convolutions before it, if the outputs stay equal; what runs then.

        A frozen BatchNorm is a scale and a shift, which the convolution's weights can take: a pass over memory less.
        """
        eager, pictures_BHWC = self._module, self._pictures()
        if not isinstance(eager, _Renamed) or not isinstance(eager.extractor, GraphModule):
            return "eager"
        try:
            # A shell of its own around the same layers: the layers that are folded are replaced in it, not changed.
            shell = GraphModule(eager.extractor, eager.extractor.graph)
            folded = fuse(shell, inplace=True, no_trace=True)
        except Exception as error:  # an experimental part of PyTorch: whatever it stumbles over, eager works
            logger.warning("BatchNorm could not be folded, the model runs as it is: %s: %s", type(error).__name__, error)
            return "eager"
        expected = self.embed(pictures_BHWC)
        self._module = self._placed(freeze(_Renamed(folded, eager.outputs)))
        for column, embeddings_BD in self.embed(pictures_BHWC).items():
            if not _equal(embeddings_BD, expected[column], _TOLERANCE[self.precision]):
                logger.warning("folding BatchNorm changes %s by more than rounding, the model runs as it is", column)
                self._module = eager
                return "eager"
        self._buffers_digest = self._digest_buffers()
        return "batchnorm folded"

    def _pictures(self) -> torch.Tensor:
        """(4, crop, crop, 3) uint8 of noise, the same on every call."""
        side = self.preprocess.crop
        return torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def _digest_buffers(self) -> str:
        return state_digest(dict(self._module.named_buffers()))

    def _check_independence(self) -> dict[str, int]:
        """Embed one picture among different neighbours; the widths of the columns.

        BatchNorm without running statistics mixes the rows of a batch even in eval mode: that is found here, before a row of
        it is written.
        """
        pictures_BHWC = self._pictures()
        others_BHWC = torch.cat([pictures_BHWC[:1], torch.zeros_like(pictures_BHWC[1:])])
        among_others, alone = self.embed(pictures_BHWC), self.embed(others_BHWC)
        for column, embeddings_BD in among_others.items():
            if embeddings_BD.requires_grad:
                raise GuardError(f"backbone.nodes.{column}: the embedding carries a gradient")
            if embeddings_BD.shape[0] != len(pictures_BHWC):
                raise BackboneError(
                    f"backbone.nodes.{column}: node {self._nodes[column].node!r} gives {tuple(embeddings_BD.shape)} for a "
                    f"batch of {len(pictures_BHWC)}; choose a node with one row per image"
                )
            if not _equal(embeddings_BD[0], alone[column][0], _TOLERANCE[self.precision]):
                raise GuardError(
                    f"backbone.nodes.{column}: an image's embedding changes with its neighbours in the batch; "
                    "does the model use batch statistics (BatchNorm with track_running_stats=False)?"
                )
        self.check_frozen()
        return {column: embeddings_BD.shape[1] for column, embeddings_BD in among_others.items()}


def _equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether embeddings differ by at most `tolerance` of the largest value."""
    limit = tolerance * max(expected.abs().max().item(), 1e-12)
    return (found - expected).abs().max().item() <= limit


def build(settings: config.Backbone) -> tuple[nn.Module, Preprocess]:
    """The model with its weights loaded, and the preprocessing that belongs to them. Not frozen yet."""
    provider, _, name = settings.model.partition("/")
    with torch.random.fork_rng(devices=[]):  # whoever calls this keeps their own random state
        if settings.weights.startswith("seed:"):
            torch.manual_seed(int(settings.weights.partition(":")[2]))
        model, preprocess, loaded = _PROVIDERS[provider](name, settings)
    if not loaded:
        load_weights(model, settings.weights)
    return model, settings.preprocess or preprocess


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode in every submodule, no parameter with a gradient. Changes and returns `model`."""
    return model.eval().requires_grad_(False)


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
    return _Renamed(extractor, {column: by_node[node.node] for column, node in nodes.items()})


class _Renamed(nn.Module):
    """Gives every column its node's output."""

    def __init__(self, extractor: nn.Module, outputs: dict[str, str]) -> None:
        super().__init__()
        self.extractor, self.outputs = extractor, outputs

    def forward(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
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


def _torchvision(name: str, settings: config.Backbone) -> Built:
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        raise BackboneError(f"backbone.model: torchvision has no classification model {name!r}; {nearest(name, models)}")
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
        raise BackboneError(f"backbone.model: timm has no model {name!r}; {nearest(architecture, timm.list_models())}")
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
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise BackboneError(f"backbone.model: {name} cannot be imported: {error}") from None
    if settings.weights != "builtin" and not _is_elsewhere(settings.weights):
        raise BackboneError(
            f"backbone.weights: {settings.weights!r} is wrong for a python model; allowed are builtin, the URL of a "
            ".safetensors or .pth file, package:MODULE/FILE, or seed:N"
        )
    model = function()
    if not isinstance(model, nn.Module):
        raise BackboneError(f"backbone.model: {name} returned {type(model).__name__}, not a torch.nn.Module")
    return model, Preprocess(), settings.weights == "builtin" or settings.weights.startswith("seed:")


_PROVIDERS: dict[str, Callable[[str, config.Backbone], Built]] = {"torchvision": _torchvision, "timm": _timm, "python": _python}
"""A new provider is a function here and its name in `config.Backbone`."""


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
        raise BackboneError(f"package {module_name!r} is not installed")
    return str(Path(spec.submodule_search_locations[0]) / path)


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits of SHA-256 over names, types, shapes and bytes of tensors."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()[:32]
