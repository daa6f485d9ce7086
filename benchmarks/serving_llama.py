"""llama.cpp as it is built for this processor, through `llama-cpp-python`: one job, in a process of its own.

serving.py runs it in .bench/llama: python serving_llama.py JOB RESULT
or, to make a smaller file of a GGUF file: python serving_llama.py --quantize FROM TO Q4_K_M

Its own server is not part of that package. The loop here batches as that server does, tokens of running answers
first and then as much of the prompts as fits, and leaves out the server's own work: HTTP, text and sampling.
"""

import ctypes
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

os.environ["LLAMA_CPP_LIB_PATH"] = str(Path(sys.prefix) / "build" / "bin")  # where serving_build.py puts it
import llama_cpp

from serving_job import WARM_UP, Answer, Ask, Job, Result
from training_job import peak_bytes

BATCH, PASS = 2048, 512
"""Tokens of one call and of one pass: the defaults of llama.cpp's server."""


class Streams:
    """A model with room for so many answers at a time.

    Args:
        job: What will be asked.
        count: Answers at a time.
    """

    def __init__(self, job: Job, count: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(job.gguf.encode(), model_parameters())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = count * (-(-job.longest // 256) * 256)
        settings.n_seq_max = count
        settings.n_batch, settings.n_ubatch = BATCH, PASS
        settings.n_threads = settings.n_threads_batch = job.threads
        settings.swa_full = False  # sliding layers keep their window only
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def answer(self, asks: list[Ask], outputs: int) -> list[Answer]:
        """Answer questions that come at the same moment."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        said: list[list[int]] = [[] for _ in asks]
        times: list[list[float]] = [[] for _ in asks]
        read = [0] * len(asks)
        began = time.perf_counter()
        while any(len(tokens) < outputs for tokens in said):
            places = self._fill(asks, said, read, outputs)
            if code := llama_cpp.llama_decode(self._context, self._batch):
                raise SystemExit(f"llama_decode: {code}")
            for place, stream in places:
                said[stream].append(self._best(place))
                times[stream].append(time.perf_counter() - began)
        return [Answer(at[0], at[-1], len(tokens), tokens) for at, tokens in zip(times, said, strict=True)]

    def _fill(
        self, asks: list[Ask], said: list[list[int]], read: list[int], outputs: int
    ) -> list[tuple[int, int]]:
        """Fill the batch; return the places that need scores, and whose they are."""
        self._batch.n_tokens, places = 0, []
        for stream, ask in enumerate(asks):
            if said[stream] and len(said[stream]) < outputs:
                position = len(ask.prompt) + len(said[stream]) - 1
                places.append((self._add(said[stream][-1], position, stream, wanted=True), stream))
        for stream, ask in enumerate(asks):
            for position in range(read[stream], len(ask.prompt)):
                if self._batch.n_tokens == BATCH:
                    return places
                wanted = position == len(ask.prompt) - 1
                place = self._add(ask.prompt[position], position, stream, wanted)
                read[stream] += 1
                if wanted:
                    places.append((place, stream))
        return places

    def _add(self, token: int, position: int, stream: int, wanted: bool) -> int:
        place = int(self._batch.n_tokens)
        self._batch.token[place], self._batch.pos[place] = token, position
        self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, stream
        self._batch.logits[place] = wanted
        self._batch.n_tokens = place + 1
        return place

    def _best(self, place: int) -> int:
        scores = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(scores, shape=(self._vocabulary,)).argmax())


def model_parameters() -> Any:
    """How a model is loaded."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    return parameters


def main(job: Job) -> Result:
    """Answer as the job says."""
    quiet()
    streams = Streams(job, len(job.asks))
    for burst in job.warm:
        streams.answer(burst, WARM_UP)
    answers = streams.answer(job.asks, job.outputs)
    return Result(answers, peak_bytes(), {"llama-cpp-python": version("llama-cpp-python")})


def quantize(source: str, target: str, kind: str) -> None:
    """Write a GGUF file with smaller weights."""
    quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"{source} cannot be made {kind}")


@llama_cpp.llama_log_callback
def _say_nothing(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Without this it tells all about the file."""


def quiet() -> None:
    """Keep the library from talking."""
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))


if __name__ == "__main__":
    if sys.argv[1] == "--quantize":
        quantize(*sys.argv[2:])
    else:
        main(Job.read(Path(sys.argv[1]))).write(Path(sys.argv[2]))
