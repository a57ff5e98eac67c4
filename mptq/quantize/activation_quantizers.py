"""ModelOpt's quantizers on a layer's activations: they collect amax, and then round activations as an engine would.

`mtq.quantize` puts an `ActivationQuantizer` before every linear and on every tensor that attention caches. `mtq.calibrate`
runs the stream of hidden states through the layer with the algorithm registered here, because ModelOpt's `max` gives all
experts the amax of the largest, and because none of its algorithms uses the percentile of its histogram calibrator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.tensor_quant import fp8_eager

from mptq.errors import CheckpointError
from mptq.quantize.fp8 import floored
from mptq.quantize.modelopt import E4M3, register_algorithm, silenced
from mptq.recipes.recipe import Calibration

CACHED = {
    "key": "self_attention.core_attention.k_bmm_quantizer",
    "value": "self_attention.core_attention.v_bmm_quantizer",
    "latent": "self_attention.latent_quantizer",
}
"""Cached tensor (`cached` of a layout) -> its quantizer in a layer. The latent and the shared key have one scale."""


class ActivationQuantizer(TensorQuantizer):  # type: ignore[misc]
    """Collects the magnitudes of activations, and rounds them to E4M3 with one static scale, amax / 448, as engines do.

    Rounds with the function that ModelOpt calls on a CPU: on a GPU it would first compile another one. With attributes of
    other formats it is ModelOpt's. `label` is for errors: ModelOpt's calibrators fail on NaN and infinity without a name.
    """

    # What the class adds is not part of ModelOpt's state, which its restore gives to its own class.
    _skip_properties_for_save_restore: ClassVar[set[str]] = TensorQuantizer._skip_properties_for_save_restore | {"label"}
    label = "activations"

    def collect(self, inputs: torch.Tensor) -> None:
        """Collects the magnitudes of `inputs` [any]; raises CheckpointError for values that are not finite."""
        if inputs.numel() and not all(map(torch.isfinite, torch.aminmax(inputs))):
            raise CheckpointError(f"{self.label}: the calibration data produces activations that are not finite")
        super().collect(inputs)

    def load(self, percentile: float | None) -> None:
        """Sets the amax, float32 [], to what has been collected; without any tokens (an expert) there is none."""
        collected = (getattr(self._calibrator, name, None) for name in ("_calib_amax", "_calib_hist"))
        if all(part is None for part in collected):
            return
        arguments = {} if percentile is None else {"method": "percentile", "percentile": percentile}
        self._set_buffer("_amax", self._calibrator.compute_amax(**arguments).float().reshape(()))

    def round_with(self, amax: torch.Tensor) -> None:
        """Rounds from now on, with the scale of `amax`, float32 []."""
        self._set_buffer("_amax", floored(amax))
        self.enable()
        self.enable_quant()

    def _fake_quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        static = self._num_bits == E4M3["num_bits"] and self._axis is None and not self._block_sizes and not self._dynamic
        calibrated = static and self.amax is not None
        rounded: torch.Tensor = fp8_eager(inputs, self._amax) if calibrated else super()._fake_quantize(inputs)
        return rounded


def _collect(layer: torch.nn.Module, forward_loop: Callable[[torch.nn.Module], None], percentile: float | None) -> None:
    """Runs `forward_loop`, while the enabled quantizers collect without rounding; afterwards all are disabled.

    The amax of each is that of its own tokens, or their percentile.
    """
    enable_stats_collection(layer)
    forward_loop(layer)
    for quantizer in layer.modules():
        if isinstance(quantizer, ActivationQuantizer) and quantizer.is_enabled:
            quantizer.load(percentile)
            quantizer.disable_calib()
            quantizer.disable()


register_algorithm("mptq_activations", _collect, percentile=(float | None, None))


def has_cache(attention: type[torch.nn.Module], name: str) -> None:
    """Registers a class of core attention with ModelOpt; its `forward` takes query, key and value, and caches the latter.

    K and V [sequence, batch, heads, dim] are as attention uses them: K after the rotary embedding. The quantizers, and so
    the state, are those of ModelOpt's class for Transformer Engine's core attention.
    """

    @QuantModuleRegistry.register({attention: name})
    class Quantized(QuantModule):  # type: ignore[misc]
        def _setup(self) -> None:
            self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer = (ActivationQuantizer() for _ in range(3))

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **more: Any) -> Any:
            query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
            return super().forward(query, key, value, *others, **more)

        def get_extra_state(self) -> None:
            """Returns nothing: torch requires the method on the class, and ModelOpt gives each object its own."""

        def set_extra_state(self, state: Any) -> None:
            """Does nothing, as `get_extra_state`."""

        def modelopt_post_restore(self, _prefix: str = "") -> None:
            """Does nothing: there is one scale per tensor, whatever the parallel layout."""


def has_latent_cache(attention: type[torch.nn.Module], name: str) -> None:
    """Registers a class of megatron-core's multi-latent attention with ModelOpt, for what engines cache of it.

    That is the latent [sequence, batch, rank] after its norm, and the shared key [sequence, batch, 1, dim] after RoPE.
    megatron-core passes the shared key as the end of every head's key, so it is taken from one head.
    """

    @QuantModuleRegistry.register({attention: name})
    class Quantized(QuantModule):  # type: ignore[misc]
        def _setup(self) -> None:
            quantizer, width = ActivationQuantizer(), self.config.qk_pos_emb_head_dim
            self.latent_quantizer = quantizer

            def rotated(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                query, key, *others = given
                if not quantizer.is_enabled:
                    return given
                shared = quantizer(key[..., :1, -width:])
                return query, torch.cat((key[..., :-width], shared.expand(*key.shape[:-1], -1)), dim=-1), *others

            self.kv_layernorm.register_forward_hook(lambda _module, _given, out: quantizer(out))
            self.core_attention.register_forward_pre_hook(rotated)


class ActivationQuantizers:
    """The quantizers of the inputs of the linears `names` of `layer`, and of its `cached` tensors (see `CACHED`).

    ModelOpt converts the layer, if there are any; all other quantizers in it are disabled. `where` is the layer's name,
    for errors.
    """

    def __init__(
        self, layer: torch.nn.Module, names: Collection[str], cached: Iterable[str], calibration: Calibration, where: str
    ) -> None:
        self.layer, self.calibration = layer, calibration
        places = {name: f"{name}.input_quantizer" for name in names} | {name: CACHED[name] for name in cached}
        if places:
            with silenced():
                mtq.quantize(layer, {"quant_cfg": self._rules(set(names), places.values()), "algorithm": None})
        self.quantizers: dict[str, Any] = {name: layer.get_submodule(place) for name, place in places.items()}
        for name, quantizer in self.quantizers.items():
            quantizer.label = f"{where}.{name}"

    def _rules(self, names: set[str], places: Iterable[str]) -> list[dict[str, Any]]:
        """Returns rules that enable the quantizers at `places`; few ones, because ModelOpt compares each with each module."""
        settings = E4M3 | {"calibrator": "max" if self.calibration.method == "max" else "histogram"}
        others = [name for name, module in self.layer.named_modules() if isinstance(module, torch.nn.Linear)]
        others = [name for name in others if name not in names]
        rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        if len(others) < len(names):
            rules.append({"quantizer_name": "*.input_quantizer", "cfg": settings})
            rules += ({"quantizer_name": f"{name}.input_quantizer", "enable": False} for name in others)
            places = (place for place in places if not place.endswith(".input_quantizer"))
        return rules + [{"quantizer_name": place, "cfg": settings} for place in places]

    def calibrate(self, forward_loop: Callable[[torch.nn.Module], None]) -> None:
        """Runs `forward_loop(layer)`, and collects the magnitudes of what passes through the layer, without changing it.

        Raises CheckpointError for activations that are not finite.
        """
        if not self.quantizers:
            forward_loop(self.layer)
            return
        with silenced():
            algorithm = {"method": "mptq_activations", "percentile": self.calibration.percentile}
            mtq.calibrate(self.layer, algorithm, forward_loop)

    def magnitudes(self) -> dict[str, torch.Tensor | None]:
        """Returns ModelOpt's amax, float32 [], of each tensor, or None for one that saw no tokens (an expert)."""
        return {name: getattr(quantizer, "_amax", None) for name, quantizer in self.quantizers.items()}

    def round_with(self, amax: Mapping[str, torch.Tensor]) -> None:
        """Rounds the tensors named in `amax` to E4M3, with scale amax / 448, whenever they pass through the layer."""
        for name, magnitude in amax.items():
            self.quantizers[name].round_with(magnitude)
