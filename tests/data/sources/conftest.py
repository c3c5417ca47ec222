"""An entry of a file of messages, read."""

import json

import pytest

from vlm_distill_cache.data.sources.messages import MessagesDataset


@pytest.fixture
def read(tmp_path):
    def of(entry):
        (tmp_path / "data.jsonl").write_text(json.dumps(entry))
        return MessagesDataset(tmp_path / "data.jsonl")[0]

    return of
