"""The YAML file as pydantic models, and its JSON schema.

A file has the sections `source`, `backbone`, `decode`, `output`, `run` and `probe`. Unknown keys are refused. A wrong value
raises `ConfigError` with one line a field: the field, the value, what is allowed. Nothing here touches storage or a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline import plugins
from pipeline.errors import ConfigError, nearby, nearest

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Normalize = Literal["none", "l2"]
Standardize = Literal["none", "l2", "zscore"]
Pool = Literal["none", "mean", "cls"]
FORMATS, PROVIDERS = ("webdataset", "parquet", "files"), ("torchvision", "timm", "python")
"""Our own; other packages may add more, see `plugins.py`."""
ColumnType = Literal["string", "int64", "float64", "bool"]

RESERVED_COLUMNS = frozenset({"key", "label", "shard", "index", "url", "offset", "nbytes", "content_hash", "width", "height"})
"""Column names of every dataset, not free for nodes and carried columns."""
ALL_NODES = "all"
"""In place of the names of nodes."""

MAX_PIXELS = 2**31 - 1
"""Of one image, at most."""

_COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_CREDENTIALS = re.compile(r"://[^/@\s\[]*:(?!\d+(?:/|$))[^@\s]*@|(?<=http)://[^/@\s]*@|(?<=https)://[^/@\s]*@")
"""`user:password@`, where a password may hold a slash as AWS's do, or a token in front of a web host; a port is none."""


def _no_truth_value(value: Any) -> Any:
    """YAML's `yes` and `on` are no numbers, although Python could count with them."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "not a number")
    return value


_NUMBER = BeforeValidator(_no_truth_value)
_Channel = Annotated[float, _NUMBER]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, values immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Storage(Section):
    """How to reach an object store. Credentials come from the environment, a profile or the instance; what is given in
    `options` goes to the fsspec filesystem and is never saved or logged."""

    endpoint_url: str | None = None
    """Endpoint of an S3-compatible store; the environment's or AWS's own when left out."""
    profile: str | None = None
    """Profile of the shared AWS credentials file."""
    anonymous: bool = False
    """Read a public bucket without credentials."""
    options: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Keyword arguments of the fsspec filesystem."""

    @field_validator("endpoint_url")
    @classmethod
    def _plain(cls, endpoint_url: str | None) -> str | None:
        _refuse_credentials(endpoint_url or "")
        return endpoint_url


class Source(Section):
    """Where the images come from."""

    url: str | list[str]
    """A file, folder or glob at any fsspec URL, or a list of them."""
    format: Annotated[str, WithJsonSchema({"anyOf": [{"enum": ["auto", *FORMATS]}, {"type": "string"}]})] = "auto"
    """Guessed from the URLs' endings when `auto`: .tar is webdataset, .parquet is parquet, anything else files. An installed
    package may add others."""
    label: str | None = None
    """A tar sibling's extension (`cls`, `json.category`), a Parquet column, or `folder`. No label when left out."""
    label_type: ColumnType | None = None
    """Type of the label column; default int64 for the sibling `cls`, a Parquet column's own type, otherwise string."""
    columns: list[str] | None = None
    """What to carry along: tar siblings (`txt`, `json`, `json.author`) or Parquet columns. Default: `txt` and `json` of a
    tar, nothing otherwise."""
    image: str | None = None
    """Extension of the image in a tar (default: any image extension) or name of the Parquet column (default: the only one
    that holds binary or `{bytes, path}`)."""
    key: str | None = None
    """Parquet column with the sample's key; the row number when left out."""
    group_size: Annotated[int, Field(ge=1, le=100_000), _NUMBER] = 1000
    """Loose files: mean number of files in a shard."""
    max_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS), _NUMBER] = 100_000_000
    """An image whose header claims more pixels is quarantined before anything is decoded."""
    storage: Storage = Storage()

    @property
    def urls(self) -> list[str]:
        """The URLs as a list."""
        return [self.url] if isinstance(self.url, str) else self.url

    @field_validator("url")
    @classmethod
    def _not_empty(cls, url: str | list[str]) -> str | list[str]:
        urls = [url] if isinstance(url, str) else url
        if not urls or not all(u.strip() for u in urls):
            raise ValueError("give a URL, a glob or a list of them")
        for u in urls:
            _refuse_credentials(u)
        return url

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        known = ("auto", *FORMATS)  # looking for what packages add takes the listing of them all
        if name not in known and name not in (added := plugins.names(plugins.SOURCES)):
            raise ValueError(f"allowed: {', '.join([*known, *added])}")
        return name

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: list[str] | None) -> list[str] | None:
        _check_columns([c.rpartition(".")[2] for c in columns or []])
        return columns


