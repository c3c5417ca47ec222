"""What of the libraries is shown on a terminal."""

import logging

from vlm_distill_cache.common.terminal.command_line import quiet_libraries


def test_notes_of_the_model_library_that_mean_nothing_are_left_out_and_no_others(caplog):
    quiet_libraries()
    notes = {
        "transformers.configuration_utils": "You are using a model of type `mobilevlm` to instantiate a model of type ``.",
        "transformers.modeling_utils": "LlavaForConditionalGeneration LOAD REPORT from: somewhere",
        "transformers.tokenization_utils_base": "Token indices sequence length is longer than the specified maximum (9 > 8).",
    }
    with caplog.at_level(logging.WARNING):
        for name, note in notes.items():
            logging.getLogger(name).warning(note)
            logging.getLogger(name).warning("of %s something else", name)
        logging.getLogger("ours").warning("You are using a model of type x")
    # Twice where the library did not propagate when the test began, and pytest listens to its logger and to the root.
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        *(f"of {name} something else" for name in notes),
        "You are using a model of type x",
    ]
