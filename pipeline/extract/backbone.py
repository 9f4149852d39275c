"""The frozen model on one device: freeze, guard, run; a batch of pictures to named embeddings.

A forward pass is all that is needed: eval mode, `torch.inference_mode`, no parameter with a gradient. The guard checks that
this is so before and after, and that a row does not depend on its neighbours in the batch. What runs in the model's place
because it is faster is held against it on the first real pictures before it makes a row.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.fx import GraphModule

from pipeline import config
from pipeline.config import Preprocess
from pipeline.errors import BackboneError, GuardError, SampleError
from pipeline.extract.decode import DECODE_VERSION
from pipeline.extract.model import Cut, build, cut, state_digest
from pipeline.recipe import TOLERANCE, Recipe

logger = logging.getLogger(__name__)

EAGER, FOLDED, COMPILED = "eager", "batchnorm folded", "compiled"
"""Programs: the model as it is, and what may run in its place."""
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_CHECKED = 8
"""Real pictures on which a faster equivalent has to agree with the model."""

Embeddings = dict[str, torch.Tensor]
"""Column to (B, D) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the config says about the backbone, and nothing else: enough to build it anywhere."""

    backbone: config.Backbone
    decode: str
    precision: str
    fold: bool = True
    """Whether BatchNorm may be folded into convolutions. Not part of the recipe."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass that was started."""

    wait: Callable[[], dict[str, NDArray[np.float32]]]
    """Waits for it and gives column to (B, D) float32 in host memory."""
    seconds: Callable[[], float]
    """How long it took on the device; only after `wait`."""


