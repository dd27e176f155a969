"""The contract between the toolkit and one multimodal model (no torch at import)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kuea_mllm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

# Where a swap puts the tower of a model that only names one, inside of the model's directory.
# SGLang takes a named tower only if its path contains "clip" or "siglip".
NAMED_TOWER_DIRECTORY = "clip_vision_tower"


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter package offers for discovery; light enough to be listed.

    Attributes:
        name: Short name, the one given to `--mllm`.
        summary: One line for listings, e.g. of `kuea-mllm doctor`.
        factory: "module:Class" of the adapter, imported only by `load`.
        is_fallback: Whether the adapter is only for models that no other adapter recognises.
    """

    name: str
    summary: str
    factory: str
    is_fallback: bool = False

    def load(self) -> MLLMAdapter:
        """Import the factory and make the adapter.

        Raises:
            UserError: If the factory cannot be imported or does not make an adapter.
        """
        module, _, attribute = self.factory.partition(":")
        try:
            adapter = getattr(importlib.import_module(module), attribute)()
        # A third party's code runs here, so any kind of failure has to end in a line with its name.
        except Exception as error:
            raise UserError(
                f"adapter {self.name!r} cannot be loaded from {self.factory!r}: "
                f"{type(error).__name__}: {error}.",
                "Repair or uninstall the package that provides it.",
            ) from error
        if not isinstance(adapter, MLLMAdapter):
            raise UserError(
                f"adapter {self.name!r}: {self.factory!r} does not provide what "
                "kuea_mllm.adapters.base.MLLMAdapter asks for.",
                "Run kuea_mllm.adapters.conformance on it to see what is missing.",
            )
        return adapter


@dataclass(frozen=True)
class Tap:
    """Which tokens of the tower an MLLM reads.

    Attributes:
        layers: Indices into `hidden_states`, negative from the end: 0 is the input of the first
            block, -1 the output of the last. Several are joined along the width or read one by one.
        drops_cls: Whether the first token is left out: the class token, where the family has one.
        after_norm: Whether the final norm (`post_layernorm`) is applied to what is read.
    """

    layers: tuple[int, ...]
    drops_cls: bool
    after_norm: bool = False


@dataclass(frozen=True)
class TowerReference:
    """A tower that a base keeps elsewhere: its configuration names it, its loader fetches it.

    Attributes:
        file: Configuration file, relative to the model directory.
        key: Key in it, such as "mm_vision_tower".
        value: What it says: a Hub id or a path.
    """

    file: str
    key: str
    value: str


