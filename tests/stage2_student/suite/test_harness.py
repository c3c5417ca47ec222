"""What lmms-eval is given: a student that answers it, and benchmarks whose numbers are the suite's."""

import importlib.util
import json
import math
import tomllib
from ast import literal_eval
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import yaml

from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.stage2_student.final_folder import trained_folder
from vlm_distill_cache.stage2_student.suite.ask import ask
from vlm_distill_cache.stage2_student.suite.harness import MODEL, TASKS
from vlm_distill_cache.stage2_student.suite.measures import score
from vlm_distill_cache.stage2_student.suite.metrics import captions
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.opened import find_model, load_model
from vlm_distill_cache.stage2_student.suite.requests import Generate, Weigh

ROOT = Path(__file__).resolve().parents[3]
# Its imports warn of much that is none of ours.
pytestmark = pytest.mark.filterwarnings("ignore")
with_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: run `make harness`",
)
SUBSETS = {
    "swap_obj": [("a red circle left of a blue square", "a blue square left of a red circle")],
    "add_att": [
        ("a red circle", "a big red circle and a triangle"),
        ("two green triangles", "two small green triangles"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SugarCrepe as published: a file a subset, an object by id, pictures beside."""
    root = tmp_path_factory.mktemp("benchmarks")
    for subset, pairs in SUBSETS.items():
        rows = {}
        for number, (right, wrong) in enumerate(pairs):
            name = f"{subset}{number}.png"
            PIL.Image.new("RGB", (40 + number, 40), (40 * number, 90, len(subset) * 9)).save(root / name)
            rows[str(number)] = {"filename": name, "caption": right, "negative_caption": wrong}
        (root / f"{subset}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def evaluate(folder, monkeypatch):
    """Run tasks of ours as lmms-eval's command does."""
    pytest.importorskip("lmms_eval")
    evaluator, tasks = import_module("lmms_eval.evaluator"), import_module("lmms_eval.tasks")
    monkeypatch.setenv("VLM_DISTILL_BENCHMARKS", str(folder))

    def run(model, task="distill_sugarcrepe", **more):
        return evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=tasks.TaskManager(include_path=str(TASKS), include_defaults=False),
            device="cpu",
            batch_size=1,
            cli_args=SimpleNamespace(process_with_media=False, reasoning_tags=None),
            **more,
        )

    return run


def _expected(model, encoder, folder):
    """The suite's measures of the folder: value and bounds by name."""
    (benchmark,) = find_benchmarks(folder).benchmarks.values()
    metric = METRICS[benchmark.metric]
    asked = [metric.requests(item, benchmark.instruction) for item in benchmark.items]
    results = [ask(model, encoder, list(requests)) for requests in asked]
    measured = {measure.name: measure for measure in metric.measures(benchmark.items, results)}
    return {name: score(measure, measured) for name, measure in measured.items()}


def _told(found, task="distill_sugarcrepe"):
    return {
        name.removesuffix(",none"): value
        for name, value in found["results"][task].items()
        if "_stderr" not in name and name != "alias"
    }


@with_lmms_eval
def test_a_task_gives_the_suites_numbers_with_and_without_a_cache_of_responses(evaluate, finished, folder, tmp_path):
    student = str(finished.output / "distilled" / "final")
    model, encoder = load_model(find_model(trained_folder(student), None), device="cpu")
    expected = _expected(model, encoder, folder)
    wanted = {name: found.value for name, found in expected.items()}
    wanted |= {f"{name}_low": found.low for name, found in expected.items() if "/" not in name}
    wanted |= {f"{name}_high": found.high for name, found in expected.items() if "/" not in name}
    assert {"likelihood", "letters_both_right/swap_obj"} <= wanted.keys()
    for _ in range(2):  # the second time, what was kept answers
        found = evaluate(MODEL, model_args=f"pretrained={student}", use_cache=str(tmp_path))
        assert _told(found) == pytest.approx(wanted)
    assert found["n-samples"]["distill_sugarcrepe"]["effective"] == 3
    logged = found["samples"]["distill_sugarcrepe"][0]
    assert logged["doc"]["captions"] == SUBSETS["add_att"][0]


@with_lmms_eval
def test_of_a_model_without_token_counts_what_depends_on_them_is_not_told(evaluate, folder):
    class Foreign(import_module("lmms_eval.api.model").lmms):
        """Gives the mean loss of a continuation, as lmms-eval's own models do: right about add_att, undecided elsewhere."""

        def loglikelihood(self, requests):
            for request in requests:
                (picture,) = request.args[2](self.task_dict[request.args[4]][request.args[5]][request.args[3]])
                assert picture.mode == "RGB"
            right = {caption for caption, _ in SUBSETS["add_att"]}
            return [(0.7 if request.args[1] in right else 1.1, False) for request in requests]

        def generate_until(self, requests):
            return ["A"] * len(requests)

        def generate_until_multi_round(self, requests):
            raise NotImplementedError

    told = _told(evaluate(Foreign()))
    assert told["likelihood_per_token"] == 0.5
    assert told["likelihood_per_token/add_att"] == 1
    assert math.isnan(told["likelihood"])
    assert math.isnan(told["likelihood/add_att"])
    assert told["letters"] == 0.5
    assert told["letters_both_right"] == 0


@with_lmms_eval
def test_a_student_answers_other_tasks_as_they_ask(finished, monkeypatch):
    module = import_module("vlm_distill_cache.stage2_student.suite.harness.model")
    instances = import_module("lmms_eval.api.instance")
    student = module.DistilledStudent(pretrained=str(finished.output / "distilled" / "final"), device="cpu")
    picture = PIL.Image.new("RGBA", (30, 30), (200, 10, 10, 255))
    student.task_dict["other"] = {"test": [[picture], [], [picture, picture]]}
    seen = []

    def answer(model, encoder, requests):
        seen.extend(requests)
        return [
            "a red circle. And more" if isinstance(one, Generate) else [[-2.0 * len(text), 4.0] for text in one.answers]
            for one in requests
        ]

    def request(document, *arguments):
        metadata = {"task": "other", "doc_id": document, "repeats": 1}
        shown = (*arguments, list, document, "other", "test")
        return instances.Instance(request_type="generate_until", arguments=shown, idx=0, metadata=metadata)

    question = "What is there?"
    assert student.generate_until(
        [request(0, question, {"max_new_tokens": 3}), request(1, question, {"max_new_tokens": 3})]
    )
    monkeypatch.setattr(module, "ask", answer)
    told = student.generate_until(
        [request(0, f"<image>\n{question}", {"until": ["."]}), request(1, question, {"until": "!"})]
    )
    assert told == ["a red circle", "a red circle. And more"]
    assert [(one.question, one.max_tokens, one.image is None) for one in seen] == [
        (question, 1024, False),
        (question, 1024, True),
    ]
    assert seen[0].image.load().mode == "RGB"
    seen.clear()
    asked = [
        request(0, question, " a red circle. And more"),
        request(0, question, "blue"),
        request(1, question, "blue"),
    ]
    told = [(literal_eval(text), counts["output_tokens"]) for text, counts in student.loglikelihood(asked)]
    assert told == [((11.0, True), 4), ((2.0, False), 4), ((2.0, False), 4)]
    weighed = [one for one in seen if isinstance(one, Weigh)]
    assert [one.answers for one in weighed] == [
        ("a red circle. And more", "blue"),
        ("blue",),
    ]  # one picture, one request
    with pytest.raises(SampleError, match=r"task other, document 2: expected one picture or none, got Image, Image"):
        student.generate_until([request(2, question, {})])
    with pytest.raises(ConfigError, match=r"drawn answers .* --gen_kwargs temperature=0,num_beams=1"):
        student.generate_until([request(0, question, {"temperature": 0.7})])
    with pytest.raises(ConfigError, match=r"expected pretrained=STUDENT, and perhaps cache=CACHE, got dtype=half"):
        module.DistilledStudent(pretrained="student", dtype="half")


@with_lmms_eval
def test_a_task_without_its_benchmark_says_what_is_there_and_prompts_can_be_plain(folder, monkeypatch, tmp_path):
    task = import_module("vlm_distill_cache.stage2_student.suite.harness.benchmark").BenchmarkTask
    monkeypatch.delenv("VLM_DISTILL_BENCHMARKS", raising=False)
    with pytest.raises(ConfigError, match=r"task t: no folder of benchmarks; .* export VLM_DISTILL_BENCHMARKS=FOLDER"):
        task(config={"task": "t", "metric": "winoground"})
    with pytest.raises(DataError, match=r"no benchmark with metric winoground; it holds sugarcrepe \(sugarcrepe\)"):
        task(config={"task": "t", "metric": "winoground", "folder": str(folder)})
    with pytest.raises(ConfigError, match=r"unknown layout; known: .*metric"):
        task(config={"task": "t", "layout": "sugarcrepe", "folder": str(folder)})
    with pytest.raises(ConfigError, match="prompts: 'none'; it is published or plain"):
        task(config={"task": "t", "metric": "sugarcrepe", "folder": str(folder), "prompts": "none"})
    rows = [{"question": "Which?", "options": ["red", "blue"], "answer": letter} for letter in "AB"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    asked = [
        str(task(config={"task": "t", "benchmark": "q", "folder": str(tmp_path), "prompts": prompts}).asked)
        for prompts in ("published", "plain")
    ]
    assert ["directly" in one for one in asked] == [True, False]


def test_every_compositional_metric_is_a_task_that_can_be_found():
    class Loader(yaml.SafeLoader):
        """Reads lmms-eval's own tag as the name that follows it."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    tasks = {path.stem: yaml.load(path.read_text(), Loader) for path in TASKS.glob("*.yaml")}
    assert {task["metric"] for task in tasks.values()} >= captions.METRICS.keys()
    for name, task in tasks.items():
        assert task["task"] == name
        assert task["metric"] in METRICS
        module, _, _ = task["class"].rpartition(".")
        assert importlib.util.find_spec(module) is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"][MODEL].partition(":")
    assert callable(getattr(import_module(module), function))
