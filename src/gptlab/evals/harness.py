"""EleutherAI's lm-eval on a gptlab model, in the same process: no export, the same scores.

lm-eval is an optional dependency (`pip install 'gptlab[harness]'`), so this module is imported only where it is used.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from gptlab.data.tokenizers import END_OF_TEXT, Tokenizer
from gptlab.errors import ConfigError, DataError, UserError
from gptlab.evals.likelihood import Ids, Likelihood, encode_pairs, end_of_text, lay_out, likelihoods, rolling_pairs
from gptlab.model.decoding import Decoder
from gptlab.model.generate import pick_token, uniforms
from gptlab.model.gpt import GPT
from gptlab.progress import Count, tell_nobody
from gptlab.seeding import address

# lm-eval bootstraps standard errors in a pool of forked processes. Ending such a pool can hang, as a terminated worker
# may hold a semaphore that another worker waits for. 1,000 draws need no pool.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


class HarnessLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's interface of a language model. The answers are those of lm-eval's own `hf` model.

    Args:
        tokenizer: needs an end-of-text token.
        context: returns the autocast context of a forward pass.
        micro_batch: a pass has at most micro_batch * block_size tokens.
        before_batch: called with the number of batches, or of generated answers, that are done and of all.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        device: torch.device,
        context: Callable[[], AbstractContextManager[object]],
        micro_batch: int,
        before_batch: Count = tell_nobody,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self._device, self.context = model, tokenizer, device, context
        self.micro_batch, self.block_size = micro_batch, model.config.block_size
        self.before_batch = before_batch
        self.eot = end_of_text(tokenizer)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation given its context, and whether greedy decoding gives it."""
        texts = [request.args for request in requests]
        pairs = encode_pairs(self.tokenizer, texts, lambda i: f"task {requests[i].task_name}")
        for (_, ids), request in zip(pairs, requests, strict=True):
            if len(ids) > self.block_size:
                raise DataError(
                    f"task {request.task_name}: cannot score an answer of {len(ids)} tokens with "
                    f"model.block_size = {self.block_size}"
                )
        measured = self._likelihoods(pairs)
        return [(-float(loss), bool(greedy)) for loss, greedy in zip(*measured, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of the text of each request."""
        texts = [
            rolling_pairs(self.tokenizer, request.args[0], self.block_size, f"task {request.task_name}")
            for request in requests
        ]
        if not any(texts):
            return [0.0] * len(texts)
        losses = iter(self._likelihoods([pair for pairs in texts for pair in pairs]).losses.tolist())
        return [-sum(itertools.islice(losses, len(pairs))) for pairs in texts]

    def _likelihoods(self, pairs: Sequence[tuple[Ids, Ids]]) -> Likelihood:
        laid = lay_out(pairs, self.block_size)
        return likelihoods(self.model, laid, self._device, self.context, self.micro_batch, self.before_batch)

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's continuation of each request's context, up to a stop sequence; greedy unless the task samples."""
        answers = [""] * len(requests)
        prompts = [self.tokenizer.encode(request.args[0]) or [self.eot] for request in requests]
        groups: dict[str, list[int]] = {}
        done = 0
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            settings = dict(normalize_gen_kwargs(requests[members[0]].args[1]))
            until = handle_stop_sequences(settings["until"], eos=END_OF_TEXT)
            n_new = settings["max_gen_toks"]
            if n_new >= self.block_size:
                raise DataError(
                    f"task {requests[members[0]].task_name}: cannot generate {n_new} tokens with "
                    f"model.block_size = {self.block_size}"
                )
            members.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(members), self.micro_batch):
                self.before_batch(done, len(requests))
                chosen = members[start : start + self.micro_batch]
                done += len(chosen)
                cut = [prompts[i][-(self.block_size - n_new) :] for i in chosen]
                for i, ids in zip(chosen, self._continue(cut, chosen, n_new, until, settings), strict=True):
                    answers[i] = postprocess_generated_text(self.tokenizer.decode(ids), until, None)
        return answers

    def _continue(
        self, prompts: list[list[int]], which: list[int], n_new: int, until: list[str], settings: dict[str, Any]
    ) -> list[list[int]]:
        """Generate up to n_new ids after each prompt, without the end-of-text token.

        The numbers of the requests (`which`) seed their random numbers.
        """
        temperature = float(settings.get("temperature", 1.0)) if settings["do_sample"] else 0.0
        top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
        draws = uniforms([address("harness", i) for i in which])
        B, n_ids = len(prompts), min(self.tokenizer.vocab_size, self.model.config.vocab_size)
        written: list[list[int]] = [[] for _ in prompts]
        done = [False] * B
        with self.context():  # one for all tokens: autocast casts the weights anew in each
            decoder = Decoder(self.model, B, max(map(len, prompts)) + n_new, n_new)
            logits = decoder.read(prompts)  # (B, V)
            while True:
                own = next(draws).to(self._device)  # (B,)
                picked = pick_token(logits[:, :n_ids].float(), temperature, top_k, top_p, own)
                for b, index in enumerate(picked.tolist()):
                    if done[b]:
                        continue
                    if index == self.eot:
                        done[b] = True
                        continue
                    written[b].append(index)
                    text = self.tokenizer.decode(written[b])
                    done[b] = len(written[b]) == n_new or any(end in text for end in until)
                if all(done):
                    return written
                logits = decoder.step(picked)


def run_harness(lm: HarnessLM, tasks: Sequence[str]) -> dict[str, float]:
    """Run tasks of lm-eval.

    Args:
        lm: the model.
        tasks: names of lm-eval's tasks, or paths of YAML files.

    Returns:
        `<task>_harness_<metric>`, its standard error `<task>_harness_<metric>_stderr`, and `<task>_harness_samples`.
        A filter other than `none` is appended: `gsm8k_harness_exact_match_strict-match`.

    Raises:
        ConfigError: lm-eval has no such task.
        DataError: a task cannot be loaded, its data is missing, or it does not fit the model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    named = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(named))  # the defaults are thousands of files and slow to read
    for task in named:
        if task not in manager.all_tasks:
            raise ConfigError(f"lm-eval has no task {task}. `lm-eval ls tasks` lists the names; a YAML file also works")
    try:
        found = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, log_samples=False, bootstrap_iters=1000)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        says = str(error).strip().split("\n")[0]
        raise DataError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {says}") from None
    scores: dict[str, float] = {}
    for task, measured in found["results"].items():
        for key, value in measured.items():
            metric, comma, chosen = key.partition(",")
            if comma and isinstance(value, (int, float)):
                scores[f"{task}_harness_{metric}" + ("" if chosen == "none" else f"_{chosen}")] = float(value)
        if task in found["n-samples"]:
            scores[f"{task}_harness_samples"] = found["n-samples"][task]["effective"]
    return scores
