"""What our vision-language models share: images embedded among the text, and logits of supervised rows only.

A model is a decoder of the library that also holds the projector and the vision tower (``VisualDecoder``), and
an output projection (``VisionLanguageModel``). The decoder's config is the text config alone, so that switching
the language model's attention implementation never reaches the vision tower.

Dims: B batch, T sequence, M images, N visual tokens an image, D width, V vocabulary, A supervised rows.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.around import Around
from vlm_distill_cache.common.models.changed import apply_changes
from vlm_distill_cache.common.models.llava import AS_IDS, image_places, look_up_row_0, loss_on_words, put_images
from vlm_distill_cache.common.models.projectors import (
    LDPProjector,
    LDPv2Projector,
    Projector,
    TeacherAdapter,
    build_projector,
)
from vlm_distill_cache.common.models.vision_tower import VisionTower

Phase = Literal["dpt", "dft", "sft"]
PHASES: tuple[Phase, ...] = ("dpt", "dft", "sft")

# The library's name for keys and values of earlier steps, which has changed with version 5.24.
PAST = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class VisionLanguageConfig(PreTrainedConfig):
    """Configuration of one of our models; a subclass names the text and vision configurations' classes.

    Attributes:
        text_config: The language model's.
        image_token_id: Id that stands for one visual token in ``input_ids``; may lie outside the vocabulary.
        projector_type: One of ``projectors.PROJECTOR_TYPES``.
        teacher_projector: For ``taf``: ``{"act", "in", "hidden", "out"}`` of the teacher's projector.
        pool_teacher_tokens: For ``taf``: pool the teacher's tokens 2x2 before the post-projector.
        vision_feature_layer: Which of the tower's hidden states is projected; -2 as published.
        vision_feature_select_strategy: ``patch`` or ``full``, see ``VisionTower``.
        image_aspect_ratio: How a picture becomes the tower's square: ``pad`` or ``square``.
        distilled: What is changed in the model beyond all this (`common.models.changed`).
    """

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = 32000
    projector_type: str = "ldpnetv2"
    teacher_projector: dict[str, Any] | None = None
    pool_teacher_tokens: bool = False
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "patch"
    image_aspect_ratio: str = "pad"
    tie_word_embeddings: bool = False
    distilled: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Make configurations of what a ``config.json`` holds as plain objects; older libraries do not."""
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, config_class):
                setattr(self, name, config_class(**(value or {})))
        super().__post_init__(**kwargs)


OnRows = Callable[[Tensor, Any], Any]
"""Takes hidden states ``[A, D]`` and the output projection."""


