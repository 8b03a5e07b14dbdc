"""A recipe: all that determines a training run, read from a YAML file and checked before anything is made."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from tokenizers import Tokenizer

from pyvlm.data.files import FilesConfig
from pyvlm.models.config import Config, MoEConfig, VLMConfig
from pyvlm.models.language_families import read_language
from pyvlm.models.parts import PARTS
from pyvlm.models.processor import Form, Processor, ProcessorConfig
from pyvlm.models.resolution import with_image_size
from pyvlm.models.tiling import TilingConfig
from pyvlm.models.tower_config import ImageConfig
from pyvlm.training.bundled import Bundled, words_of
from pyvlm.training.digits import DigitsConfig
from pyvlm.training.explain import TAGS, explain
from pyvlm.training.recipe_paths import with_checkpoint, with_paths, with_settings
from pyvlm.training.sources import Data

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Stage(Config):
    """One stage of training: which parts learn from which dialogues, and how.

    Attributes:
        steps: optimizer steps. Give these or `epochs`.
        epochs: passes over the data, for data that have an end; a fraction is possible.
        samples: of an epoch, for budgets of data that are not at hand.
        batch_size: dialogues a step, over all processes.
        accumulation: parts that a step's dialogues are computed in, to save memory.
        train: the parts that learn, as `VLM.parts` names them, the finer ones too; the others are frozen.
        lr: peak learning rate, one for all parts or one for each part that learns.
        warmup: steps over which the rate rises from 0, or below 1 their share of the stage.
        schedule: how the rate falls from there to `final_lr`: along a cosine, a line, or not at all.
        final_lr: what is left of the rate at the end, as a fraction of the peak.
        layer_decay: of a part that is a stack of layers, the factor from each layer's rate to that of the
            one below (Qwen-VL has 0.95 for vision): see `pyvlm.training.optimization.layer_scales`.
        weight_decay: AdamW's (arXiv 1711.05101), on matrices and embeddings only.
        eps: AdamW's, beside the square root of the second moment.
        clip_norm: bound on the gradients' norm.
        label_smoothing, z_loss: of the loss that is minimised, as in `pyvlm.ops.linear_cross_entropy`. The
            loss that is logged has them in it; the one on held-out data is plain cross-entropy.
        keep_optimizer: go on with the moments that AdamW had at the end of the stage before, for the parts
            that learned there, and not with none. A new mixture of dialogues is then less of a shock: on
            digits, what was 94 % right fell to 9 % with a fresh AdamW and to 65 % with the old moments.
        upcycle: before the stage, the MLPs of these layers become experts that are copies of them
            (MoE-LLaVA, arXiv 2401.15947).
        image_size: from this stage on, images are of so many pixels a side, and the towers' positions are
            interpolated: see `pyvlm.models.change_image_size`.
        form: whether samples are dialogues, or one image and its caption, without roles and instructions
            (LLaVA's first stage): see `pyvlm.models.turns.PlainCaption`.
        data: what the dialogues look like, or where they are.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    samples: Positive | None = None
    batch_size: Positive
    accumulation: Positive = 1
    train: list[str] = Field(default=list(PARTS), min_length=1)
    lr: Rate | dict[str, Rate]
    warmup: Natural | Annotated[float, Field(gt=0, lt=1)] = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default={})
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    z_loss: Rate = 0.0
    keep_optimizer: bool = False
    upcycle: MoEConfig | None = None
    image_size: Positive | None = None
    form: Form = "dialogue"
    data: Data = DigitsConfig()

    @property
    def finer(self) -> list[str]:
        """The pieces of parts that the stage names, as `VLM.parts` takes them."""
        return sorted({part for part in (*self.train, *self.layer_decay) if "." in part})

    def rate_of(self, part: str) -> float:
        """Peak learning rate of a part."""
        return self.lr[part] if isinstance(self.lr, dict) else self.lr

    def warmup_steps(self, steps: int) -> int:
        """The warm-up of a stage of so many steps."""
        return self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * steps)

    def count_steps(self, epoch_size: int | None = None) -> int:
        """Steps of the stage on data of so many samples; None: they have no end, or are not at hand.

        Raises:
            ValueError: the stage counts epochs, and its data have no end.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "checked when the stage was made"
        epoch_size = self.samples if epoch_size is None else epoch_size
        if epoch_size is None:
            raise ValueError(f"epochs {self.epochs:g}: these data have no end; give steps, or samples")
        return math.ceil(self.epochs * epoch_size / self.batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, got {self.steps} and {self.epochs}")
        if isinstance(self.lr, dict) and set(self.lr) != set(self.train):
            raise ValueError(
                f"lr names {sorted(self.lr)} and train {sorted(self.train)}: give a rate for each part that "
                "learns"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}"
            )
        if self.form == "plain":
            self._check_captions()
        return self

    def _check_captions(self) -> None:
        """Raises ValueError where the data are to be what captions are not."""
        if isinstance(self.data, FilesConfig):
            given = {"blend": self.data.blend, "image_words": self.data.image_words}
            if several := [name for name, value in given.items() if value is not None]:
                raise ValueError(f'form "plain" is one image and its caption: leave out data.{several[0]}')
            return
        for name, (_, most) in (("images", self.data.images), ("rounds", self.data.rounds)):
            if most > 1:
                raise ValueError(f'form "plain" is one image and its caption: give data.{name} [1, 1]')


class Evaluation(Config):
    """How held-out accuracy is measured, or the loss on data whose answers are free text.

    Attributes:
        dialogues: how many, in the final evaluation.
        every: steps between quick looks during training, at `quick_dialogues` first questions; 0: none. The
            model that did best in them is kept as `best/`, beside the final one.
        data: None: see `Recipe.held_out`.
    """

    dialogues: Positive = 400
    every: Natural = 0
    quick_dialogues: Positive = 128
    batch_size: Positive = 64
    data: Data | None = None


class Wording(Config):
    """How the language model's tokenizer writes a dialogue; see `Processor.from_transformers`.

    Attributes:
        chat_template: in place of its folder's: Jinja text, or the name of one that pyvlm ships.
        image_token, image_start, image_end: what stands for an image, and around it.
        image_words: ordinary words before each image, {n} its number: "Image {n}: ".
    """

    chat_template: str | None = None
    image_token: str = "<image>"
    image_start: str | None = None
    image_end: str | None = None
    image_words: str | None = None

    def processor(
        self, folder: str, image: ImageConfig, tokens_per_image: int, tiling: TilingConfig | None = None
    ) -> Processor:
        """The processor of a language model's folder."""
        return Processor.from_transformers(
            folder, image, tokens_per_image, tiling=tiling, **self.model_dump()
        )


