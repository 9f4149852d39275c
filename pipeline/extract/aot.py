"""Programs compiled ahead of time: files for one model, batch size and kind of processor, kept in the user's cache folder.

A program is made by a process of its own, so that the loop goes on meanwhile, and found there by the next run. It is not
trusted: `Backbone.adopt` holds it against the model before it makes a row, and the loop measures whether it is faster.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.extract import child
from pipeline.extract.backbone import Backbone, Spec
from pipeline.recipe import digest

logger = logging.getLogger(__name__)

COMPILE_S = 40.0
"""What compiling takes of two cores: 13 to 46 s for the models tried (notably more for deep ones)."""
EXPECTED_GAIN = 0.3
"""Share of the forward passes' time that compiling can be hoped to save; 0 to 0.6 in the models tried."""
COMPILE_TIMEOUT_S = 1800.0
CPU_SUFFIX = ".so"


def is_worth_compiling(forward_s: float) -> bool:
    """Whether a run with so many seconds of forward passes ahead of it gets back what compiling costs."""
    return forward_s * EXPECTED_GAIN > COMPILE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to be compiled."""

    spec: Spec
    recipe_id: str
    device: str
    batch_size: int

    @classmethod
    def of(cls, backbone: Backbone, batch_size: int) -> Order:
        """What a backbone runs, for batches of one size."""
        recipe_id, device = backbone.recipe.recipe_id, backbone.device.type
        return cls(spec=backbone.spec, recipe_id=recipe_id, device=device, batch_size=batch_size)

    @property
    def path(self) -> Path:
        """Where the compiled program is kept: another model, version of torch or processor has another file."""
        if self.device == "cuda":
            hardware = f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()} {torch.version.cuda}"
        else:
            hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name = digest(self.recipe_id, str(self.spec.fold), str(self.batch_size), torch.__version__, sys.version, hardware)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        suffix = CPU_SUFFIX if self.device == "cpu" else ".pt2"
        return cache / "frozen-pipeline" / "compiled" / f"{name}{suffix}"


def compiled(order: Order) -> Path | None:
    """Make the file of a compiled program, or wait for whoever is making it on this machine; None where it cannot be made."""
    order.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # what lies there is run
    with _only_one(order.path.with_suffix(".lock")):
        if order.path.exists():
            return order.path
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pipeline.extract.aot"],
                input=pickle.dumps(order),
                capture_output=True,
                env=child.environment(),
                timeout=COMPILE_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("the model could not be compiled and runs as it is: %s", error)
            return None
        if done.returncode != 0 or not order.path.exists():
            reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
            logger.warning("the model could not be compiled and runs as it is: %s", reason[:300])
            return None
        logger.info("the model was compiled for batches of %d in %.0f s", order.batch_size, time.monotonic() - start)
        return order.path


def load(path: Path, columns: Sequence[str], num_lanes: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A compiled program; `num_lanes` threads can run it at once."""
    if path.suffix == CPU_SUFFIX:
        return _Library(path, columns, num_lanes)
    # What torch._inductor.package.load_package wraps, without the seconds that importing a compiler takes.
    program = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, num_lanes, -1)
    return lambda images_BHWC: dict(zip(columns, program.run([images_BHWC]), strict=True))


