"""Measurements that need a process of their own: a job is sent there, and measures once whenever it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from pipeline import config
from pipeline.errors import PipelineError, RunError, UserError
from pipeline.extract.backbone import Spec
from pipeline.extract.child import environment
from pipeline.extract.decode import Decoder


class Job(Protocol):
    """What is sent: has to be picklable."""

    def results(self) -> Iterator[dict[str, Any]]:
        """A measurement each time, of plain values."""


class Child:
    """A process with one job. Use as a context manager: the process ends with it."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, "-m", __name__]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment()
        )
        self._to_send = pickle.dumps(job)  # more than a pipe holds: sent at the first question, while others start as well

    def ask(self) -> dict[str, Any]:
        """One measurement.

        Raises:
            PipelineError: it failed, or the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading its answer says why
            self._process.stdin.write(self._to_send + b"again\n")
            self._process.stdin.flush()
        self._to_send = b""
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RunError(f"a measurement died: {lines[-1][:300] if lines else f'exit code {self._process.returncode}'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (UserError if answer["exit_code"] == UserError.exit_code else RunError)(answer["error"])
        return answer

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def answer(job: Job) -> None:
    """Measure once for each line on stdin; the answer is a line of JSON, and nothing else gets into it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a model of one's own may print
    results = job.results()
    for _ in sys.stdin.buffer:
        try:
            answer = next(results)
        except PipelineError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        print(json.dumps(answer), file=answers, flush=True)


# What jobs and limits share


def pictures(pixels: bytes, preprocess: config.Preprocess) -> torch.Tensor:
    """(B, crop, crop, 3) uint8."""
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, preprocess.crop, preprocess.crop, 3)


def spec(settings: config.Config, fold: bool = True) -> Spec:
    """The model of a config."""
    return Spec(backbone=settings.backbone, decode=settings.decode, precision=settings.run.precision, fold=fold)


def decoder_of(settings: config.Config, preprocess: config.Preprocess, decode: str) -> Decoder:
    """A decoder as a config wants it."""
    return Decoder(preprocess, fast=decode == "fast", max_pixels=settings.source.max_pixels)


if __name__ == "__main__":
    # The functions are not this script's, but those of the module that the job knows.
    from pipeline.bench import jobs

    jobs.answer(pickle.load(sys.stdin.buffer))