class Recipe(Config):
    """A run. `stages` are trained in their order.

    `model.image_token_id` and `model.language.vocab_size` follow from the tokenizer and are filled in where
    the recipe leaves them out.

    Attributes:
        summary: what makes the system itself, in a line.
        tokenizer: "words" of the bundled dialogues, or that of the "language" model's folder.
        wording: of the language model's tokenizer.
        gradient_checkpointing: compute the layers' activations again in the backward pass, to save memory.
        checkpoint_every: steps between checkpoints; a stage's last step has one in any case.
        keep_stages: keep the model at the end of each stage, as `stages/NAME/`.
        log_every: steps between looks at the losses, each of which waits for the device.
        profile_every: steps between those whose time is split by part; 0: none.
        trackers: who is told of the figures, beside metrics.jsonl.
    """

    name: str
    summary: str = ""
    tokenizer: Literal["words", "language"] = "words"
    wording: Wording = Wording()
    seed: Natural = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    model: VLMConfig
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    gradient_checkpointing: bool = False
    checkpoint_every: Positive = 200
    keep_stages: bool = False
    log_every: Positive = 10
    profile_every: Natural = 100
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=["tensorboard"])

    @model_validator(mode="before")
    @classmethod
    def _fill_in_vocabulary(cls, given: Any) -> Any:
        model = given.get("model") if isinstance(given, Mapping) else None
        stages = given.get("stages") if isinstance(given, Mapping) else None
        if not isinstance(model, Mapping) or not isinstance(model.get("language"), Mapping):
            return given  # the checks that follow say what is missing
        language = model["language"]
        if given.get("tokenizer", "words") == "words" and isinstance(stages, Mapping):
            tokenizer = words_of(_source_of(stage) for stage in stages.values())
            language = _with_defaults(language, vocab_size=tokenizer.get_vocab_size())
            model = _with_defaults(model, image_token_id=tokenizer.token_to_id("<image>"))
        elif given.get("tokenizer") == "language" and language.get("pretrained") is not None:
            wording = Wording.model_validate(given.get("wording") or {})
            # The ids do not depend on the size of images.
            processor = wording.processor(language["pretrained"], ImageConfig(size=1), tokens_per_image=1)
            rows = max(processor.vocab_size, read_language(language["pretrained"]).vocab_size)
            language = {**language, "vocab_size": rows}
            model = {**model, "image_token_id": processor.image_token_id}
        return {**given, "model": {**model, "language": language}}

    @model_validator(mode="after")
    def _fits_the_data(self) -> "Recipe":
        reads_files = [name for name, stage in self.stages.items() if isinstance(stage.data, FilesConfig)]
        if self.tokenizer == "words" and reads_files:
            raise ValueError(
                f"stage {reads_files[0]!r} reads files, and the tokenizer knows the words of the bundled "
                "dialogues only: take that of the language model (tokenizer: language, --lm FOLDER)"
            )
        words = self._tokenizer().get_vocab_size() if self.tokenizer == "words" else None
        if words is not None and self.model.language.vocab_size != words:
            raise ValueError(
                f"model.language.vocab_size is {self.model.language.vocab_size}, and the dialogues have "
                f"{words} words: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _sizes_are_possible(self) -> "Recipe":
        self.model_in(list(self.stages)[-1])
        return self

    @property
    def total_steps(self) -> int:
        """Steps of all stages.

        Raises:
            ValueError: a stage counts epochs, and its steps depend on its data.
        """
        return sum(stage.count_steps() for stage in self.stages.values())

    def model_in(self, stage: str) -> VLMConfig:
        """The model with images of the size that they have in a stage; what else a stage changes is left out.

        Raises:
            ValueError: the model cannot see images of that size; the message names the stage.
        """
        config = self.model
        for name, entry in self.stages.items():
            if entry.image_size is not None:
                try:
                    config = with_image_size(config, entry.image_size)
                except ValueError as error:
                    raise ValueError(f"stage {name!r}: image_size: {error}") from error
            if name == stage:
                break
        return config

    @property
    def held_out(self) -> Data:
        """What is held out: the evaluation's own data, else the last stage's, if bundled, undistorted.

        Raises:
            ValueError: the last stage reads files, and the evaluation has no data of its own.
        """
        if self.evaluation.data is not None:
            return self.evaluation.data
        last = list(self.stages.values())[-1].data
        if isinstance(last, FilesConfig):
            raise ValueError("evaluation.data is missing: name the files that are held out")
        return last.model_copy(update={"augment": 0.0}) if isinstance(last, DigitsConfig) else last

    def bundled_held_out(self) -> Bundled:
        """The same where its answers are known words.

        Raises:
            ValueError: it is files.
        """
        held_out = self.held_out
        if isinstance(held_out, FilesConfig):
            raise ValueError("accuracy is measured on bundled dialogues, and evaluation.data names files")
        return held_out

    def processor(self, stage: str | None = None) -> Processor:
        """The tokenizer and the image preprocessing of this recipe, for dialogues.

        Args:
            stage: whose images; None: those of the model as the run begins.

        Raises:
            ValueError: the tokenizer is the language model's, and its folder is not given or holds none.
        """
        model = self.model if stage is None else self.model_in(stage)
        if self.tokenizer == "language":
            if model.language.pretrained is None:
                raise ValueError(
                    f"recipe {self.name} takes the language model's tokenizer: give its folder with --lm, or "
                    "take the variant tiny"
                )
            return self.wording.processor(
                model.language.pretrained, model.image, model.tokens_per_image, model.tiling
            )
        return Processor(
            self._tokenizer(),
            ProcessorConfig(image=model.image, tiling=model.tiling, tokens_per_image=model.tokens_per_image),
        )

    def _tokenizer(self) -> Tokenizer:
        """That of the words of the bundled dialogues that the stages learn from."""
        return words_of(stage.data.source for stage in self.stages.values())


def _source_of(stage: Any) -> str:
    """The `source` of a stage's data as it is given."""
    data = stage.get("data") if isinstance(stage, Mapping) else None
    return str(data.get("source", "digits")) if isinstance(data, Mapping) else "digits"


def _with_defaults(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """`given` with what it leaves out, or gives as None."""
    return {**given, **{key: value for key, value in defaults.items() if given.get(key) is None}}


def load_recipe(
    source: str | os.PathLike[str],
    variant: str | None = None,
    *,
    language: str | None = None,
    vision: Sequence[str] = (),
    data: Sequence[str] = (),
    checkpoint: str | None = None,
    settings: Sequence[str] = (),
    **overrides: Any,
) -> Recipe:
    """Reads a recipe.

    Args:
        source: a YAML file, or the name of a recipe that pyvlm ships.
        variant: an entry of the file's `variants`, whose keys replace those of the recipe, at any depth.
        language: a folder of transformers that the language model starts from, with its tokenizer.
        vision: folders of transformers that the vision towers start from: "NAME=FOLDER", or "FOLDER" for all
            towers of transformers that are not named.
        data: what the stages learn from: "STAGE=PATH", or "PATH" for all stages that are not named.
        checkpoint: a folder of a LLaVA of transformers that all of the model starts from, with its tokenizer:
            see `with_checkpoint`. `language` and `vision` then replace parts of it.
        settings: "KEY=VALUE", a dotted path into the recipe and what to put there, as YAML.
        overrides: replace keys at the top, after the variant's.

    Raises:
        ValueError: the file is missing or not YAML, there is no such variant, or a key is unknown, missing or
            has a wrong value; the message names the file and every defect.
    """
    text, name = _read(source)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no recipe: expected keys and values, got {type(content).__name__}")
    variants = content.pop("variants", None) or {}
    if variant is not None:
        if variant not in variants:
            raise ValueError(f"{name} has no variant {variant!r}; it has {sorted(variants) or 'none'}")
        content = merge(content, variants[variant])
    if checkpoint is not None:
        content = with_checkpoint(content, checkpoint)
    content = with_settings(with_paths(content, language, vision, data), settings)
    try:
        return Recipe.model_validate({**content, **overrides})
    except ValidationError as error:
        raise ValueError(f"{name} is not a valid recipe: {explain(error, Recipe)}") from error


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with pyvlm."""
    files = (entry.name for entry in resources.files("pyvlm.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def _read(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Text of a recipe, and what to call it in messages."""
    if str(source) in shipped_recipes():
        return (resources.files("pyvlm.recipes") / f"{source}.yaml").read_text(
            encoding="utf-8"
        ), f"recipe {source}"
    try:
        return Path(source).read_text(encoding="utf-8"), str(source)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        shipped = ", ".join(shipped_recipes())
        raise ValueError(
            f"{source}: cannot be read ({reason}); give a YAML file or one of the shipped recipes: {shipped}"
        ) from error


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`; mappings that both hold under a key are merged likewise, unless
    they are of different kinds."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        alike = isinstance(old, Mapping) and isinstance(value, Mapping) and not _another_kind(old, value)
        merged[key] = merge(old, value) if alike else value  # type: ignore[arg-type]
    return merged


def _another_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `new` is of another kind of a union, whose keys are others too."""
    return any(tag in new and new[tag] != old.get(tag) for tag in TAGS)
