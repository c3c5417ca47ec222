"""The processor beside our models: each text has its own picture, each option is honoured or refused by name."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_families import byte_tokenizer
from transformers import CLIPImageProcessorPil
from transformers.utils import PaddingStrategy

from vlm_distill_cache.common.models.processing import VisionLanguageProcessor

IMAGE, VISUAL = 4_000, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
RED, NOISE = PIL.Image.new("RGB", (9, 9), "red"), PIL.Image.fromarray(PIXELS)
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<image>{% else %}"
    "{% generation %}{{ m.content[0].text }}{% endgeneration %}{% endif %} {% endfor %}"
)


@pytest.fixture(scope="module")
def processor():
    side = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    return VisionLanguageProcessor(
        images, byte_tokenizer(bos=True), chat_template=CHAT, image_token_id=IMAGE, visual_tokens=VISUAL
    )


def pixels(processor, image):
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    "given", [[[RED], [], [NOISE]], [RED, None, NOISE], [RED, [], [NOISE]], [RED, NOISE], ([RED], None, (NOISE,))]
)
def test_pictures_go_with_their_own_texts(processor, given):
    found = processor(images=given, text=["<image> a", "b", "c <image>"], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, torch.cat([pixels(processor, RED), pixels(processor, NOISE)]))


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([[RED, NOISE], []], ["<image> a", "<image> b"]),
        ([[], [RED]], ["<image> a", "b"]),
        ([None, RED], ["<image> a", "b"]),
        ([[RED, NOISE]], ["<image><image>"]),
        ([[RED, NOISE]], ["<image>"]),
        ([[RED]], ["<image>", "a"]),
        ([RED, NOISE], ["<image>", "a"]),
        ([RED, NOISE], ["<image><image>", "a"]),
        (None, ["<image>"]),
    ],
)
def test_a_text_with_pictures_of_another_is_refused(processor, given, texts):
    with pytest.raises(ValueError, match=r"one picture a text or conversation, or none|give one list for each text"):
        processor(images=given, text=texts)


def test_a_picture_is_the_same_in_each_form_that_is_taken_and_others_are_refused(processor, tmp_path):
    NOISE.save(tmp_path / "noise.png")
    file, across = io.BytesIO((tmp_path / "noise.png").read_bytes()).getvalue(), PIXELS.transpose(2, 0, 1)
    for same in (
        PIXELS,
        across,
        torch.from_numpy(PIXELS),
        torch.from_numpy(across.copy()),
        file,
        tmp_path / "noise.png",
    ):
        assert torch.equal(pixels(processor, same), pixels(processor, NOISE))
    grey = PIXELS[..., 0]
    for same in (grey[..., None], grey[None], torch.from_numpy(grey.copy())):
        assert torch.equal(pixels(processor, same), pixels(processor, PIL.Image.fromarray(grey)))
    wrong = [PIXELS.astype(kind) for kind in (np.float32, np.float64, np.int32, np.int64, np.uint16, bool)]
    wrong += [
        grey.astype(np.int32),
        PIXELS[None, None],
        PIXELS[None].astype(np.float32),
        PIXELS[:3, :, :],
        PIXELS[..., :2],
        grey[0],
        {"bytes": file},
        3,
    ]
    for one in wrong:
        with pytest.raises(ValueError, match=r"a picture of type .*; expected PIL's, an array or tensor of uint8"):
            pixels(processor, one)


def test_a_batch_of_pictures_is_a_list_of_them_and_needs_no_text(processor):
    several = np.stack([PIXELS, PIXELS[::-1]])
    across = torch.from_numpy(several.transpose(0, 3, 1, 2).copy())
    expected = processor(images=list(several), text=["<image>"] * 2, return_tensors="pt")["pixel_values"]
    for images in (several, across):
        found = processor(images=images, text=["<image>"] * 2, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    for images in (several, across, list(several), [[several[0]], None, [several[1]]]):
        alone = processor(images=images, return_tensors="pt")
        assert alone.keys() == {"pixel_values"}
        assert torch.equal(alone["pixel_values"], expected)
    assert torch.equal(processor(images=RED, return_tensors="pt")["pixel_values"], pixels(processor, RED))
    with pytest.raises(ValueError, match="no option foo"):
        processor(images=RED, foo=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_truncation_and_offsets_are_the_tokenizers_own(processor, side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", side)
    monkeypatch.setattr(processor.tokenizer, "truncation_side", side)
    texts = ["some text, of words", "short", "x"]
    for options in (
        {"padding": True}, {"padding": "longest", "padding_side": "right"}, {"padding": PaddingStrategy.LONGEST},
        {"padding": False}, {"padding": "do_not_pad"}, {"padding": "max_length", "max_length": 30},
        {"padding": True, "pad_to_multiple_of": 16}, {"truncation": True, "max_length": 4, "padding": True},
        {"truncation": "do_not_truncate", "padding": True}, {"return_offsets_mapping": True, "padding": False},
        {"add_special_tokens": False, "padding": True}, {"return_attention_mask": False, "padding": True},
    ):  # fmt: skip
        theirs = dict(processor.tokenizer(texts, return_token_type_ids=False, **options))
        for given in (options, {"text_kwargs": options}, {"common_kwargs": options}):
            assert dict(processor(text=texts, **given)) == theirs
    kept = {"images": RED, "text": "<image> some text" if side == "right" else "some text <image>"}
    short = processor(**kept, truncation=True, max_length=VISUAL + 4)["input_ids"][0]
    assert short.count(IMAGE) == VISUAL
    assert len(short) == VISUAL + 4
    with pytest.raises(ValueError, match="would cut a picture off"):
        processor(**kept, truncation=True, max_length=VISUAL)


def test_other_options_are_handed_to_the_image_processor_or_refused_by_name(processor):
    asked = {"images": NOISE, "text": "<image>", "return_tensors": "pt"}
    plain = processor(
        **asked,
        images_kwargs={"return_tensors": "pt"},
        videos=None,
        audio=None,
        videos_kwargs={},
        split_special_tokens=False,
        processing_kwargs={},
    )
    for options in ({"do_normalize": False}, {"images_kwargs": {"do_normalize": False}}):
        raw = processor(**asked, **options)["pixel_values"]
        mean, std = (
            torch.tensor(getattr(processor.image_processor, f"image_{of}"))[:, None, None] for of in ("mean", "std")
        )
        torch.testing.assert_close((raw - mean) / std, plain["pixel_values"])
    for name, value in (
        ("add_special_token", False), ("foo", 1), ("videos", [1]), ("sanitize_control_tokens", True), ("padding", "longst"),
        ("max_length", 0), ("truncation", "only_second"), ("images_kwargs", {"do_normalise": True}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            processor(**asked, **{name: value})
    for text in ([], NOISE, [["a"]]):
        with pytest.raises(ValueError, match="text: expected a text or a list of texts"):
            processor(images=NOISE, text=text)
    with pytest.raises(ValueError, match="text: expected a text or a list of texts"):
        processor()


def test_answers_are_marked_behind_pictures(processor):
    turns = [{"role": "user", "content": [{"type": "image", "image": RED}]}]
    chats = [[*turns, {"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("A dog.", "No")]
    found = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
        processor_kwargs={"return_mm_token_type_ids": True},
    )  # fmt: skip
    said = [ids[mask.bool()] for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)]
    assert [processor.decode(one) for one in said] == ["A dog.", "No"]
    assert torch.equal(found["mm_token_type_ids"].bool(), found["input_ids"] == IMAGE)
    assert found["mm_token_type_ids"].sum() == 2 * VISUAL


def test_what_a_chat_template_does_not_read_changes_nothing_with_a_warning_where_it_asks_for_something(
    processor, caplog
):
    turns, how = (
        [{"role": "user", "content": [{"type": "image", "image": RED}]}],
        {"tokenize": True, "return_dict": True},
    )
    plain = processor.apply_chat_template(turns, **how)
    assert processor.apply_chat_template(turns, **how, enable_thinking=False)["input_ids"] == plain["input_ids"]
    assert caplog.messages == []
    assert processor.apply_chat_template(turns, **how, enable_thinking=True)["input_ids"] == plain["input_ids"]
    assert caplog.messages == ["the chat template does not read enable_thinking: it changes nothing"]
    reads = "<image>{{ 'yes' if enable_thinking }}"
    told = processor.apply_chat_template(turns, chat_template=reads, enable_thinking=True)
    assert told == "<image>yes"


def test_a_token_with_the_id_of_pictures_is_refused_where_a_text_holds_it(processor):
    for added, refused in ((["<answer>"], True), (["<unused>", "<answer>"], False)):
        tokenizer = byte_tokenizer(bos=True)
        one = VisionLanguageProcessor(
            processor.image_processor, tokenizer, image_token_id=len(tokenizer), visual_tokens=2
        )
        tokenizer.add_tokens(added)
        for asked in ({"text": "a <answer>"}, {"text": "<image> a <answer>", "images": RED}):
            if refused:
                with pytest.raises(ValueError, match=r"'<answer>' in the text has the id .* marks pictures"):
                    one(**asked)
            else:
                ids = one(**asked)["input_ids"][0]
                assert ids[-1] == len(tokenizer) - 1
                assert ids.count(one.image_token_id) == 2 * ("images" in asked)
                assert ids[1] == (one.image_token_id if "images" in asked else tokenizer("a")["input_ids"][1])