@dataclass(frozen=True)
class TowerSlot:
    """Where the vision tower of one base model sits and how it is read.

    Attributes:
        vision_config: The tower's configuration as the base model builds it, defaults filled in
            (keys as in `transformers.CLIPVisionConfig`).
        module: Dotted path of the tower in a loaded model ("model.vision_tower"). On disk the tower
            is found by the names and shapes of all its tensors; the path only decides between two
            towers of the same shape.
        tap: Which of its tokens the MLLM reads, None if that is not known.
        family: Tower family the slot takes, as in `TowerSpec.family` ("clip", "siglip").
        mean: Channel means the base normalises images with, or None if it does not say.
        std: Channel deviations likewise.
        projector_width: Width of the tower tokens that the projector was made for, read off its
            weights; of one of them, where it takes several joined. None if that is not known.
        reference: Set where the configuration names a tower that its loader takes from elsewhere,
            whatever the weight files hold.
    """

    vision_config: Mapping[str, Any]
    module: str
    tap: Tap | None
    family: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    projector_width: int | None = None
    reference: TowerReference | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One question to an MLLM.

    Attributes:
        prompt: The user's question, without any conversation template or image placeholder.
        images: PIL images, put before the question; empty for a text-only question.
        image_keys: One name per image; images of one name have equal pixels, so that what a runtime
            computes of one image alone may serve several questions. Empty where that is not known.
        pixels: What `PreprocessingRuntime.preprocess` gave for each image; empty if it was not
            asked.
    """

    prompt: str
    images: tuple[Image, ...] = ()
    image_keys: tuple[str, ...] = ()
    pixels: tuple[Any, ...] = ()


@runtime_checkable
class MLLMRuntime(Protocol):
    """A loaded model that answers questions."""

    def generate(
        self,
        requests: Sequence[ChatRequest],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        top_p: float | None = None,
    ) -> list[str]:
        """Answer a batch of questions.

        An answer does not depend on what else is in the batch, apart from float rounding.

        Args:
            requests: The batch; rows with and without images may be mixed.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width; 1 is greedy (or sampling).
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling; only with a temperature above 0.

        Returns:
            The new text of each request in order, without prompt and special tokens, stripped.

        Raises:
            UserError: If a request cannot be answered by this model, or an option is out of range.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Say how the model runs: at least `dtype`, `device` and `attention`, JSON values only."""
        ...

    def vision_state(self) -> Mapping[str, Tensor]:
        """Return the tensors of the tower that is really in use, named as in the vision body.

        A fingerprint of these proves which tower gave the answers.
        """
        ...


@runtime_checkable
class ChoosingRuntime(Protocol):
    """What a runtime may provide on top: the likeliest of some given answers."""

    def choose(self, requests: Sequence[ChatRequest], candidates: Sequence[str]) -> list[str]:
        """Pick the candidate that the model would rather begin its answer with.

        The probabilities of the first new token are compared, in float32; nothing is generated.

        Args:
            requests: The batch; without any, only the candidates are checked.
            candidates: Answers of one token each, the earlier one first where two are as likely.

        Returns:
            One candidate per request.

        Raises:
            UserError: Naming a candidate that is not one token of its own.
        """
        ...


@runtime_checkable
class PreprocessingRuntime(Protocol):
    """What a runtime may provide on top: preparing images ahead, while the model is at work."""

    def preprocess(self, image: Image) -> Any:
        """Return what the model reads of an image, on the CPU; called from several threads.

        Raises:
            DataError: If the image cannot be decoded.
        """
        ...


@runtime_checkable
class MLLMAdapter(Protocol):
    """Everything the toolkit needs to know about one multimodal model."""

    @property
    def name(self) -> str:
        """Name of the adapter, equal to its manifest's."""
        ...

    def recognises(self, config: Mapping[str, object]) -> bool:
        """Say whether a model directory with this `config.json` belongs to this adapter.

        Directories of a kindred layout that the adapter refuses are recognised too, so that
        `check_base` can say what to do with them.
        """
        ...

    def check_base(self, base: Path) -> None:
        """Make sure that configuration, weights, processor and tokenizer are all there.

        Raises:
            UserError: Naming the file that is missing or the layout that is not supported.
        """
        ...

    def tower_slot(self, base: Path) -> TowerSlot:
        """Describe the vision tower that a base model asks for.

        Reads configuration files, and of weight files the headers at most; a directory without
        weights has a slot too.

        Raises:
            UserError: If the configuration does not describe a tower that can be swapped.
        """
        ...

    def vision_module(self, model: nn.Module) -> nn.Module:
        """Return the module of a loaded model that holds the vision tower.

        Raises:
            UserError: If the model is not of this adapter's kind.
        """
        ...

    def open_runtime(self, model_dir: Path, *, dtype: str, device: str) -> MLLMRuntime:
        """Load a model directory for answering questions.

        Args:
            model_dir: Complete model directory (a base, or the output of `swap`).
            dtype: "float32", "float16" or "bfloat16"; taken exactly as asked.
            device: "cpu", "cuda" or "cuda:<index>"; taken exactly as asked.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        ...


@runtime_checkable
class MLLMImporter(Protocol):
    """What an adapter may provide on top: turning its model's released form into one it supports.

    For models whose authors publish them in a layout of their own.
    """

    def import_released(
        self, source: Path, destination: Path, *, tower: str | None, command: str | None
    ) -> None:
        """Write a complete model directory from a released one.

        Args:
            source: Released model directory, which is left as it is.
            destination: Directory to create.
            tower: Where to take the vision tower from if the release only names it; None takes what
                the release says.
            command: Command line to record.

        Raises:
            UserError: If the release is incomplete or of another layout, or `destination` exists.
        """
        ...


@runtime_checkable
class MLLMPartsImporter(Protocol):
    """What an adapter provides instead, if its model is released in parts that lie apart."""

    def import_parts(
        self,
        source: Path,
        destination: Path,
        *,
        language_model: Path | None,
        tokenizer: Path | None,
        tower: str | None,
        activation: str | None,
        heads: int | None,
        command: str | None,
        accept: Collection[str] = (),
    ) -> None:
        """Write a complete model directory from the parts of a release.

        Args:
            source: The trained part, or a directory that holds all parts; left as it is.
            destination: Directory to create.
            language_model: Directory of the language model; None where it lies in `source`.
            tokenizer: Directory of the tokenizer; None takes the language model's.
            tower: The vision tower, anything that `load_tower` takes; None takes the release's.
            activation: The tower's, where its files do not state it.
            heads: Likewise.
            command: Command line to record.
            accept: Differences from the release that are meant; each adapter names its own.

        Raises:
            UserError: If a part is missing, incomplete or does not fit the others, or `destination`
                exists.
        """
        ...


@runtime_checkable
class MLLMExporter(Protocol):
    """What an adapter may provide on top: the way back to the files of a release."""

    def export_released(self, source: Path, destination: Path) -> None:
        """Write a model directory as its authors release theirs; the inverse of the import.

        Args:
            source: Model directory in Hugging Face form.
            destination: Directory to create.

        Raises:
            UserError: If `source` is incomplete, or `destination` exists.
        """
        ...


class EncodedSample(Protocol):
    """What a `ConversationEncoder` makes of one record."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids, with the encoder's placeholder once for the image."""
        ...

    @property
    def labels(self) -> list[int]:
        """What to predict, -100 where nothing is."""
        ...

    @property
    def left_out(self) -> int:
        """Tokens that were cut off already."""
        ...