class Node(Section):
    """One named point of the backbone's graph, and the column that it fills."""

    node: str
    """Name in the graph, as `torchvision.models.feature_extraction.get_graph_node_names` lists them."""
    pool: Pool = "none"
    """`none` flattens; `mean` averages over space (B, C, H, W) or tokens (B, T, C); `cls` takes the first token."""
    normalize: Normalize = "none"
    """`l2` divides by the Euclidean norm: inner product becomes cosine similarity."""


class Preprocess(Section):
    """How a decoded image becomes the model's input. Given only where model and weights do not say it themselves."""

    resize: Annotated[int, Field(ge=1, le=4096), _NUMBER] = 256
    """Length in pixels that the shorter side is resized to."""
    crop: Annotated[int, Field(ge=1, le=4096), _NUMBER] = 224
    """Side in pixels of the square taken from the centre."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How new pixels are made from old ones; always with antialiasing."""
    mean: tuple[_Channel, _Channel, _Channel] = (0.485, 0.456, 0.406)
    """Subtracted per channel from values in [0, 1]."""
    std: tuple[_Channel, _Channel, _Channel] = (0.229, 0.224, 0.225)
    """Divided by per channel after the mean was subtracted."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocess:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        return self

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("allowed: numbers above 0")
        return std


class Backbone(Section):
    """The frozen model."""

    model: str
    """`torchvision/NAME`, `timm/NAME` or `python/module:function` (which runs that function: only your own code); or
    `PROVIDER/NAME` of a provider that an installed package adds."""
    weights: str
    """A member of the model's torchvision weights enum, the URL of a .safetensors or .pth file, `package:MODULE/FILE` for
    a file inside an installed package, `pretrained` for timm's own, `builtin` for what the function returns, or `seed:N`
    for random ones."""
    nodes: dict[str, Node]
    """Column name to node."""
    preprocess: Preprocess | None = None
    """Overrides what the weights or the model say; needed by none of torchvision's and timm's pretrained models."""
    version: str = ""
    """Part of the recipe. Change it when your own model's code changes what it computes under the same weights."""

    @field_validator("model")
    @classmethod
    def _provider(cls, model: str) -> str:
        provider, _, name = model.partition("/")
        added = plugins.names(plugins.BACKBONES) if provider not in PROVIDERS or not name else []
        if provider not in {*PROVIDERS, *added} or not name:
            more = "".join(f", {each}/NAME" for each in added)
            raise ValueError(f"allowed are torchvision/NAME, timm/NAME, python/module:function{more}")
        if provider == "python" and not re.fullmatch(r"[\w.]+:\w+", name):
            raise ValueError("python models are given as python/module:function")
        return model

    @field_validator("weights")
    @classmethod
    def _weights(cls, weights: str) -> str:
        if weights.startswith("seed:") and not re.fullmatch(r"seed:\d{1,9}", weights):
            raise ValueError("a seed is given as seed:N with N from 0 to 999999999")
        if weights in {"", "DEFAULT"}:
            raise ValueError("name the weights themselves, for example IMAGENET1K_V2: DEFAULT changes with the library")
        _refuse_credentials(weights)
        return weights

    @field_validator("nodes")
    @classmethod
    def _columns(cls, nodes: dict[str, Node]) -> dict[str, Node]:
        if not nodes:
            raise ValueError("name at least one node, for example embedding: {node: flatten}")
        _check_columns(list(nodes))
        return nodes


class Output(Section):
    """Where the dataset lies."""

    url: str
    """A folder at any fsspec URL; it is made when it does not exist."""
    storage: Storage = Storage()

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        if not url.strip():
            raise ValueError("give the folder of the dataset")
        _refuse_credentials(url)
        return url


