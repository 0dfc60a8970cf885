"""lm-evaluation-harness (EleutherAI) through its model interface: any of its tasks on a model of ours.

An optional dependency: the adapter itself works without the package, only `evaluate` needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from parallel.config import guess
from pretrain.evaluate.subject import Pair, Subject, score_continuations
from pretrain.evaluate.tasks import require_harness
from pretrain.evaluate.windows import windows
from pretrain.generate import generate

MAX_NEW_TOKENS = 256  # the harness's own default for tasks that set none

try:
    from lm_eval.api.model import LM as _Interface
except ImportError:
    _Interface = object


class Adapter(_Interface):
    """The harness's `LM`. A request's `args` are the texts that it is about.

    Every text is begun with the token that begins a document, as in training. Longer texts than the context lose their beginning,
    except in loglikelihood_rolling, which scores all of a text in windows.
    """

    def __init__(self, subject: Subject, advance: Callable[[int], None] = lambda count: None):
        super().__init__()
        self.subject, self.advance = subject, advance

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For (context, continuation): log-probability of the continuation in nats, and whether greedy decoding writes it."""
        pairs = [self._pair(*request.args) for request in requests]
        scores = score_continuations(self.subject, pairs, self.advance)
        return [self._remember("loglikelihood", r, (s.log_probability, s.greedy)) for r, s in zip(requests, scores)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For (text,): log-probability of the whole text in nats. Windows do not overlap, as the harness defines it, but for the
        last one, which is as long as the others.
        """
        context, tokenizer = self.subject.context, self.subject.tokenizer
        results = []
        for request in requests:
            ids = [tokenizer.bos, *tokenizer.encode(request.args[0])]
            pairs: list[Pair] = [
                (ids[w.start : w.scored + 1], ids[w.scored + 1 : w.end + 1])
                for w in windows(len(ids) - 1, context, context)
            ]
            total = sum(score.log_probability for score in score_continuations(self.subject, pairs))
            results.append(self._remember("loglikelihood_rolling", request, total))
            self.advance(1)
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For (context, options): the text written after the context, up to the first of options["until"]."""
        tokenizer, limit = self.subject.tokenizer, self.subject.context
        results = []
        for request in requests:
            text, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            new = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
            prompt = [tokenizer.bos, *tokenizer.encode(text)][-max(limit - new, limit // 2, 1) :]
            (ids,) = generate(
                self.subject.model,
                prompt,
                tokens=new,
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                top_k=options.get("top_k"),
                top_p=options.get("top_p"),
                end=tokenizer.eos,
                vocabulary=tokenizer.vocabulary_size,
                stop=partial(self._stops, until),
            )
            written = tokenizer.decode(ids)
            found = cut(written, until)
            results.append(self._remember("generate_until", request, written if found is None else found))
            self.advance(1)
        return results

    def _stops(self, until: Sequence[str], ids: list[int]) -> bool:
        return cut(self.subject.tokenizer.decode(ids), until) is not None

    def _pair(self, context: str, continuation: str) -> Pair:
        tokenizer = self.subject.tokenizer
        stripped = context.rstrip()
        # As the harness does it: spaces belong to the word that follows, and the border is where the context's own ids would end.
        context, continuation = stripped, context[len(stripped) :] + continuation
        whole, given = tokenizer.encode(context + continuation), tokenizer.encode(context)
        if not whole:
            raise ValueError("a request has neither context nor continuation; mend the task that made it")
        border = min(len(given), len(whole) - 1)
        return [tokenizer.bos, *whole[:border]], whole[border:]

    def _remember(self, kind: str, request: Any, answer: Any) -> Any:
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, request.args, answer)
        return answer


def cut(text: str, until: Sequence[str]) -> str | None:
    """`text` before the first of the stop strings; None if none occurs."""
    found = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(found)] if found else None


def evaluate(
    subject: Subject,
    names: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Runs tasks of the harness: task -> measure ("acc,none", "acc_stderr,none", ...) -> value.

    folder: with more task definitions (YAML), subfolders included. limit: examples of each task. fewshot: overrides the tasks'
    own number of examples in the prompt. Raises Exit when the harness is missing, ValueError for a task that it does not know.
    """
    require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            known = list(manager.all_tasks)
            raise ValueError(
                f"lm_eval knows no task {name!r}; {guess(name, known)}it lists {len(known)} with: lm-eval ls tasks; "
                "add your own with --lm-eval-tasks FOLDER"
            )
    found = simple_evaluate(
        model=Adapter(subject, advance),
        tasks=list(names),
        num_fewshot=fewshot,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None, "only ranks other than 0 get nothing"
    return {
        task: {key: value for key, value in measures.items() if isinstance(value, int | float)}
        for task, measures in found["results"].items()
    }
