"""Data files of strangers end in an error of ours or in samples, soon and without gigabytes."""

import os
import random
import resource
import signal
import tempfile
import traceback
from pathlib import Path

import pytest
from hostile_data import cases

from vlm_distill_cache.common.errors import DistillError, SampleError
from vlm_distill_cache.data.registry import open_dataset

SECONDS = 20
MEMORY = 10**9


def read_all(spec, encoder):
    """Open, encode as stage one does, and fingerprint; what a reader sets aside is passed over."""
    try:
        dataset = open_dataset(spec, limit=4)
    except DistillError as error:
        return [str(error)]
    said = []
    for index in range(len(dataset)):
        try:
            encoder(dataset[index])
        except SampleError as error:
            said.append(str(error))
    dataset.image_keys()
    dataset.fingerprint()
    return said


def run_apart(check):
    """Run a check in a forked process under limits: what went wrong, or nothing."""
    with tempfile.TemporaryFile("w+") as said:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not (child := os.fork()):
            code = 1
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                check()
                code = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc(file=said)
                said.flush()
            finally:
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        taken = usage.ru_maxrss * 1024 - before
        return said.read() + (f"exit status {status}" if status else "") + (f"{taken} bytes" if taken > MEMORY else "")


@pytest.fixture(scope="module")
def encoder():
    from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
    from vlm_distill_cache.data.images.encoder import ImageEncoder
    from vlm_distill_cache.data.text.encoding import SampleEncoder
    from vlm_distill_cache.data.text.templates import get_template

    tokenizer = load_tokenizer()
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder(processor=load_image_processor(), layout="square", grid=(6, 6), patch_size=12),
        template=get_template("short"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        max_length=512,
    )


def failures(chosen, encoder, folder):
    found = {}
    for number, (name, write) in enumerate(chosen):
        (place := Path(folder) / str(number)).mkdir()
        if said := run_apart(lambda w=write, p=place: read_all(w(p), encoder)):
            found[name] = said
    return found


def test_a_sample_of_hostile_files_is_read_or_refused(encoder, tmp_path):
    chosen = random.Random(0).sample(list(cases()), 16)
    assert failures(chosen, encoder, tmp_path) == {}


@pytest.mark.slow
def test_all_hostile_files_are_read_or_refused(encoder, tmp_path):
    assert failures(cases(), encoder, tmp_path) == {}