class Run(Section):
    """How the work is done. Nothing but `precision` changes an embedding."""

    workers: Annotated[int, Field(ge=1), _NUMBER] | Literal["auto"] = "auto"
    """Actors: one per GPU of the cluster, else one per CPU node. For those of a number that do not fit yet the cluster's
    autoscaler is asked."""
    precision: Precision = "float32"
    """Arithmetic of the forward pass, part of the recipe. Half precisions are stored rounded to float16 values."""
    optimize: Literal["auto", "none", "fold", "compile"] = "auto"
    """Faster equivalents of the model that may run in its place, each checked against it. `fold`: BatchNorm goes into the
    convolutions. `compile`: the whole is also compiled, whatever that takes. `auto`: it is compiled where the run is long
    enough to get the time back, or an earlier run has done it."""
    batch_size: Annotated[int, Field(ge=1, le=65_536), _NUMBER] | Literal["auto"] = "auto"
    """Images in one forward pass; smaller ones are padded. `auto`: measured on the first batches."""
    threads: Annotated[int, Field(ge=1, le=1024), _NUMBER] | Literal["auto"] = "auto"
    """Worker threads of one actor: its share of the node's cores."""
    num_gpus: Annotated[float, Field(gt=0, le=1), _NUMBER] | Literal["auto"] = "auto"
    """Share of a GPU that one actor takes. `auto`: a whole one where the cluster has GPUs now, else the actors run on CPUs.
    With a number they run on GPUs only, and the cluster's autoscaler is asked for as many as there are shards to extract."""
    start_timeout_s: Annotated[float, Field(ge=1), _NUMBER] = 1800.0
    """The run fails when for so long no actor could be started: nodes and images may take their time."""
    max_failed: Annotated[float, Field(ge=0, le=1), _NUMBER] = 0.01
    """Share of the samples read in this run that may be quarantined; ten always may."""
    max_failed_samples: Annotated[int, Field(ge=0), _NUMBER] | None = None
    """However many were read, no more than so many may be quarantined."""
    max_removed: Annotated[float, Field(ge=0, le=1), _NUMBER] = 0.2
    """Share of the dataset's rows that may vanish in one run without --allow-removals."""
    max_attempts: Annotated[int, Field(ge=1, le=100), _NUMBER] = 3
    """How often a shard is tried before it counts as failed: passing faults of the store, and actors that died with nothing
    else in hand."""
    decode_timeout_s: Annotated[float, Field(ge=1), _NUMBER] = 60.0
    """A picture that takes longer to decode is given up, and with it the actor that is stuck on it."""
    report: bool = True
    """Make the page of the run, `_runs/<run id>/report.html`."""


class Probe(Section):
    """A linear classifier on the frozen embeddings."""

    label: str = "label"
    """Column with the class: of the dataset, or of `labels`."""
    labels: str | None = None
    """URL of a .csv or .parquet file that has the label for each key; reached as the output is. It may hold the columns of
    `group` and `split` too."""
    labels_key: str = "key"
    """Column of `labels` with the key of the sample."""
    node: str | list[str] | None = None
    """Embedding column; or several, or `all`, of which the best on validation is taken. The first one when left out."""
    normalize: Standardize | list[Standardize] = ["none", "l2", "zscore"]
    """What is done to the features, the best on validation where it is a list: `l2` divides each row by its norm, `zscore`
    subtracts the train mean and divides by the train deviation of each feature."""
    group: str | None = None
    """Column whose equal values stay on one side of the split: a patient, a camera, a photograph."""
    split: str | None = None
    """Column with `train`, `validation` (or `val`, `valid`, `dev`) and `test`; drawn by content hash when left out. Where it
    has no validation part, that is drawn from train."""
    validation: Annotated[float, Field(gt=0, lt=0.5), _NUMBER] = 0.15
    """Share of the pictures that C, `normalize` and `node` are chosen on."""
    test: Annotated[float, Field(gt=0, lt=0.5), _NUMBER] = 0.15
    """Share of the pictures that the final model is scored on, once."""
    seed: Annotated[int, Field(ge=0), _NUMBER] = 0
    """Changes the split."""

    @property
    def normalizations(self) -> list[Standardize]:
        """`normalize` as a list."""
        return [self.normalize] if isinstance(self.normalize, str) else self.normalize

    @field_validator("node", "normalize")
    @classmethod
    def _some_and_different(cls, names: str | list[str] | None) -> str | list[str] | None:
        if isinstance(names, list) and (not names or len(set(names)) < len(names)):
            raise ValueError("name at least one, and none twice")
        return names

    @field_validator("labels")
    @classmethod
    def _plain(cls, labels: str | None) -> str | None:
        _refuse_credentials(labels or "")
        if labels is not None and not labels.lower().endswith((".csv", ".parquet")):
            raise ValueError("give the URL of a .csv or .parquet file")
        return labels


