"""The frozen model: what it accepts, what it refuses, and that its guard can be seen to work."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.fx.experimental.optimization
from models import Restless
from torch import nn

from pipeline import config
from pipeline.errors import BackboneError, GuardError
from pipeline.extract import aot
from pipeline.extract import backbone as module
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.model import state_digest


def make(model: str = "torchvision/resnet18", weights: str = "seed:0", node: str = "flatten", **more: object) -> Backbone:
    nodes = {"embedding": config.Node(node=node)}
    settings = config.Backbone.model_validate({"model": model, "weights": weights, "nodes": nodes, **more})
    return Backbone(Spec(backbone=settings, decode="exact", precision="float32"))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 224, 224, 3), dtype=torch.uint8, generator=generator)


def test_a_model_in_train_mode_comes_out_frozen() -> None:
    frozen = make("python/models:restless")
    before = {name: buffer.clone() for name, buffer in frozen._module.named_buffers()}
    first = frozen.embed(pictures(4))["embedding"]
    frozen.embed(pictures(32, seed=1))
    assert torch.equal(frozen.embed(pictures(4))["embedding"], first)
    assert not first.requires_grad
    assert first.is_inference()
    frozen.check_frozen()
    for name, buffer in frozen._module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_without_freezing_the_guard_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "freeze", lambda model: model)
    with pytest.raises(GuardError):
        make("python/models:restless")


@pytest.mark.parametrize("harm", ["train", "grad", "buffer"])
def test_the_guard_sees_what_happens_later(harm: str) -> None:
    frozen = make("python/models:restless")
    norm = next(each for each in frozen._module.modules() if isinstance(each, nn.BatchNorm2d))
    if harm == "train":
        norm.train()
    elif harm == "grad":
        norm.weight.requires_grad_(True)
    else:
        norm.running_mean.add_(1e-6)  # type: ignore[union-attr]
    with pytest.raises(GuardError, match={"train": "train mode", "grad": "gradient", "buffer": "buffer changed"}[harm]):
        frozen.check_frozen()


def test_weights_from_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = Restless().state_dict()
    torch.save(state, tmp_path / "w.pth")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    recipes = [
        make("python/models:restless", str(tmp_path / name)).recipe for name in ("w.pth", "wrapped.pth", "w.safetensors")
    ]
    assert {recipe.fields["weights_digest"] for recipe in recipes} == {state_digest(state)}


def spec(model: str = "torchvision/resnet18", *, fold: bool = True) -> Spec:
    settings = config.Backbone(model=model, weights="seed:0", nodes={"embedding": config.Node(node="flatten")})
    return Spec(backbone=settings, decode="exact", precision="float32", fold=fold)


def test_folded_batchnorm_is_the_same_function() -> None:
    made = [Backbone(spec(fold=each)) for each in (True, False)]
    assert [each.program for each in made] == ["batchnorm folded", "eager"]
    assert made[0].recipe == made[1].recipe
    folded, eager = (each.embed(pictures(8))["embedding"] for each in made)
    assert (folded - eager).abs().max() <= 1e-4 * eager.abs().max()
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in each._module.modules()) for each in made]
    assert norms == [0, 20]


def test_a_fold_that_changes_the_function_makes_no_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(extractor: nn.Module, **_: object) -> nn.Module:
        changed = copy.deepcopy(extractor)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.01)
        return changed

    monkeypatch.setattr(torch.fx.experimental.optimization, "fuse", wrong)
    built = make()
    rows = built.launch(pictures(16)).wait()["embedding"]
    assert built.program == "eager"
    assert "changes embedding by more than rounding" in caplog.text
    eager = Backbone(spec(fold=False)).embed(pictures(16))["embedding"]
    assert abs(rows - eager.numpy()).max() <= 1e-4 * abs(rows).max()
    built.check_frozen()


def test_a_compiled_program_runs_only_if_it_agrees(caplog: pytest.LogCaptureFixture) -> None:
    built = make()
    expected = built.launch(pictures(16)).wait()["embedding"]
    assert not built.adopt(16, lambda images_BHWC: {"embedding": built.embed(images_BHWC)["embedding"] * 1.01})
    assert "compiling changes embedding" in caplog.text
    assert built.adopt(16, lambda images_BHWC: {"embedding": built.embed(images_BHWC)["embedding"] * 1.00001})
    compiled = built.launch(pictures(16), "compiled").wait()["embedding"]
    assert compiled[0, 0] != expected[0, 0]
    assert abs(compiled - expected).max() <= 1e-4 * abs(expected).max()


def test_compiling_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = make("python/models:tiny")
    expected = built.launch(pictures(8)).wait()["embedding"]
    order = aot.Order(spec=built.spec, recipe_id=built.recipe.recipe_id, device="cpu", batch_size=8)
    path = aot.compiled(order)
    assert path is not None and path.is_relative_to(tmp_path)
    assert built.adopt(8, aot.load(path, ["embedding"], 2))
    assert abs(built.launch(pictures(8), "compiled").wait()["embedding"] - expected).max() <= 1e-4 * abs(expected).max()
    written = path.stat().st_mtime_ns
    assert aot.compiled(order) == path and path.stat().st_mtime_ns == written
    others = [
        dataclasses.replace(order, batch_size=4),
        dataclasses.replace(order, recipe_id="other"),
        dataclasses.replace(order, spec=dataclasses.replace(built.spec, fold=False)),
    ]
    assert len({each.path for each in [order, *others]}) == 4


def test_what_cannot_be_compiled_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = make("python/models:untraceable", node="conv")
    order = aot.Order(spec=built.spec, recipe_id=built.recipe.recipe_id, device="cpu", batch_size=4)
    assert aot.compiled(order) is None
    assert "could not be compiled and runs as it is" in caplog.text


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this ran",))


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BackboneError, match=r"backbone\.weights.*not a plain file of weights"):
        make("python/models:restless", str(tmp_path / "evil.pth"))
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "torchvision/resnet17"}, r"backbone\.model.*resnet17.*did you mean.*resnet18"),
        ({"node": "layer5"}, r"backbone\.nodes\.embedding\.node.*layer5.*did you mean layer4"),
        ({"weights": "IMAGENET1K_V9"}, r"backbone\.weights.*IMAGENET1K_V9.*allowed are IMAGENET1K_V1"),
        ({"weights": "/nowhere/w.safetensors"}, r"backbone\.weights.*no such file"),
        ({"weights": "package:no_such_package/w.pth"}, r"backbone\.weights.*no_such_package.*not installed"),
        ({"model": "timm/no_such_model"}, r"backbone\.model.*timm has no model"),
        ({"model": "python/no_such_module:f"}, r"backbone\.model.*cannot be imported"),
        ({"model": "python/models:no_such"}, r"backbone\.model.*cannot be imported"),
        ({"model": "python/pathlib:Path"}, r"backbone\.model.*not a torch\.nn\.Module"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        make(**arguments)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    safetensors.torch.save_file({"other": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match="does not fit the model"):
        make("python/models:restless", str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "node", "width"), [("vit_tiny_patch16_224", "norm", 192), ("tf_efficientnet_lite0", "global_pool", 1280)]
)
def test_timm_models(name: str, node: str, width: int) -> None:
    nodes = {"embedding": {"node": node, "pool": "cls" if name.startswith("vit") else "none"}}
    built = make(f"timm/{name}", nodes=nodes)
    assert built.recipe.widths == {"embedding": width}
    assert built.preprocess.mean == (0.5, 0.5, 0.5)
    assert built.preprocess.interpolation == "bicubic"


def test_pooling_of_tokens() -> None:
    nodes = {name: {"node": "encoder.ln", "pool": name} for name in ("cls", "mean")} | {"none": {"node": "encoder.ln"}}
    built = make("torchvision/vit_b_16", nodes=nodes)
    assert built.recipe.widths == {"cls": 768, "mean": 768, "none": 197 * 768}
    outputs = built.embed(pictures(2))
    tokens_BTC = outputs["none"].reshape(2, 197, 768)
    assert torch.allclose(outputs["cls"], tokens_BTC[:, 0])
    assert torch.allclose(outputs["mean"], tokens_BTC.mean(1), atol=1e-5)


def test_the_recipe_changes_with_what_determines_an_embedding() -> None:
    base = make().recipe.recipe_id
    assert make().recipe.recipe_id == base
    others = [
        make(weights="seed:1"), make(node="avgpool"), make(version="2"), make(preprocess={"resize": 224}),
        make(nodes={"embedding": {"node": "flatten", "normalize": "l2"}}), make(nodes={"other": {"node": "flatten"}}),
    ]  # fmt: skip
    assert len({base, *(other.recipe.recipe_id for other in others)}) == 7
