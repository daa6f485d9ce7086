"""What has become of one candidate: tokens in, chunks out."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from tunesmith.engines.base import Chunk, Place, Sampling, TokenLogprob
from tunesmith.engines.sampling import Chosen
from tunesmith.engines.text_stream import UNFINISHED, TextStream


class Answer:
    """One candidate's text and tokens so far.

    Args:
        tokenizer: The model's.
        opening: Text that opens an answer and is not part of it.
        sampling: How its tokens are chosen.
    """

    def __init__(self, tokenizer: Tokenizer, opening: str, sampling: Sampling) -> None:
        self.text = TextStream(tokenizer, opening, sampling.stop_sequences)
        self.tokens = 0
        self._tokenizer = tokenizer
        self._told = sampling.logprobs is not None
        self._places: list[Place] = []

    def push(self, tokens: Sequence[Chosen]) -> str:
        """Take tokens, up to the one that meets a stop sequence, and return the text that has become certain."""
        certain = []
        for chosen in tokens:
            self.tokens += 1
            if self._told:
                top = tuple(self._named(token, logprob) for token, logprob in chosen.top)
                self._places.append(Place(self._named(chosen.token, chosen.logprob), top))
            certain.append(self.text.push(chosen.token))
            if self.text.stopped:
                break
        return "".join(certain)

    def chunk(self, text: str, prompt_tokens: int, index: int, finish_reason: int = 0) -> Chunk:
        """Return a chunk with the text and the tokens since the one before."""
        places, self._places = tuple(self._places), []
        return Chunk(text, prompt_tokens, self.tokens, finish_reason, index, places)

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if UNFINISHED in text:  # part of a character
            text = self._tokenizer.id_to_token(token) or ""
        return TokenLogprob(token, text, logprob)