class _Library:
    """A program compiled for a CPU, called through the C interface that such libraries have.

    PyTorch's own binding holds the interpreter lock for the whole of a forward pass, and with it all other lanes. (On a GPU it
    only launches.) Functions and their order of arguments: torch/csrc/inductor/aoti_runtime/interface.h and
    torch/csrc/inductor/aoti_torch/c/shim.h, which PyTorch keeps stable.
    """

    def __init__(self, path: Path, columns: Sequence[str], num_lanes: int) -> None:
        self._columns = list(columns)
        self._library = ctypes.CDLL(str(path))
        self._torch = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        self._uint8, self._cpu = self._torch.aoti_torch_dtype_uint8(), self._torch.aoti_torch_device_type_cpu()
        self._container = ctypes.c_void_p()
        create = self._library.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        _check(create(ctypes.byref(self._container), num_lanes, b"cpu", None))
        self._run = self._library.AOTInductorModelContainerRun
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        self._wrap = self._torch.aoti_torch_create_tensor_from_blob_v2
        number, code = ctypes.c_int64, ctypes.c_int32
        self._wrap.argtypes = [pointer, number, pointer, pointer, number, code, code, code, pointer, code, pointer, number]

    def __call__(self, images_BHWC: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, crop, crop, 3) contiguous uint8 to column and (B, D) float32."""
        sizes, strides = ((ctypes.c_int64 * 4)(*each) for each in (images_BHWC.shape, images_BHWC.stride()))
        inputs, outputs = (ctypes.c_void_p * 1)(), (ctypes.c_void_p * len(self._columns))()
        strided = 0
        _check(self._wrap(images_BHWC.data_ptr(), 4, sizes, strides, 0, self._uint8, self._cpu, 0, inputs, strided, None, 0))
        # The lock is free while it runs. The handle of the input is taken over, those of the outputs are ours.
        _check(self._run(self._container, inputs, 1, outputs, len(self._columns), None, None))
        return {column: self._taken(output) for column, output in zip(self._columns, outputs, strict=True)}

    def _taken(self, handle: int) -> torch.Tensor:
        """A copy of an output (B, D) float32, whose own memory is given back."""
        tensor, data, sizes, strides = (ctypes.c_void_p(handle), *(ctypes.c_void_p() for _ in range(3)))
        try:
            _check(self._torch.aoti_torch_get_data_ptr(tensor, ctypes.byref(data)))
            _check(self._torch.aoti_torch_get_sizes(tensor, ctypes.byref(sizes)))
            _check(self._torch.aoti_torch_get_strides(tensor, ctypes.byref(strides)))
            assert data.value and sizes.value and strides.value, "a tensor has all of them"
            shape, steps = ((ctypes.c_int64 * 2).from_address(each) for each in (sizes.value, strides.value))
            num_rows, width = shape
            assert tuple(steps) == (width, 1) or num_rows == 1, "embeddings are contiguous"
            values = (ctypes.c_float * (num_rows * width)).from_address(data.value)
            return torch.frombuffer(values, dtype=torch.float32).reshape(num_rows, width).clone()
        finally:
            self._torch.aoti_torch_delete_tensor_object(tensor)


def _check(error: int) -> None:
    if error:
        raise RuntimeError("the compiled program failed; the reason is above, in the actor's log")


class _Flat(nn.Module):
    """Gives a program's columns in order, without their names."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, images_BHWC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.program(images_BHWC).values())


def _compile(order: Order) -> None:
    """Build the model again and compile it, in a process of its own."""
    os.nice(10)  # the loop goes first
    child.die_with_parent()  # and when it ends, nobody waits for this any more
    torch.set_num_threads(1)
    backbone = Backbone(order.spec, order.device)
    options: dict[str, Any] = {"freezing": True}
    if order.device == "cpu":
        options["cpp.threads"] = 1  # every core is a lane of its own
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        images_BHWC = backbone.new_batch(order.batch_size).to(order.device)
        exported = torch.export.export(_Flat(backbone.program_module), (images_BHWC,), strict=False)
        package = Path(folder) / "program.pt2"
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=options)
        if order.device == "cpu":  # all of it is one library, with the weights inside
            with zipfile.ZipFile(package) as archive:
                (library,) = (name for name in archive.namelist() if name.endswith(".so"))
                package.with_suffix(CPU_SUFFIX).write_bytes(archive.read(library))
            package = package.with_suffix(CPU_SUFFIX)
        temporary = order.path.with_name(f"{order.path.stem}.{os.getpid()}.tmp")
        shutil.copyfile(package, temporary)  # the temporary folder may lie on another file system
        temporary.replace(order.path)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    # The class is not this script's, but the one that was sent.
    from pipeline.extract import aot

    aot._compile(pickle.load(sys.stdin.buffer))
