"""The tokenizer and image processor of the built-in models, shipped as files beside this module.

One word, one token: a vocabulary of about 150 words covers `data.shapes.dataset` and the published easy-vqa
benchmark, the prompt templates, the option letters of the A/B prompt, and nothing else. Words are
lower-cased, so "Red" and "red" are one token, but a letter standing alone keeps its case: option
"A" must differ from the article "a". (A capital article, as in "A red circle", is still an article.)

The files are written by `save_processor` from the word lists below; a test compares them.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from vlm_distill_cache.data.shapes.scene import COLORS, GRID, IMAGE_SIZE, SHAPES, SIZES
from vlm_distill_cache.data.shapes.text import PLURALS

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)
MODEL_MAX_LENGTH = 512  # tokens; positions the built-in models have

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEMPLATES = (
    "user assistant : . , ? ! ' ( ) s a chat between curious and an artificial intelligence the gives"
    " helpful detailed polite answers to questions which caption best describes image answer with option"
    " alphabet from given choices directly A B C D"
)
_SHAPES_WORDS = "left right of above below describe where is what color shape object size how many objects are there or"
_EASY_VQA_WORDS = "does contain in not no present yes rectangle gray black brown"


def vocabulary() -> list[str]:
    """Return every token in id order: special tokens, then words in the order of their lists."""
    words = [
        *SPECIAL_TOKENS,
        *_TEMPLATES.split(),
        *_SHAPES_WORDS.split(),
        *COLORS,
        *SHAPES,
        *PLURALS.values(),
        *SIZES,
        *_EASY_VQA_WORDS.split(),
        *(str(digit) for digit in range(10)),
        *(f"{axis}{place + 1}" for axis in "cr" for place in range(GRID)),
    ]
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer, which puts ``<s>`` in front, as Llama's does; character offsets are exact."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    # Lower-case letter by letter where another letter or a digit is adjacent; the length never changes, so
    # offsets stay true. A capital followed by a space and a lower-case word is an article.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(
                Regex(f"(?<=[A-Za-z0-9]){letter}|{letter}(?=[A-Za-z0-9])|{letter}(?= [a-z])"), letter.lower()
            )
            for letter in _LETTERS
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words joined by one space
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="right",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> CLIPImageProcessorPil:
    """Build CLIP's image processor at 72 x 72 pixels, squashing other sizes to a square."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, use_square_size=False)


def processor_directory() -> Path:
    """Return the folder that holds the shipped tokenizer and image processor."""
    return Path(__file__).parent


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Load the shipped tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(processor_directory())


def load_image_processor() -> CLIPImageProcessorPil:
    """Load the shipped image processor."""
    return CLIPImageProcessorPil.from_pretrained(processor_directory())


def save_processor(directory: Path) -> None:
    """Write tokenizer and image processor as ``save_pretrained`` does; a missing folder is created."""
    build_tokenizer().save_pretrained(directory)
    build_image_processor().save_pretrained(directory)
