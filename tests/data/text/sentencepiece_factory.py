"""Tiny sentencepiece models, in the two forms in which checkpoints hold them."""

import json

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tokenizers.processors import TemplateProcessing

CORPUS = (
    "A chat between a curious user and an assistant. USER: what is in  it? ASSISTANT: a red square, 3 px\n"
    "naïve café été 中文 日本語 ガギグ Ａ１ ｶﾞ 🙂 👩‍👩‍👧 x_1 <sep> tab\there   three    four     five if  (a):  return\n"
)
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    # As Llama's and MobileVLM's.
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "pad_id": -1, **IDENTITY},
    "llama-whitespace": {"model_type": "bpe", "byte_fallback": True, "allow_whitespace_only_pieces": True, **IDENTITY},
    "bpe": {"model_type": "bpe"},
    "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False, **IDENTITY},
    "bpe-unknown": {"model_type": "bpe", "character_coverage": 0.98, **IDENTITY},
    "bpe-symbols": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "  "], **IDENTITY},
    "bpe-control": {"model_type": "bpe", "control_symbols": ["<ctl>"], "normalization_rule_name": "nfkc"},
    "bpe-suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True, "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, **IDENTITY},
    "unigram-no-prefix": {"model_type": "unigram", "add_dummy_prefix": False, "user_defined_symbols": ["<sep>"]},
}


def write_model(folder, kind="llama", **more):
    """Train a tiny model into a folder; what stands beside it is as mtgv/MobileVLM* has it."""
    (folder / "corpus.txt").write_text(CORPUS * 10, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=420, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **{**KINDS[kind], **more},
    )  # fmt: skip
    write_settings(folder)
    return folder


def write_settings(folder, **changes):
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>", **changes}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def own(folder, **changes):
    """The sentencepiece package's reading of a model, with some settings of its normaliser changed."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for name, value in changes.items():
        setattr(proto.normalizer_spec, name, value)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def write_converted(folder, model_folder, **config):
    """A tokenizer.json as llava-hf publishes it: made by the library's old converter, with two tokens added behind."""
    sp = own(model_folder)
    pieces = {sp.id_to_piece(index): index for index in range(len(sp))}
    scores = {piece: sp.get_score(index) for piece, index in pieces.items() if index > 2 and not sp.is_byte(index)}
    merges = [
        (piece[:at], piece[at:])
        for piece in scores
        for at in range(1, len(piece))
        if {piece[:at], piece[at:]} <= scores.keys()
    ]
    merges.sort(key=lambda pair: (scores["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", pieces["<s>"])]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return folder
