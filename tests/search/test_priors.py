import json
from pathlib import Path
from typing import Any

import pytest

from autotune.config.candidate import Candidate, Plan, Recipe, Shape
from autotune.errors import ConfigError
from autotune.search import priors


def test_expectations_add_up() -> None:
    eager, compiled = (Candidate(plan=Plan(compile=word)) for word in ("off", "block"))  # type: ignore[arg-type]
    speed, seconds = zip(*(priors.expected(candidate, "cpu") for candidate in (eager, compiled)), strict=True)
    assert speed[0] - speed[1] == pytest.approx(-0.30)
    assert seconds == (-0.7, 0.0)


def test_a_larger_shape_is_expected_to_be_slower() -> None:
    large = Candidate(recipe=Recipe(shape=Shape(n_layer=24)))
    assert priors.expected(large, "cuda")[0] < priors.expected(Candidate(), "cuda")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t["effects"].update({"compil=off": {"log_speed": 0.1, "log_seconds": 0.0}}),
            "did you mean 'compile'",
        ),
        (lambda t: t["effects"].update({"compile=of": {"log_speed": 0.1, "log_seconds": 0.0}}), "did you mean 'off'"),
        (lambda t: t["effects"]["compile=off"].pop("log_seconds"), "log_seconds is missing"),
        (lambda t: t["half_speed_tokens"].pop("cuda"), "half_speed_tokens.cuda is missing"),
        (lambda t: t["half_speed_tokens"].update(tpu=1.0), "half_speed_tokens has 'tpu'; allowed: cpu, cuda"),
        (lambda t: t.pop("provenance"), "provenance is missing"),
        (lambda t: t.update(effect={}), "did you mean 'effects'"),
    ],
)
def test_an_unknown_or_missing_key_is_refused_in_one_line(change: Any, said: str, tmp_path: Path) -> None:
    table = json.loads(Path(priors.__file__).with_name("priors.json").read_text())
    change(table)
    (tmp_path / "priors.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError) as caught:
        priors.read(tmp_path / "priors.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