class ConversationEncoder(Protocol):
    """Turns records into tokens in the conversation format of one model."""

    @property
    def placeholder(self) -> int:
        """What stands for the image in `EncodedSample.input_ids`; not the id of any token."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Token to fill rows with."""
        ...

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        ...

    def encode(self, record: Mapping[str, Any]) -> EncodedSample:
        """Encode a record in the schema of LLaVA's mixture."""
        ...


@dataclass(frozen=True)
class TuningFormat:
    """How one model reads a training sample: one image at most, then the conversation.

    Attributes:
        encoder: From records to tokens and labels; can be pickled.
        preprocess: From PIL images to pixel values, (images, 3, height, width), float32; can be
            pickled.
        image_token_id: What the model wants in place of the encoder's placeholder.
        tokens_per_image: How often.
        image_size: Height and width of the pixel values.
    """

    encoder: ConversationEncoder
    preprocess: Callable[[Sequence[Image]], Tensor]
    image_token_id: int
    tokens_per_image: int
    image_size: int


@dataclass(frozen=True)
class TuningParts:
    """Where the parts of a loaded model are, as dotted paths of modules.

    Attributes:
        language_model: Module whose linear layers may take LoRA; neither tower nor projector nor
            output layer lies in it, unless `excluded` says so.
        projector: Modules between tower and language model, trained as a whole where that is asked
            for.
        vision_tower: The tower.
        output_head: The layer that gives the logits.
        excluded: Modules inside of `language_model` that take no LoRA, as cross-attention to
            images; last names or dotted paths.
        vocabulary_size: Leading rows of the output layer that stand for tokens; those behind fill
            up, and take no part in the loss.
    """

    language_model: str
    projector: tuple[str, ...]
    vision_tower: str
    output_head: str
    vocabulary_size: int
    excluded: tuple[str, ...] = ()


