"""A model that lmms-eval can ask: any that `distill suite` opens, through the code that answers there."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import PIL.Image
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.text.generation import device_of
from vlm_distill_cache.stage2_student.final_folder import trained_folder
from vlm_distill_cache.stage2_student.suite.ask import MOST_SEQUENCES, ask
from vlm_distill_cache.stage2_student.suite.harness import NO_GREEDY, OPTIONAL
from vlm_distill_cache.stage2_student.suite.opened import find_model, load_model
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Weigh

_TOKENS = 1024  # of an answer, where a task says nothing
_PICTURE = "<image>"  # how some tasks write in a text where its picture is shown


class DistilledStudent(lmms):
    """``lmms-eval --model distill --model_args pretrained=STUDENT``."""

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        cache: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        """Open the student.

        Args:
            pretrained: Its folder, or its name on the hub: what `distill suite` calls STUDENT.
            cache: For a model that is no student of ours: it reads as one of this cache would.
            device: None: this process's accelerator, if there is one.
            batch_size: As little used as ``max_batch_size``: batches are as large as their tokens allow.

        Raises:
            ConfigError: No student is named, or there are further options.
            ModelError: It cannot be opened.
        """
        super().__init__()
        if not pretrained or others:
            got = ", ".join(f"{name}={value}" for name, value in others.items()) or "no student"
            raise ConfigError(f"--model_args: expected pretrained=STUDENT, and perhaps cache=CACHE, got {got}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        found = find_model(trained_folder(str(pretrained)), cache)
        self._model, self._encoder = load_model(found, device=device or str(self.accelerator.device))

    @property
    def device(self) -> Any:
        """Where the student is."""
        return device_of(self._model)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy answers, cut before the first of the task's ``until``.

        Raises:
            ConfigError: A task asks for drawn answers or a beam.
            SampleError: A document's picture or text cannot be used.
        """
        told: list[str] = []
        for part in _parts([[request] for request in requests]):
            pictures: dict[Hashable, ImageSource | None] = {}
            asked: list[Request] = []
            for (request,) in part:
                options = _greedy(request)
                tokens = int(options.get("max_new_tokens") or options.get("max_gen_toks") or _TOKENS)
                image = self._picture(request, pictures)
                asked.append(Generate(image=image, question=_text(request.args[0]), max_tokens=tokens))
            for (request,), text in zip(part, self._ask(part, asked), strict=True):
                told.append(_until(text, request.args[1].get("until")))
        return told

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[str, dict[str, int]]]:
        """The loss of each continuation, nats a token, end of the answer included, and whether it is the greedy answer.

        Returns:
            Of each the pair as a text, ``(0.53, True)``, and in ``output_tokens`` how many tokens the loss is the mean of.
            The less the likelier, as lmms-eval's own models mean it.

        Raises:
            SampleError: A document's picture or text cannot be used.
        """
        told: list[tuple[str, dict[str, int]]] = []
        groups = [list(group) for _, group in groupby(requests, _question)]
        for part in _parts(groups):
            pictures: dict[Hashable, ImageSource | None] = {}
            asked = [
                Weigh(
                    image=self._picture(group[0], pictures),
                    question=_text(group[0].args[0]),
                    answers=tuple(self._continuation(request) for request in group),
                    optional=bool(group[0].metadata.get(OPTIONAL)),
                )
                for group in part
            ]
            for group, weigh, weighed in zip(part, asked, self._ask(part, asked), strict=True):
                greedy = None
                if not weighed:
                    told += [("", {})] * len(group)
                    continue
                if not group[0].metadata.get(NO_GREEDY):
                    most = int(max(tokens for _, tokens in weighed))
                    made = Generate(image=weigh.image, question=weigh.question, max_tokens=most)
                    greedy = self._ask([group], [made])[0]
                for answer, (nats, tokens) in zip(weigh.answers, weighed, strict=True):
                    # As a text, which lmms-eval makes of every pair; its cache of responses keeps texts and counts alone.
                    told.append((str((-nats / tokens, greedy == answer)), {"output_tokens": int(tokens)}))
        return told

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse conversations of several rounds."""
        raise ConfigError(
            f"task {requests[0].task_name} is a conversation, and students are asked one question at a time"
        )

    def _ask(self, groups: Sequence[Sequence[Instance]], asked: Sequence[Request]) -> list[Any]:
        results = ask(self._model, self._encoder, asked)
        for group, result in zip(groups, results, strict=True):
            if isinstance(result, SampleError):
                raise SampleError(f"{_where(group[0])}: {result}")
        return results

    def _picture(self, request: Instance, pictures: dict[Hashable, ImageSource | None]) -> ImageSource | None:
        """The picture of a request's document; the same object for requests of one picture, which are then packed."""
        key = (request.task_name, request.doc_id, *request.args[2:3])
        if key not in pictures:
            shown = request.args[2](self._document(request)) if len(request.args) > 2 and request.args[2] else None
            shown = list(shown or ())
            if len(shown) > 1 or not all(isinstance(visual, PIL.Image.Image) for visual in shown):
                raise SampleError(
                    f"{_where(request)}: expected one picture or none, got "
                    f"{', '.join(type(visual).__name__ for visual in shown)}; students look at one picture: leave the task out"
                )
            pictures[key] = _Shown(shown[0], _where(request)) if shown else None
        return pictures[key]

    def _continuation(self, request: Instance) -> str:
        """What is weighed, without the blank that tasks put in front: the student's template has its own."""
        target = request.args[1]
        return str(target(self._document(request)) if callable(target) else target).strip()

    def _document(self, request: Instance) -> Any:
        *_, place, task, split = request.args
        return self.task_dict[task][split][place]


@dataclass(frozen=True, eq=False)
class _Shown:
    """A picture that a task decoded."""

    picture: PIL.Image.Image
    name: str

    def load(self) -> PIL.Image.Image:
        """The picture in RGB."""
        return self.picture.convert("RGB")


def _parts(groups: Sequence[list[Instance]]) -> Iterator[list[list[Instance]]]:
    """As many as may have their pictures open at a time."""
    for start in range(0, len(groups), MOST_SEQUENCES):
        yield list(groups[start : start + MOST_SEQUENCES])


def _question(request: Instance) -> Hashable:
    """Equal for requests that differ in their continuation alone."""
    return (request.task_name, request.doc_id, request.args[0], *request.args[2:3])


def _text(context: str) -> str:
    """A task's text without the mark of its picture, whose place the student's template knows."""
    return context.replace(_PICTURE, "").strip()


def _greedy(request: Instance) -> dict[str, Any]:
    options = dict(request.args[1])
    if float(options.get("temperature") or 0) > 0 or int(options.get("num_beams") or 1) > 1:
        raise ConfigError(
            f"task {request.task_name} asks for drawn answers or a beam (temperature={options.get('temperature')}, "
            f"num_beams={options.get('num_beams')}), and students answer greedily: give --gen_kwargs temperature=0,num_beams=1"
        )
    return options


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.split(end, 1)[0] if end else text
    return text.strip()


def _where(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"