class Config(Section):
    """A whole config file."""

    source: Source
    backbone: Backbone
    decode: Literal["exact", "fast"] = "exact"
    """`exact`: the picture that the weights' own preset gives. `fast`: large JPEGs are decoded at a reduced scale that
    keeps at least twice the target."""
    output: Output
    run: Run = Run()
    probe: Probe | None = None

    @model_validator(mode="after")
    def _columns_are_unique(self) -> Config:
        selectors = ["txt", "json"] if self.source.columns is None else self.source.columns
        carried = {selector.rpartition(".")[2].lower() for selector in selectors}
        for column in self.backbone.nodes:
            if column.lower() in carried:
                raise ValueError(f"backbone.nodes.{column}: source.columns carries a column of that name; rename the node's")
        wanted = (self.probe and self.probe.node) or []
        for node in [wanted] if isinstance(wanted, str) else wanted:
            if node not in self.backbone.nodes and wanted != ALL_NODES:
                raise ValueError(f"probe.node: {node!r} is none of backbone.nodes; allowed are {_list(self.backbone.nodes)}")
        if self.probe and not self.probe.labels and self.probe.label == "label" and self.source.label is None:
            raise ValueError("probe.label: the dataset has no label; set source.label, or leave the probe section out")
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `a.b=c` overrides.

    Relative local paths in the file are relative to the working directory, as on a command line.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key or wrong value; one line a mistake.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "is not UTF-8 text"
        if isinstance(error, FileNotFoundError):
            reason += f"; {nearby(str(path))}"
        elif isinstance(error, IsADirectoryError):
            reason += "; give the YAML file"
        raise ConfigError(f"{path}: the config cannot be read: {reason}") from None
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 31st of February
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{path}{where}: not valid YAML: {reason}") from None
    if isinstance(raw, dict):
        for override in overrides:
            _override(raw, override)
    return parse(raw, str(path))


def parse(raw: dict[str, Any], name: str = "config") -> Config:
    """Validate a mapping; `name` leads each line of the error.

    Raises:
        ConfigError: one line a mistake: field, value, what is allowed.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{name}: a config is a mapping with the sections {_list(Config.model_fields)}")
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(name, error.errors())) from None


def parse_probe(raw: dict[str, Any], name: str = "config") -> Probe:
    """Validate the values of a `probe` section alone.

    Raises:
        ConfigError: as from `parse`.
    """
    try:
        return Probe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(name, [{**each, "loc": ("probe", *each["loc"])} for each in error.errors()])) from None


def dump(config: Config) -> str:
    """The resolved config as YAML, without the values of `storage.options`: those may be secrets."""
    raw = config.model_dump(mode="json")
    for section in ("source", "output"):
        options = raw[section]["storage"]["options"]
        raw[section]["storage"]["options"] = dict.fromkeys(options, "(not saved)")
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not last or not all(parents):
        raise ConfigError(f"--set {path}: write --set section.key=value")
    place = raw
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(f"--set {path}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {path}: the value is not valid YAML") from None


def _refuse_credentials(url: str) -> None:
    if _CREDENTIALS.search(url):
        raise ValueError("credentials do not belong into a URL; use the environment, a profile or storage.options")


def _check_columns(names: list[str]) -> None:
    # Delta and most readers see no difference between upper and lower case.
    lower = [name.lower() for name in names]
    for name in names:
        if not _COLUMN_NAME.fullmatch(name) or name.lower() in RESERVED_COLUMNS:
            raise ValueError(f"{name!r} cannot name a column; letters, digits and _, and not {_list(RESERVED_COLUMNS)}")
        if lower.count(name.lower()) > 1:
            raise ValueError(f"{name!r} appears twice")


def _list(names: object) -> str:
    return ", ".join(sorted(str(n) for n in names))  # type: ignore[attr-defined]


def _explain(name: str, errors: Sequence[Any]) -> str:
    """One line a mistake. pydantic reports every branch of a union: of a field's errors the deepest know best."""
    fields = [_field(error["loc"]) for error in errors]
    depth: dict[tuple[str, ...], int] = {}
    for field, error in zip(fields, errors, strict=True):
        depth[field] = max(depth.get(field, 0), len(error["loc"]))
    found = zip(fields, errors, strict=True)
    return "\n".join(dict.fromkeys(_line(name, field, error) for field, error in found if len(error["loc"]) == depth[field]))


