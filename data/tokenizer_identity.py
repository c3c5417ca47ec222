"""What a tokenizer does, as one hash: logits can be distilled between equal ones only."""

from typing import Any

from vlm_distill_cache.common.files.hashing import fingerprint

_PROBE = (
    "USER: What's in  it?\n(A) 3 RED px\tna\u00efve e\u0301t\u00e9 \u4e2d\u6587 \U0001f642 x_1 ASSISTANT: no"
)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what a tokenizer does to text, not how it is stored or how many rows a model has.

    Its vocabulary without added tokens (LLaVA adds ``<image>`` and ``<pad>`` to the very tokenizer MobileVLM
    uses, and no answer contains either), the end token, and the ids of a text that brings out blanks, case,
    digits, accents, scripts and unknown characters. Files of one tokenizer written by different
    versions of the library describe the same steps in different words, so those are not compared.
    """
    added = set(tokenizer.get_added_vocab())
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
    return fingerprint(
        {
            "vocabulary": vocabulary,
            "eos_token_id": tokenizer.eos_token_id,
            "probe": tokenizer(_PROBE)["input_ids"],
        }
    )
