"""Which entry of a response belongs to which token of ours: all ids must agree, up to how often a picture's stands there.

A server's prompt holds a picture as one placeholder or as one token for each visual token, of which its version of the
processor may make another number. So a run of image tokens stands for a run of image tokens, and everything else must be equal.
Tokens behind the last supervised one are not compared: no row that is kept can see them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.imports.served import Distribution, Served


@dataclass(frozen=True, kw_only=True)
class Aligner:
    """Finds the distributions of a sample's supervised rows.

    Attributes:
        tokenizer: The teacher's, to name tokens in errors.
        image_token_id: Id at visual positions.
        vocabulary: Ids from here on are no tokens, nor are those below 0: some programs mark a picture's positions so.
    """

    tokenizer: Any
    image_token_id: int
    vocabulary: int

    def distributions(self, sample: EncodedSample, served: Served) -> list[Distribution]:
        """The distributions of a sample's supervised rows, in order.

        Raises:
            SampleError: The response is of other tokens, or ends too early, or has no distribution for a row.
        """
        if sample.is_packed:
            raise SampleError(
                "it holds independent questions about one picture, which this project reads in one pass and a server does not; "
                "give data with one question a sample (a LLaVA .json or messages .jsonl)"
            )
        targets = [int(row) + 1 for row in sample.supervised_rows]
        if len(served.tokens) <= targets[-1] and served.more is not None:
            served = served.joined()
        places = self._whole(sample, served, targets) if served.whole else self._answer(sample, served, targets)
        found = []
        for target, place in zip(targets, places, strict=True):
            distribution = served.distribution(place)
            if distribution is None:
                raise SampleError(
                    f"there are no log-probabilities of token {target}, {self._named(int(sample.input_ids[target]))}, which "
                    "belongs to an answer; have the server write those of the whole prompt (vLLM: prompt_logprobs=K, and no prefix "
                    "caching; SGLang: logprob_start_len=0)"
                )
            found.append(distribution)
        return found

    def _whole(self, sample: EncodedSample, served: Served, targets: Sequence[int]) -> list[int]:
        """The places of some of our tokens in a response that begins with the prompt."""
        ours, theirs = sample.input_ids.tolist(), served.tokens
        i = j = 0
        places = {}
        while i <= targets[-1]:
            if ours[i] == self.image_token_id:
                count, found = _run(ours, i, self.image_token_id), self._stand_ins(served, j)
                if not found:
                    raise self._differ(sample, served, i, j)
                # A token behind the picture may look like a stand-in.
                behind = ours[i + count : i + found]
                j += count if found > count and behind == list(theirs[j + count : j + found]) else found
                i += count
                continue
            if j >= len(theirs) or theirs[j] not in (ours[i], None):
                raise self._differ(sample, served, i, j)
            places[i] = j
            i, j = i + 1, j + 1
        return [places[target] for target in targets]

    def _stand_ins(self, served: Served, start: int) -> int:
        """How many tokens of a picture a response has from one of its places on."""
        end = start
        while end < len(served.tokens):
            token = served.tokens[end]
            unknown = token is None and end == 0  # of the first token there is no distribution that would name it
            if not unknown and not self._stands_in(served, token):
                break
            end += 1
        return end - start

    def _stands_in(self, served: Served, token: int | None) -> bool:
        return token is not None and (
            token == self.image_token_id or not 0 <= token < self.vocabulary or token in served.stand_ins
        )

    def _answer(self, sample: EncodedSample, served: Served, targets: Sequence[int]) -> list[int]:
        """The places of the answer's tokens in a response that holds the answer alone."""
        if targets[-1] - targets[0] >= len(targets):
            raise SampleError(
                "the response holds one generated answer, the sample has several; only the whole prompt's log-probabilities "
                "(vLLM: prompt_logprobs) tell those of all answers"
            )
        ours = sample.input_ids
        for place, target in enumerate(targets):
            if place >= len(served.tokens):
                raise self._ended(sample, served, target)
            if served.tokens[place] not in (int(ours[target]), None):
                raise SampleError(
                    f"answer token {place + 1} is {self._named(served.tokens[place])} in the response, "
                    f"{self._named(int(ours[target]))} in the data; the data's answers must be those that were generated"
                )
        return list(range(len(targets)))

    def _differ(self, sample: EncodedSample, served: Served, i: int, j: int) -> SampleError:
        """The error about the first token in which a response differs."""
        theirs, ours = served.tokens, sample.input_ids.tolist()
        if j >= len(theirs):
            return self._ended(sample, served, i)
        bos = self.tokenizer.bos_token_id
        if j == 1 and bos is not None and theirs[0] == theirs[1] == bos != ours[1]:
            return SampleError(
                f"the server's prompt begins with {self._named(bos)} twice: its chat template writes it and its tokenizer adds it "
                "again; with vLLM send the text with add_special_tokens=false, or token ids"
            )
        expected = "the picture" if ours[i] == self.image_token_id else self._named(ours[i])
        found = "the picture" if self._stands_in(served, theirs[j]) else self._named(theirs[j])
        hint = ""
        if ours[i] == self.image_token_id or found == "the picture":
            hint = "; the server was given another picture, or none, or the prompt of another template"
        return SampleError(
            f"the server's prompt differs at its token {j}: {found}, our token {i} is {expected}{hint}; the prompt must be "
            f"what this project writes of the sample (--set template=...), token by token"
        )

    def _ended(self, sample: EncodedSample, served: Served, i: int) -> SampleError:
        token = int(sample.input_ids[i])
        what = "the end of the answer" if i == int(sample.supervised_rows[-1]) + 1 else "more"
        return SampleError(
            f"the response ends after {len(served.tokens)} tokens, where {what} should follow: {self._named(token)} (our token "
            f"{i}); have the server read or write the whole answer with its end token"
        )

    def _named(self, token: int | None) -> str:
        """A token's id and text."""
        if token is None:
            return "an unknown token"
        text = None if not 0 <= token < len(self.tokenizer) else self.tokenizer.convert_ids_to_tokens(token)
        return f"{token}" if text is None else f"{token} ({one_line(repr(text), limit=40)})"


def _run(ids: Sequence[int], start: int, token: int) -> int:
    """How often a token stands in a row from a place on."""
    end = start
    while end < len(ids) and ids[end] == token:
        end += 1
    return end - start
