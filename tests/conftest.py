"""Fixtures shared by several packages: a tiny random LLaVA-1.5 directory, and caches built from it."""

import gc
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

# Helpers are imported by their bare names from any folder, whichever tests are asked for.
sys.path += [str(path) for path in sorted(Path(__file__).parent.rglob("*")) if any(path.glob("*.py"))]

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Messages are those that `make test` gives, however tests are run.
os.environ.setdefault("MAKELEVEL", "1")
os.environ.setdefault("DATA_NAME", "shapes")

import pytest
from skip_reasons import skip_lines


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """End with what was skipped and why, behind the table of coverage."""
    for line in skip_lines(terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    """Caches are thousands of small files: they are written to memory where there is room for those of a whole run."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 8 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("RUN_SLOW"):
        return
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is None:
            continue
        name = getattr(item, "originalname", item.name), item.nodeid.partition("::")[0]
        seen[name] += 1
        quick = marker.kwargs.get("quick", ())
        if seen[name] <= quick if isinstance(quick, int) else item.name.partition("[")[2].removesuffix("]") in quick:
            continue
        item.add_marker(pytest.mark.skip(reason="slow: set RUN_SLOW=1"))


def pytest_collection_finish() -> None:
    # What the libraries made when they were imported stays for good. Without this a collection looks through all of it,
    # 0.7 s each, and accelerate asks for one after every phase of training.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays_to_be_collected():
    """As above, for what a module's tests imported: it is half of what a tiny training takes."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _notes_of_their_own(tmp_path_factory: pytest.TempPathFactory):
    """What is noted of caches stays among the tests, and with the processes that they start."""
    os.environ["VLM_DISTILL_VERIFIED_DIR"] = str(tmp_path_factory.mktemp("verified"))


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Files are not flushed: tests kill processes, and what these wrote stays with the kernel; no machine crashes."""
    flush, os.fsync = os.fsync, lambda descriptor: None
    yield
    os.fsync = flush


def save_tiny_llava(directory: Path, *, layers: int = 4, seed: int = 0, vocab_extra: int = 0) -> Path:
    """A random LLaVA-1.5 of the published architecture with the built-in tokenizer, 36 visual tokens."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlm_distill_cache.data import builtin

    tokenizer, processor = builtin.load_tokenizer(), builtin.load_image_processor()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
            image_size=72, patch_size=12, projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer) + vocab_extra, hidden_size=48, intermediate_size=96,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # the library's init is so small that attention is uniform: make it look somewhere
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.ndim == 2:
                parameter.mul_(6.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("teachers") / "tiny-llava")


@pytest.fixture(scope="session")
def deep_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 24 layers, the least that the published table of layers has."""
    return save_tiny_llava(tmp_path_factory.mktemp("teachers") / "deep-llava", layers=24)


@pytest.fixture
def build_cache(tiny_llava: Path):
    """Build a cache of a few `shapes` samples with the tiny teacher; keyword arguments are BuildConfig fields."""

    def build(cache: Path, *, overwrite: bool = False, **options):
        from vlm_distill_cache.stage1_teacher.config import BuildConfig
        from vlm_distill_cache.stage1_teacher.extract import extract

        settings = {"teacher": str(tiny_llava), "template": "short", "limit": 10, "shard_size": 4, "batch_size": 3,
                    "fidelity_samples": 2} | options  # fmt: skip
        return extract(BuildConfig(cache=str(cache), **settings), overwrite=overwrite)

    return build