class VisualDecoder(Around):
    """Mixed into a decoder of the library (``LlamaModel``, ``Qwen2Model``): adds projector and vision tower."""

    embed_tokens: nn.Embedding

    def add_vision(self, config: VisionLanguageConfig) -> None:
        """Make tower and projector, with random weights; a ModelError if they do not fit each other."""
        self.image_token_id = config.image_token_id
        look_up_row_0(self.embed_tokens, config)  # MobileVLM: 32000 rows, and the image token is 32000
        self.vision_tower = VisionTower(
            config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy
        )
        self.mm_projector: Projector = build_projector(
            config.projector_type,
            in_features=config.vision_config.hidden_size,
            out_features=config.text_config.hidden_size,
            grid=self.vision_tower.grid,
            teacher_projector=config.teacher_projector,
            pool_teacher_tokens=config.pool_teacher_tokens,
        )
        pools = isinstance(self.mm_projector, LDPProjector | LDPv2Projector) or config.pool_teacher_tokens
        if self.vision_tower.dropped_tokens and pools:
            raise ModelError(
                f"projector_type {config.projector_type!r} pools a whole grid of patches, but the vision tower's "
                "first patch is dropped (vision_feature_select_strategy 'patch' of a SigLIP tower); use "
                "projector_type 'mlp' or 'taf' without pooling"
            )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Switch the language model's attention, not the tower's, which the library would switch too."""
        tower = self.vision_tower.vision_tower.vision_model.config
        own = tower._attn_implementation
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        tower._attn_implementation = own

    def embed_multimodal(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Embed tokens and put the projected images where the image token stands, in batch-row order: ``[B, T, D]``."""
        return self._put_images(self._embed(input_ids), input_ids == self.image_token_id, pixel_values)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens; adapters and other embeddings in the place of the first have no row for the image token either."""
        embeds: Tensor = self.embed_tokens(input_ids.masked_fill(input_ids == self.image_token_id, self._image_row))
        return embeds

    @property
    def _image_row(self) -> int:
        """The embedding's row that is looked up for the image token."""
        beyond: bool = self.image_token_id >= self.config.vocab_size  # type: ignore[attr-defined]
        return 0 if beyond else self.image_token_id

    def _put_images(self, embeds: Tensor, is_image: Tensor, pixel_values: Tensor, remedy: str = "") -> Tensor:
        grid = self.mm_projector.out_grid
        as_grid = f"encode with the student's image_grid {grid}, and give pixel_values with the first step only"
        return put_images(embeds, is_image, self.mm_projector(self.vision_tower(pixel_values)), remedy or as_grid)

    def _refuse_missing_images(self, input_ids: Tensor, past: Any) -> None:
        """Raise ModelError for image tokens without an image, unless the model generated them itself."""
        if past is not None and past.get_seq_length() > 0:
            return
        found = int((input_ids == self.image_token_id).sum())
        if found:
            raise ModelError(
                f"input_ids hold {found} image tokens (id {self.image_token_id}) but pixel_values is "
                "None; pass the images with the first step, or encode the sample without an image"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model over text and images.

        ``input_ids`` are int64 ``[B, T]``, or in their place ``inputs_embeds`` float ``[B, T, D]``, with images already
        embedded, or to be put where the image token's embedding stands; ``pixel_values`` float ``[M, 3, height, width]``,
        with the first step only; ``attention_mask`` bool or 0/1
        ``[B, past + T]``, bool ``[B, 1, T, past + T]`` (True: may attend), a dict of masks by kind of layer, or None. All
        else, such as keys and values of earlier steps, is as for the library's decoders.

        Returns:
            ``last_hidden_state`` float ``[B, T, D]``, and keys and values for the next step.

        Raises:
            ModelError: Images and image tokens do not go together.
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ModelError("got input_ids and inputs_embeds; give one of them")
        past = kwargs.get(PAST, kwargs.get("past_key_values"))
        self.visual_mask = None if input_ids is None else input_ids == self.image_token_id
        if inputs_embeds is not None and pixel_values is not None:
            self.visual_mask = places = image_places(
                self.embed_tokens, self._image_row, inputs_embeds, attention_mask, past
            )
            inputs_embeds = self._put_images(inputs_embeds, places, pixel_values, AS_IDS)
        elif input_ids is not None and pixel_values is not None:
            inputs_embeds = self.embed_multimodal(input_ids, pixel_values)
        elif input_ids is not None:
            self._refuse_missing_images(input_ids, past)
            inputs_embeds = self._embed(input_ids)
        if (
            isinstance(attention_mask, Tensor)
            and attention_mask.dim() == 4
            and attention_mask.dtype == torch.bool
            and self.config._attn_implementation == "eager"  # type: ignore[attr-defined]
        ):
            # Eager attention adds its mask: a bool would be read as +1 and mask nothing.
            dtype: torch.dtype = self.dtype  # type: ignore[attr-defined]
            attention_mask = torch.zeros_like(attention_mask, dtype=dtype).masked_fill(
                ~attention_mask, torch.finfo(dtype).min
            )
        outputs: BaseModelOutputWithPast = self.run_around(
            super().forward,  # type: ignore[misc]
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return outputs


def rows_of(hidden: Tensor, rows: Tensor) -> Tensor:
    """Hidden states ``[A, D]`` of some rows, bool ``[B, T]``; of rows on the CPU no GPU is waited for.

    Raises:
        ModelError: If the output projection is given other rows.
    """
    if hidden.shape[:2] != rows.shape:
        raise ModelError(
            f"the output projection was given {list(hidden.shape[:2])} rows, expected {list(rows.shape)}; this model cannot be used"
        )
    index = rows.flatten().nonzero()[:, 0]
    return hidden.flatten(0, 1)[index.to(hidden.device, non_blocking=True)]


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """A visual decoder with its output projection; subclasses name config and decoder.

    Here labels are shifted once, when a sample is encoded, and losses are functions of the supervised rows' logits;
    ``labels`` are for those who fine-tune a student elsewhere.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [PAST]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # Published checkpoints carry these two kinds of buffers; both are computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"position_ids"]  # noqa: RUF012

    decoder_class: ClassVar[Any]
    applies_changes: ClassVar[bool] = True

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        apply_changes(self)

    @property
    def language_model(self) -> Any:
        """The decoder whose config switches the attention implementation."""
        return self.model

    @property
    def fused_settings(self) -> dict[str, Any] | None:
        """What of its logits a fused loss must know: nothing; None where the output projection is no plain one."""
        return {} if type(self.lm_head) is nn.Linear else None

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens that stand for one image in the sequence."""
        grid: tuple[int, int] = self.model.mm_projector.out_grid
        return grid

    @property
    def dropped_tokens(self) -> int:
        """Visual tokens left out at the beginning of the grid: CompoDistill drops the first patch."""
        return int(self.model.vision_tower.dropped_tokens)

    @property
    def vision_encoder(self) -> nn.Module:
        """The library's vision tower, as it is exported and fingerprinted."""
        encoder: nn.Module = self.model.vision_tower.vision_tower.vision_model
        return encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        supervised: Tensor | None = None,
        on_rows: OnRows | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predict next tokens; with ``supervised``, only for the rows that a loss needs.

        Arguments down to ``pixel_values``, and others: as for ``VisualDecoder.forward``. ``supervised``, bool ``[B, T]``,
        drops all other rows before the output projection, so that ``[B, T, V]`` never exists; ``on_rows`` is then called
        with the rows' last hidden states ``[A, D]`` and the output projection in its place, inside this forward pass, where
        wrappers for several devices expect a parameter's use. ``logits_to_keep``, for generation, keeps only so many last
        rows (0 = all), or the rows of this index. ``labels``, int64 ``[B, T]``, are the ids of the answers where they stand in
        ``input_ids``, as the library shifts them; -100, image tokens and ids beyond the vocabulary are left out.
        ``num_items_in_batch``: by how many labels their loss is divided; None: by those of this batch. ``return_dict``:
        False, here or in the config, is a tuple of what there is, as the library's models give it.

        Returns:
            ``loss``: with ``labels`` the library's cross-entropy, a scalar in nats, else None.
            ``logits``: float ``[A, V]`` in batch-row order with ``supervised``, else ``[B, T or kept, V]``; with
            ``on_rows`` whatever that returns.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if supervised is not None:
            hidden = rows_of(hidden, supervised)  # [A, D]
            if on_rows is not None:
                return on_rows(hidden, self.lm_head)
        elif isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits, loss = self.lm_head(hidden), None
        if labels is not None and supervised is None:
            loss = loss_on_words(
                self.model.image_token_id,
                self.loss_function,
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{PAST: outputs[PAST]} if PAST in outputs else {},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()

    def trainable_parameters(self, phase: Phase) -> list[nn.Parameter]:
        """Mark what a phase trains, freeze the rest, and return what is trained.

        ``dpt`` trains the projector side, ``dft`` and ``sft`` the language model too. Neither trains the vision tower
        (``VisionTower.used_parameters`` are what can be trained of it) or a teacher's projector.
        """
        if phase not in PHASES:
            raise ModelError(f"phase: got {phase!r}; choose one of {', '.join(PHASES)}")
        projector = self.model.mm_projector
        trained: nn.Module = projector.post if isinstance(projector, TeacherAdapter) else projector
        for parameter in self.parameters():
            parameter.requires_grad_(phase != "dpt" and parameter.is_floating_point())  # packed ones cannot
        projector.requires_grad_(False)
        self.model.vision_tower.requires_grad_(False)
        trained.requires_grad_(True)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