class Backbone:
    """A frozen model on one device.

    Attributes:
        recipe: what determines its embeddings.
        preprocess: how the pictures have to be made.
        program: what runs: `eager` or `batchnorm folded`; single batch sizes may also have a `compiled` one.
    """

    def __init__(self, spec: Spec, device: str = "cpu") -> None:
        """Build, freeze and check.

        Raises:
            BackboneError: model, weights or a node do not exist or do not fit.
            GuardError: the model mixes the rows of a batch.
        """
        self.device = torch.device(device)
        self.spec = spec
        model, self.preprocess = build(spec.backbone)
        weights_digest = state_digest(model.state_dict())
        self._nodes = dict(spec.backbone.nodes)
        self._module = self._placed(cut(freeze(model), self._nodes))
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
        self.program = EAGER
        self._compiled: dict[int, Callable[[torch.Tensor], Embeddings]] = {}
        self._checking = threading.Lock()
        self._real_BHWC: torch.Tensor | None = None
        self.has_pictures = threading.Event()
        """Set with the first real batch: from then on a compiled program can be adopted."""
        self._unchecked: Program | None = None
        """The model as it was built, until what was folded has been held against it."""
        if spec.fold and (folded := fold(self._module.module)) is not None:
            self._unchecked, self._module = self._module, self._placed(folded)
            self._buffers_digest = self._digest_buffers()
            self.program = FOLDED

    @torch.inference_mode()
    def embed(self, images_BHWC: torch.Tensor) -> Embeddings:
        """One forward pass.

        Args:
            images_BHWC: (B, crop, crop, 3) uint8 pictures, on any device.

        Returns:
            Column to (B, D) float32 on the backbone's device, pooled, normalised, and rounded where the precision says so.
            On a GPU the work may still be under way.
        """
        # The uint8 pictures are all that crosses the bus.
        outputs: Embeddings = self._module(images_BHWC.to(self.device, non_blocking=True))
        return outputs

    @torch.inference_mode()
    def launch(self, images_BHWC: torch.Tensor, program: str = "") -> Pass:
        """Start a forward pass of `program`, of the backbone's own when it is left out.

        The pictures must stay unchanged until it is done. On a GPU every pass has a stream of its own, so the copy of one batch
        runs beside the computation of another; on a CPU the pass is done when this returns.

        Raises:
            torch.OutOfMemoryError: the batch is too large for the device.
        """
        if self._real_BHWC is None:
            self._check_first(images_BHWC)
        run = self._compiled.get(len(images_BHWC), self._module) if program == COMPILED else self._module
        if self.device.type != "cuda":
            start = time.perf_counter()
            finished = {column: embeddings_BD.numpy() for column, embeddings_BD in run(images_BHWC).items()}
            seconds = time.perf_counter() - start
            return Pass(lambda: finished, lambda: seconds)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        begun, computed, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            on_device_BHWC = images_BHWC.to(self.device, non_blocking=True)
            begun.record(stream)
            outputs = run(on_device_BHWC)
            computed.record(stream)
            on_host = {}
            for column, embeddings_BD in outputs.items():
                on_host[column] = torch.empty(embeddings_BD.shape, dtype=torch.float32, pin_memory=True)
                on_host[column].copy_(embeddings_BD, non_blocking=True)
            done.record(stream)

        def wait() -> dict[str, NDArray[np.float32]]:
            done.synchronize()
            return {column: embeddings_BD.numpy() for column, embeddings_BD in on_host.items()}

        return Pass(wait, lambda: begun.elapsed_time(computed) / 1000)

    def refusals(self, outputs: Mapping[str, NDArray[np.float32]]) -> list[SampleError | None]:
        """Row by row of what a pass gave: why it cannot be stored, None where it can."""
        finite_B = np.logical_and.reduce([np.isfinite(values_BD).all(axis=1) for values_BD in outputs.values()])
        message = f"the embedding is not finite in {self.spec.precision}"
        return [None if is_finite else SampleError("embed", "NotFinite", message) for is_finite in finite_B]

    def adopt(self, batch_size: int, compiled: Callable[[torch.Tensor], Embeddings]) -> bool:
        """Let a compiled program run batches of one size, if it agrees with the model on the first real pictures."""
        assert self._real_BHWC is not None, "a batch was launched"
        repeats = -(-batch_size // len(self._real_BHWC))
        images_BHWC = self._real_BHWC.repeat(repeats, 1, 1, 1)[:batch_size].to(self.device)
        with torch.inference_mode():
            difference = self._difference(compiled(images_BHWC), self._module(images_BHWC))
        if difference:
            logger.warning("compiling changes %s by more than rounding; the model runs as it is", difference)
            return False
        self._compiled[batch_size] = compiled
        return True

    @property
    def program_module(self) -> Program:
        """What a compiler has to reproduce."""
        return self._module

    def new_batch(self, batch_size: int) -> torch.Tensor:
        """Memory for (B, crop, crop, 3) uint8 pictures, page-locked where a GPU copies from it."""
        side = self.preprocess.crop
        return torch.zeros(batch_size, side, side, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def check_frozen(self) -> None:
        """Hold the model to its promise.

        Raises:
            GuardError: a submodule in train mode, a parameter with a gradient, a buffer that changed.
        """
        for name, module in self._module.module.named_modules():
            if module.training:
                raise GuardError(f"backbone.model: submodule {name or 'root'!r} is in train mode; it was frozen in eval mode")
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad or parameter.grad is not None:
                raise GuardError(f"backbone.model: parameter {name!r} has a gradient; it was frozen without")
        if self._digest_buffers() != self._buffers_digest:
            raise GuardError("backbone.model: a buffer changed while images were embedded; a frozen model has no memory")

    def _placed(self, module: nn.Module) -> Program:
        # channels_last is the layout in which convolutions are fastest.
        program = Program(freeze(module), self._nodes, self.preprocess, self.spec.precision)
        return program.to(self.device).to(memory_format=torch.channels_last)

    def _check_first(self, images_BHWC: torch.Tensor) -> None:
        """Hold what was folded against the model, on the first real pictures."""
        with self._checking:
            if self._real_BHWC is not None:
                return
            real_BHWC = images_BHWC[:NUM_CHECKED].clone()
            if self._unchecked is not None:
                expected, found = (module(real_BHWC.to(self.device)) for module in (self._unchecked, self._module))
                if difference := self._difference(found, expected):
                    logger.warning("folding BatchNorm changes %s by more than rounding; the model runs as it is", difference)
                    self._module, self.program = self._unchecked, EAGER
                    self._buffers_digest = self._digest_buffers()
                self._unchecked = None
            self._real_BHWC = real_BHWC
            self.has_pictures.set()

    def _difference(self, found: Embeddings, expected: Embeddings) -> str:
        """The first column that differs by more than the tolerance; empty where all agree.

        Values that are not finite in both cannot be compared: such rows end in quarantine.
        """
        for column, expected_BD in expected.items():
            finite_BD = expected_BD.isfinite()
            if not torch.equal(found[column].isfinite(), finite_BD):
                return column
            if not _equal(found[column][finite_BD], expected_BD[finite_BD], TOLERANCE[self.spec.precision]):
                return column
        return ""

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
            if not _equal(embeddings_BD[0], alone[column][0], TOLERANCE[self.spec.precision]):
                raise GuardError(
                    f"backbone.nodes.{column}: an image's embedding changes with its neighbours in the batch; "
                    "does the model use batch statistics (BatchNorm with track_running_stats=False)?"
                )
        self.check_frozen()
        return {column: embeddings_BD.shape[1] for column, embeddings_BD in among_others.items()}


class Program(nn.Module):
    """Pictures to embeddings in one piece, so that a compiler sees all of it: normalise, forward, pool, normalise, round."""

    scale_L: torch.Tensor
    offset_L: torch.Tensor

    def __init__(self, module: nn.Module, nodes: Mapping[str, config.Node], preprocess: Preprocess, precision: str) -> None:
        super().__init__()
        self.module, self.nodes, self.precision = module, dict(nodes), precision
        mean_C, std_C = torch.tensor(preprocess.mean) * 255, torch.tensor(preprocess.std) * 255
        # Per value of a line of pixels (RGBRGB…), not per channel: a broadcast over a dimension of three is six times slower.
        self.register_buffer("scale_L", (1 / std_C).repeat(preprocess.crop), persistent=False)
        self.register_buffer("offset_L", (-mean_C / std_C).repeat(preprocess.crop), persistent=False)

    def forward(self, images_BHWC: torch.Tensor) -> Embeddings:
        """(B, crop, crop, 3) uint8 to column and (B, D) float32."""
        lines_BHL = images_BHWC.flatten(2).float()
        inputs_BHWC = torch.addcmul(self.offset_L, lines_BHL, self.scale_L).view(images_BHWC.shape)
        # Strided memory that already is channels-last.
        inputs_BCHW = inputs_BHWC.permute(0, 3, 1, 2)
        dtype = _AUTOCAST.get(self.precision)
        with torch.autocast(images_BHWC.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = self.module(inputs_BCHW)
        return {column: self._finish(outputs[column], node) for column, node in self.nodes.items()}

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


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode in every submodule, no parameter with a gradient. Changes and returns `model`."""
    return model.eval().requires_grad_(False)


def fold(model: nn.Module) -> nn.Module | None:
    """The model with BatchNorm folded into the convolutions before it; None where that cannot be done.

    A frozen BatchNorm is a scale and a shift, which the convolution's weights can take: a pass over memory less.
    """
    if not isinstance(model, Cut) or not isinstance(model.extractor, GraphModule):
        return None
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return None
    from torch.fx.experimental.optimization import fuse

    try:
        # A shell of its own around the same layers: the layers that are folded are replaced in it, not changed.
        shell = GraphModule(model.extractor, model.extractor.graph)
        return Cut(fuse(shell, inplace=True, no_trace=True), model.outputs)
    except Exception as error:  # an experimental part of PyTorch: whatever it stumbles over, eager works
        logger.warning("BatchNorm could not be folded, the model runs as it is: %s: %s", type(error).__name__, error)
        return None


def _equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether embeddings differ by at most `tolerance` of the largest value."""
    if expected.numel() == 0:
        return True
    limit = tolerance * max(expected.abs().max().item(), 1e-12)
    return (found - expected).abs().max().item() <= limit
