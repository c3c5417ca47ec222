"""docs/python.md and the notebook run as they are, from top to bottom, on tiny models in an empty folder."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "examples" / "distil.ipynb"
# TRL and peft use it by its name of old.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(code: str, line: int, page: Path, names: dict) -> None:
    """Run a snippet so that an error names the line of its page."""
    exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.slow
def test_every_snippet_of_the_page_runs(tiny_llava, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor

    from vlm_distill_cache.data.text.processors import load_image_processor

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    own = LlavaProcessor(
        load_image_processor(tiny_llava), AutoTokenizer.from_pretrained(tiny_llava), patch_size=12,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    for part in (model, own):
        part.save_pretrained(tmp_path / "checkpoints" / "my-vlm")
    text = PAGE.read_text()
    snippets = [
        (found[1], text[: found.start(1)].count("\n")) for found in re.finditer(r"```python\n(.*?)```", text, re.S)
    ]
    assert len(snippets) > 8
    names: dict = {"__name__": "page"}
    without = []
    for code, line in snippets:
        if "import trl" in code and importlib.util.find_spec("trl") is None:
            code, without = "from peft import LoraConfig", ["trl"]  # what later snippets use of it
        run(code, line, PAGE, names)
    assert "hidden" in capsys.readouterr().out
    if without:
        pytest.skip("all snippets ran but that of TRL, which is not installed: pip install trl")


@pytest.mark.slow
def test_the_notebook_runs_and_holds_no_output():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {number}"
            assert cell["execution_count"] is None, f"cell {number}"
            run("".join(cell["source"]), 0, Path(f"{NOTEBOOK.name}-cell-{number}"), names)
    assert names["after"]["total"] < names["before"]["total"]
