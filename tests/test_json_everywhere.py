"""Every command of every program answers with one document where --json asks for it: new ones, too."""

import inspect
import json

import pytest
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of

PROGRAMS = {"teacher-cache": "stage1_teacher", "distill": "stage2_student", "cachectl": "common"}
COMMANDS = [(package, name) for package in PROGRAMS.values() for name in group_of(package).commands]


@pytest.mark.parametrize(("package", "name"), COMMANDS)
def test_a_command_takes_json_and_answers_with_one_document_even_where_it_refuses(package, name):
    group = group_of(package)
    command = group.commands[name]
    assert any("--json" in param.opts for param in command.params)
    refused = CliRunner().invoke(group, [name, "--json", "--no-such-option"])
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]
    # What it says stands in the document, too: results by `answer`, a dry run's outlook by `show`.
    source = inspect.getsource(inspect.unwrap(command.callback))
    assert "answer(" in source or ".show(" in source