def _field(loc: Sequence[str | int]) -> tuple[str, ...]:
    """The key of the file that an error is about."""
    field = [str(part) for part in loc]
    if field[-1:] == ["[key]"]:
        del field[-2:]
    # pydantic appends the union's branch ("int", "literal['auto']", "str") and the position in a list.
    while field and not _is_key(field):
        field.pop()
    return tuple(field)


def _line(name: str, location: Sequence[str], error: Any) -> str:
    """What is wrong with one field."""
    field = ".".join(location)
    value = error["input"]
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in {"extra_forbidden", "invalid_key"}:
        siblings = _siblings(location)
        hint = nearest(location[-1], siblings) or f"allowed are {_list(siblings)}"
        return f"{name}: {field}: unknown key; {hint}"
    if kind == "missing" and isinstance(error["loc"][-1], str):
        return f"{name}: {field}: missing; it is required"
    if kind == "value_error":
        shown = f"{_short(value)}: " if field and not isinstance(value, dict) else ""
        return f"{name}: {field + ': ' if field else ''}{shown}{ctx.get('error', error['msg'])}"
    # What was meant as an option of a store may be a secret.
    shown = "the value" if "storage" in location[-2:] and location[-1] in {"storage", "options"} else _short(value)
    return f"{name}: {field}: {shown} is wrong; {allowed(location)}"


def _short(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = re.sub(r"://[^/@\s]*@", "://***@", _CREDENTIALS.sub("://***@", repr(value)))
    return text if len(text) <= 60 else text[:57] + "..."


def _model_at(location: Sequence[str]) -> type[Section] | None:
    """The section that the path leads to, None where it leads to a value."""
    models: dict[str, type[Section]] = {
        "source": Source, "source.storage": Storage, "output": Output, "output.storage": Storage, "run": Run, "probe": Probe,
        "backbone": Backbone, "backbone.preprocess": Preprocess, "": Config,
    }  # fmt: skip
    if len(location) == 3 and tuple(location[:2]) == ("backbone", "nodes"):
        return Node
    return models.get(".".join(location))


def _siblings(location: Sequence[str]) -> list[str]:
    parent = _model_at(location[:-1])
    return list(parent.model_fields) if parent else []


def _is_key(location: Sequence[str]) -> bool:
    """Whether the last part of a pydantic location is a key of the file, not a branch of a union."""
    parent = _model_at(location[:-1])
    if parent is not None:
        return True
    return tuple(location[:2]) == ("backbone", "nodes") and len(location) == 3


def allowed(location: Sequence[str]) -> str:
    """What a field accepts, from its JSON schema: `allowed: auto, or a whole number from 1`."""
    if tuple(location[:2]) == ("backbone", "nodes") and len(location) < 4:
        return "allowed: column names, each with a section such as {node: flatten}"
    parent = _model_at(location[:-1])
    assert parent is not None, "only keys of sections are looked up"
    schema = parent.model_json_schema()["properties"][location[-1]]
    return "allowed: " + ", or ".join(_describe(way) for way in schema.get("anyOf", [schema]))


def _describe(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(str(v) for v in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema or schema.get("type") == "object":
        return "a section with keys of its own"
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} finite numbers"
    if "enum" in schema.get("items", {}):
        return "a list of them"
    word = {
        "integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
        "array": "a list of text", "null": "nothing",
    }[schema["type"]]  # fmt: skip
    bounds = []
    if "minimum" in schema:
        bounds.append(f"from {schema['minimum']}")
    if "exclusiveMinimum" in schema:
        bounds.append(f"above {schema['exclusiveMinimum']}")
    if "maximum" in schema:
        bounds.append(f"{'to' if 'minimum' in schema else 'and up to'} {schema['maximum']}")
    if "exclusiveMaximum" in schema:
        bounds.append(f"and below {schema['exclusiveMaximum']}")
    return " ".join([word, *bounds])
