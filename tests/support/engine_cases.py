"""The cases for which an installed vLLM is recorded, and the path of the record.

python -m tests.support.engine_cases DIR                                        # a config.json for each case
VLLM_ENV/bin/python scripts/record_vllm.py DIR tests/support/vllm_models.json   # in the environment of scripts/check_vllm.sh
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptq.model import engines
from mptq.plan.plan import Plan
from tests.support.models import FAMILY_ARGS
from tests.support.planning import MODELS, planned, whole

RECORD = Path(__file__).parent / "vllm_models.json"
RECIPES = ("fp8-blockwise", "fp8-per-channel", "fp8")
"""One for each of the dialects, whose exclude lists are read by different code in engines."""


@dataclass(frozen=True)
class Case:
    """A plan, and the numbers of tensor-parallel ranks for which vLLM builds it."""

    plan: Plan
    ranks: tuple[int, ...] = (1,)

    @property
    def digest(self) -> str:
        """Hash of the quantization config in config.json."""
        config: dict[str, Any] = self.plan.layouts["hf"].dialect.config(self.plan.layouts["hf"].contents)
        fields = {key: value for key, value in config.items() if key != "producer"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def cases() -> dict[str, Case]:
    """Every family in every dialect, with alternating halves of its fused groups ignored; known models in blocks."""
    found = {}
    for family in FAMILY_ARGS:
        args = whole(family)
        model = planned(args, "fp8-blockwise").model
        groups = {group.patterns: None for layer in range(model.num_layers) for group in engines.groups(model, layer).values()}
        for start, half in enumerate(("even", "odd")):
            patterns = [pattern for patterns in list(groups)[start::2] for pattern in patterns]
            found |= {f"{family} {recipe} {half}": Case(planned(args, recipe, *patterns)) for recipe in RECIPES}
    return found | {name: Case(planned(args, "fp8-blockwise"), (1, 2, 4, 8)) for name, args in MODELS.items()}


def main(folder: Path) -> None:
    from mptq.formats.hf.writer import hf_configs
    from mptq.model.generation import Generation

    index = {}
    for number, (name, case) in enumerate(cases().items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        configs = hf_configs(case.plan.layouts["hf"], Generation({}, {}))
        for file, config in configs.items():
            (place / file).write_text(json.dumps(config))
        index[name] = {"folder": str(number), "digest": case.digest, "ranks": case.ranks}
    (folder / "cases.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
