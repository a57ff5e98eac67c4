"""Translates ModelOpt's built-in recipes and configs to fields of an mptq recipe if their format is FP8."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from mptq.errors import RecipeError
from mptq.recipes.algorithms import require_known

_WEIGHTS: dict[str, dict[str, Any]] = {
    "tensor": {"weights": {"scale": "tensor"}, "hf": "compressed-tensors"},
    "row": {"weights": {"scale": "row"}, "hf": "compressed-tensors"},
    "block": {"weights": {"scale": "block", "block_size": 128}, "hf": "deepseek-fp8"},
    "mx": {"weights": {"scale": "mx", "block_size": 32}, "hf": "modelopt"},
}
_STATIC = {"activations": "static", "hf": "modelopt"}
_MEANINGS: dict[str, dict[str, dict[str, Any]]] = {
    "*weight_quantizer": _WEIGHTS,
    "*input_quantizer": {"tensor": _STATIC, "token": {}, "mx": {}},
    "*[kv]_bmm_quantizer": {"tensor": {"kv_cache": "fp8"}},
}
"""Pattern of quantizers that mptq knows -> granularity of the scales -> the equivalent fields of a recipe."""
_E4M3 = (4, 3)
_END = "_CFG"


def recipe_fields(name: str) -> dict[str, Any]:
    """Returns the fields for a ModelOpt config (`*_CFG`) or a built-in ModelOpt recipe (a name with a slash).

    Raises RecipeError if there is none of that name, or naming everything in it that mptq's FP8 quantization does not
    support.
    """
    config = _config(name) if name.endswith(_END) else _built_in(name)
    return _translated(name, config)


def _suggestion(near: list[str]) -> str:
    """Suggests similar names, or says where to find names if there are none."""
    return f"did you mean {', '.join(near)}?" if near else "see `mptq recipes` for mptq's own"


def _config(name: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    found = getattr(mtq, name, None)
    if not isinstance(found, dict):
        known = [known for known in dir(mtq) if known.endswith(_END)]
        # Compared without the common suffix, which makes all names similar.
        stems = difflib.get_close_matches(name.removesuffix(_END), [name.removesuffix(_END) for name in known])
        raise RecipeError(f"ModelOpt has no config {name}: {_suggestion([stem + _END for stem in stems])}")
    return found


def built_in_names() -> list[str]:
    """Returns the names of ModelOpt's built-in recipes, without the files that they import."""
    import modelopt_recipes

    root = Path(modelopt_recipes.__path__[0])
    recipes = [path for path in sorted(root.glob("**/ptq/*.yaml")) if "\nmetadata:\n" in path.read_text()]
    return [path.relative_to(root).with_suffix("").as_posix() for path in recipes]


def _built_in(name: str) -> dict[str, Any]:
    import contextlib
    import io

    from modelopt.recipe import load_recipe

    known = built_in_names()
    if name not in known:
        near = _suggestion(difflib.get_close_matches(name, known))
        raise RecipeError(f"ModelOpt has no recipe {name}: {near} (a recipe file's name ends in .yaml)")
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = load_recipe(name)
    found: dict[str, Any] = recipe.quantize.model_dump()
    return found


