"""What the hub's library raises becomes what may pass, or a refusal that says what can be done about it."""

import pytest

from vlm_distill_cache.common.errors import ConfigError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.remotes.hub import sorted_hub_errors
from vlm_distill_cache.common.remotes.streams import PassingError


def answered(status: int) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import _http

    httpx = next(found for name in ("httpx2", "httpx") if (found := getattr(_http, name, None)))  # by its version
    response = httpx.Response(status, request=httpx.Request("PUT", "https://hub/x"))
    return HfHubHTTPError(f"{status} Client Error for url: https://hub/x", response=response)


@pytest.mark.parametrize(
    "status", [400, 401, 403, 404, 405, 408, 409, 411, 412, 413, 416, 418, 422, 429, 500, 501, 503, 507]
)
def test_an_answer_means_the_same_while_a_large_file_goes_up(status: int):
    outcomes = []
    for wrapped in (False, True):
        try:
            with sorted_hub_errors("org/name", "log in"):
                if wrapped:  # as the library tells of large files
                    raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from answered(status)
                raise answered(status)
        except (PassingError, TransferError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    kind, words = outcomes[0]
    assert (kind is PassingError) is (status in (408, 409, 412, 429, 500, 503))
    assert AGAIN not in words  # the same would be answered again
    assert ("log in" in words) is (status in (401, 403, 404))


def test_a_token_that_no_header_can_hold_is_named():
    refused = pytest.raises(ConfigError, match=r"org/name: the token for the hub .*set HF_TOKEN again")
    with refused, sorted_hub_errors("org/name", "log in"):
        "\u00fcSECRET".encode("ascii")
