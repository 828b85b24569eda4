"""A search without clock and files: what a sampler proposes, trial after trial, against the formula machine."""

from collections.abc import Callable
from dataclasses import replace

import optuna
from fake_machine import CUDA, answer

from autotune.config.candidate import Candidate
from autotune.config.search_settings import SearchSettings
from autotune.environment import Environment
from autotune.measure.types import TrialRequest, TrialResult
from autotune.memory.model import MemoryModel, calibrate
from autotune.runs.objective import maximised, score
from autotune.runs.records import TrialRecord
from autotune.search import study_trials
from autotune.search.propose import Proposer
from autotune.search.space import baseline, build_space

Answer = Callable[[Candidate], TrialResult]

SMALL = (
    "micro_batch_size=4,8,16,32,64", "attention=sdpa,sdpa_cudnn", "loss=full,chunked", "loss_chunk_tokens=1024,4096",
    "activation_checkpointing=none,block", "compile=off,full,block", "dtype=bfloat16", "allocator=default",
)  # fmt: skip
"""180 plans, whatever else there will be to choose from."""


def formulas(asked: SearchSettings) -> Answer:
    def measure(candidate: Candidate) -> TrialResult:
        limit = asked.memory_limit_bytes
        request = TrialRequest(candidate=candidate, device="cuda:0", result_path="", memory_limit_bytes=limit)
        return replace(answer(request), trial_seconds=5.0)

    return measure


class Trials:
    """An in-memory study whose sampler is asked and told."""

    def __init__(self, asked: SearchSettings, answers: Answer | None = None, environment: Environment = CUDA) -> None:
        self.asked, self.answers = asked, answers or formulas(asked)
        direction = "maximize" if maximised(asked) else "minimize"
        self.study = optuna.create_study(storage="sqlite://", direction=direction)
        self.proposer = Proposer(self.study, build_space(asked, environment), asked, environment)
        self.records: list[TrialRecord] = []

    def model(self) -> MemoryModel:
        return calibrate("cuda", [(record.candidate, record.result) for record in self.records])

    def propose(self) -> tuple[study_trials.OpenTrial | None, Candidate] | None:
        return self.proposer.propose(self.records, self.model())

    def run(self, count: int) -> "Trials":
        """The baseline first, then what the sampler proposes, until there are `count` records."""
        while len(self.records) < count:
            if self.records:
                proposal = self.propose()
                assert proposal is not None
                trial, candidate = proposal
            else:
                trial, candidate = None, baseline(self.asked)
            self.end(self.proposer.claim(candidate, {}, trial), candidate)
        return self

    def end(self, trial: study_trials.OpenTrial, candidate: Candidate) -> None:
        assert candidate.id not in {record.candidate.id for record in self.records}
        result = self.answers(candidate)
        speed = result.tokens_per_second if result.status == "ok" else None
        objective = score(self.asked, candidate, speed) if speed else None
        record = TrialRecord(trial=trial.number, role="search", candidate=candidate, result=result, objective=objective)
        study_trials.tell(self.study, trial, record, self.asked.memory_limit_bytes)
        self.records.append(record)

    def best(self, count: int | None = None) -> float:
        """Largest objective of the first `count` trials; a loss counts negative."""
        sign = 1.0 if maximised(self.asked) else -1.0
        return max(sign * r.objective for r in self.records[:count] if r.objective is not None)