def _translated(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Translates `quant_cfg`, a list of rules in which later ones override earlier ones.

    Supported are rules for all linears, and rules that disable some.
    """
    fields: dict[str, Any] = {"name": name.rpartition("/")[2], "description": f"ModelOpt's {name}"}
    problems: list[str] = []
    problems += _read_algorithm(config.get("algorithm"), fields)
    overrides, troubles = [], dict[str, list[str]]()
    for rule in config["quant_cfg"]:
        pattern, settings = rule["quantizer_name"], rule.get("cfg")
        if settings is not None and rule.get("enable", True):
            trouble = _read_quantizer(pattern, settings, fields)
            if trouble:
                troubles.setdefault(trouble, []).append(pattern)
        elif pattern != "*" and not rule.get("parent_class"):
            overrides += _switched_off(pattern)
    problems += (f"{', '.join(dict.fromkeys(patterns))} has {trouble}" for trouble, patterns in troubles.items())
    if "weights" not in fields and not problems:
        problems.append("it quantizes no weights")
    if problems:
        raise RecipeError(f"mptq does not support ModelOpt's {name}: {'; '.join(problems)}")
    if overrides:
        fields["overrides"] = overrides
    return fields


_MSE = {"method": "mse", "start_multiplier": 0.25, "stop_multiplier": 4.0, "step_size": 0.1, "fp8_scale_sweep": False}
"""The defaults of ModelOpt's MseCalibConfig."""
_GPTQ = {"method": "gptq", "perc_damp": 0.01, "block_size": 128, "fused": False}
"""The defaults of ModelOpt's GPTQCalibConfig. mptq's own GPTQ, which is used instead, damps by the number of tokens."""
_ANY_ORDER = {"layerwise", "skip_forward_without_activation_calib"}
"""What an algorithm says about the order of the work, which mptq does layer by layer, where needed, in any case."""


def _read_algorithm(given: Any, fields: dict[str, Any]) -> list[str]:
    """Adds the field `algorithm` to `fields` if it is not the default; returns what is not supported."""
    wanted = given if isinstance(given, dict) else {"method": given}
    wanted = {key: value for key, value in wanted.items() if key not in _ANY_ORDER}
    wanted["method"] = method = wanted.get("method") or "max"
    if method == "gptq":
        fields["rounding"] = method
        return [f"algorithm gptq has {key} {value}" for key, value in wanted.items() if value != _GPTQ.get(key)]
    try:
        require_known(method)
    except ValueError as error:
        return [f"algorithm {error}"]
    if (method == "max" and len(wanted) > 1) or (method == "mse" and _MSE | wanted != _MSE):
        settings = ", ".join(f"{key} {value}" for key, value in wanted.items() if key != "method")
        return [f"algorithm {method} has {settings}"]
    if method != "max":
        fields["algorithm"] = method
    return []


def _switched_off(pattern: str) -> list[dict[str, Any]]:
    """Returns overrides for a rule that disables some weight quantizers, optional because it covers many architectures.

    ModelOpt matches names of quantizers but mptq those of linears, so `*q_proj.*` must match `q_proj` itself too.
    """
    if pattern.endswith("input_quantizer"):
        return []
    modules = pattern.removesuffix("weight_quantizer").removesuffix(".")
    patterns = [modules, modules.removesuffix(".*")] if modules.endswith(".*") else [modules]
    return [{"pattern": found, "recipe": "none", "optional": True} for found in patterns]


def _read_quantizer(pattern: str, settings: Any, fields: dict[str, Any]) -> str | None:
    """Adds the fields of a rule for all weights, inputs or KV caches to `fields`; returns what is not supported, if any."""
    if isinstance(settings, list):
        return " and then ".join(map(_words, settings))
    kind = _kind(settings)
    if kind is None:
        return _words(settings)
    if settings.get("use_constant_amax") or settings.get("constant_amax") is not None:
        return "a constant amax, not a calibrated one"
    meant = _MEANINGS.get(pattern, {}).get(kind)
    if meant is None:
        return f"scales of a {kind}"
    fields |= meant
    return None


def _words(settings: Any) -> str:
    """Names a format: the bits of an integer or of exponent and mantissa, and the size of its blocks."""
    bits, blocks = settings.get("num_bits"), settings.get("block_sizes") or {}
    name = f"INT{bits}" if isinstance(bits, int) else "E{}M{}".format(*bits)
    sizes = "x".join(str(size) for key, size in sorted(blocks.items(), key=str) if isinstance(key, int) and size)
    return f"{name} in blocks of {sizes}" if sizes else name


def _kind(settings: dict[str, Any]) -> str | None:
    """Returns the granularity of the scales: tensor, row, token (dynamic), block or mx; None if it is not FP8."""
    bits = settings.get("num_bits")
    if isinstance(bits, int) or tuple(bits or ()) != _E4M3:
        return None
    blocks = {key: value for key, value in (settings.get("block_sizes") or {}).items() if value is not None or key == -1}
    if not blocks:
        return {None: "tensor", 0: "row"}.get(settings.get("axis"))
    sizes = {key: value for key, value in blocks.items() if key in (-1, -2)}
    if tuple(blocks.get("scale_bits") or ()) == (8, 0):
        return "mx" if sizes == {-1: 32} else None
    if sizes == {-1: None}:
        return "token" if "dynamic" in (settings.get("type"), blocks.get("type")) else None
    return "block" if sizes == {-1: 128, -2: 128} else None