@runtime_checkable
class MLLMTuner(Protocol):
    """What an adapter may provide on top: tuning of its model's language model."""

    def tuning_parts(self, base: Path) -> TuningParts:
        """Return where the parts are; reads configuration files only.

        Raises:
            UserError: If the model cannot be tuned here.
        """
        ...

    def tuning_format(self, base: Path, *, max_length: int) -> TuningFormat:
        """Return how samples are read; loads tokenizer and image settings, no weights.

        Args:
            base: Model directory.
            max_length: Longest sample in tokens.

        Raises:
            UserError: If tokenizer or processor are missing or follow another format.
        """
        ...

    def build_empty(self, base: Path) -> nn.Module:
        """Return the model on the meta device, from its configuration alone."""
        ...

    def load_for_tuning(
        self, base: Path, *, dtype: str, device: str, quantization: object | None = None
    ) -> nn.Module:
        """Load the model as it is to be tuned, in evaluation mode.

        Args:
            base: Model directory.
            dtype: "float32" or "bfloat16".
            device: As for `open_runtime`.
            quantization: A quantisation configuration of transformers, or None.

        Raises:
            UserError: If the directory, the dtype or the device is not usable.
        """
        ...

    def hidden_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the output layer reads, (rows, tokens, width).

        Args:
            model: From `load_for_tuning`, LoRA layers in place or not.
            batch: `input_ids`, (rows, tokens); `attention_mask` likewise, absent where rows are
                packed; `pixel_values`, (images, 3, height, width), in the order of the rows and
                absent without any; `position_ids`, (rows, tokens), for packed rows only, beginning
                at 0 in each sample.
        """
        ...

    def image_features(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """Return what the language model gets of images, after the projector."""
        ...


@runtime_checkable
class FewShotRuntime(Protocol):
    """What a runtime may provide on top: prompts with demonstrations and their images.

    Images are encoded apart from the text, so that a demonstration which stands in many prompts is
    encoded once.
    """

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return the length of each prompt in tokens."""
        ...

    def prompt_room(self, max_new_tokens: int) -> int:
        """Return the most tokens that a prompt may have with an answer of this length."""
        ...

    def encode_images(self, images: Sequence[Image]) -> list[Tensor]:
        """Return what the model makes of each image by itself, to be handed to the others."""
        ...

    def complete(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]] | Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float = 0.0,
        top_p: float | None = None,
        released: bool = False,
    ) -> list[str]:
        """Go on with prompts, `<image>` standing where an image belongs.

        Args:
            prompts: Texts, demonstrations and all.
            images: The images of each prompt in order, or what `encode_images` gave for them.
            max_new_tokens: Most tokens per answer.
            num_beams: Beam search width.
            length_penalty: Of the beam search.
            temperature: 0 decodes greedily; above 0 samples.
            top_p: Nucleus of the sampling.
            released: Decode as the published code of the model does, faults included.

        Returns:
            The new text of each prompt as it comes, without special tokens.

        Raises:
            UserError: If a prompt does not fit its images or the context.
        """
        ...

    def rank(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]] | Sequence[Sequence[Tensor]],
        class_names: Sequence[str],
        *,
        released: bool = False,
    ) -> list[list[float]]:
        """Score class names as continuations of prompts.

        Args:
            prompts: As for `complete`.
            images: As for `complete`; with `released` also more than the prompt has places for.
            class_names: The candidates.
            released: Rank as the published code of the model does, faults included.

        Returns:
            For each prompt the mean log-probability of each name's tokens.

        Raises:
            UserError: If a prompt does not fit its images or the context.
        """
        ...


@runtime_checkable
class LoraConverter(Protocol):
    """What an adapter may provide on top: LoRA weights in its model's released layout, and back."""

    def import_lora(self, source: Path, destination: Path, *, command: str | None) -> None:
        """Write released LoRA weights as a PEFT directory for the Hugging Face form.

        Args:
            source: Directory in the authors' layout; left as it is.
            destination: Directory to create.
            command: Command line to record.

        Raises:
            UserError: If the source is incomplete or of another layout, or `destination` exists.
        """
        ...

    def export_lora(self, source: Path, destination: Path, *, tower: str | None) -> None:
        """Write LoRA weights as the authors' code saves them; the inverse of the import.

        Args:
            source: PEFT directory.
            destination: Directory to create.
            tower: What the authors' configuration shall name as vision tower, where nothing says.

        Raises:
            UserError: If the layout has no place for something, or `destination` exists.
        """
        ...
