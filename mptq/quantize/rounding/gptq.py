"""GPTQ: codes that compensate each other's errors in the outputs of a linear, given the second moment of its inputs.

Sources: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (2022,
arXiv 2210.17323), for the method; the order by descending diagonal is its `act_order`. Here the second moment H is
factored as U D U' (U unit upper triangular) instead of inverted, which gives the same numbers: with e the error of a row,
e H e' = sum_k D_k (e_k + sum_{i<k} e_i U_ik)^2, so column k is best rounded from its target plus what the earlier errors
add to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mptq.errors import CheckpointError
from mptq.quantize.quantizer import thread_pool
from mptq.quantize.rounding.scales import nearest

BLOCK = 128
"""Columns that are rounded before their errors are fed to the rest in one product."""
_ROWS = 32
"""Rows of a task: enough to amortize its start."""
DEAD = 1e-12
"""Inputs whose mean square is below this share of the average are as good as zero."""


def dead_inputs(moment: torch.Tensor) -> torch.Tensor:
    """Returns which inputs are as good as zero, bool [in], by their second moment [in, in]."""
    diagonal = moment.diagonal()
    return diagonal <= DEAD * diagonal.mean()


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns a copy of a second moment [in, in] with `damping` times the mean diagonal added to it, fit to be factored.

    Inputs that are zero have no influence on others: their rows and columns become those of a unit matrix.
    """
    mean, dead = moment.diagonal().mean(), dead_inputs(moment)
    result = moment.clone()
    result[dead, :] = 0
    result[:, dead] = 0
    result.diagonal().add_(damping * mean)
    result.diagonal()[dead] = 1
    return result


@dataclass(frozen=True, slots=True)
class Curvature:
    """A damped second moment of inputs, float32 [in, in], with what follows from it.

    `order` int64 [in] is that of the largest inputs first, and `factor` [in, in] upper triangular, with
    moment[order][:, order] = factor factor'.
    """

    moment: torch.Tensor
    order: torch.Tensor
    factor: torch.Tensor

    @property
    def follows(self) -> torch.Tensor:
        """How much of the error of a column is fed to later ones, in order: [in, in], unit upper triangular."""
        return self.factor / self.factor.diagonal()

    def solve(self, products: torch.Tensor) -> torch.Tensor:
        """Returns products [out, in] times the inverse of the moment."""
        left = torch.linalg.solve_triangular(self.factor.T, products[:, self.order], upper=False, left=False)
        found = torch.empty_like(products)
        found[:, self.order] = torch.linalg.solve_triangular(self.factor, left, upper=True, left=False)
        return found


def factored(moment: torch.Tensor, name: str) -> Curvature:
    """Factors a `damped` moment; raises CheckpointError with the weight's `name` if that is not possible.

    Memory: 2 matrices besides the result.
    """
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor, failed = torch.linalg.cholesky_ex(moment[order][:, order].flip(0, 1))
    if int(failed):
        raise CheckpointError(f"{name}: the second moment of its inputs is not positive definite: use more calibration data")
    return Curvature(moment, order, factor.flip(0, 1))


def solve(target: torch.Tensor, curvature: Curvature, scale: torch.Tensor) -> torch.Tensor:
    """Returns `target` [out, in] rounded to E4M3 multiples of `scale` [out, in], with little error of the outputs.

    All are float32. The result is float32 too, code times scale, from which rounding to nearest gives the codes back.
    One pass in the order of the largest inputs is followed by one of coordinate descent. Memory: that of the moment and 4
    times that of the target.
    """
    order, rounded = curvature.order, torch.empty_like(target)
    rounded[:, order] = _feed_forward(target[:, order], curvature.follows, scale[:, order])
    _descend(target, curvature.moment, scale, rounded)
    return rounded


def _feed_forward(target: torch.Tensor, follows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    columns, error = target.shape[1], torch.empty_like(target)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        wanted = target[:, part] + error[:, :start] @ follows[:start, part]
        error[:, part] = _first(wanted, follows[part, part].contiguous(), scale[:, part], target[:, part])
    return target - error


def _descend(target: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, rounded: torch.Tensor) -> None:
    error = target - rounded
    for start in range(0, target.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, target.shape[1]))
        gradient, values = error @ moment[:, part], rounded[:, part].contiguous()
        _second(gradient, moment[part, part].contiguous(), scale[:, part], values)
        rounded[:, part] = values
        error[:, part] = target[:, part] - values


def _first(wanted: torch.Tensor, follows: torch.Tensor, scale: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Returns the errors of a block of columns, rounded in order."""
    if wanted.device.type != "cpu":
        return feed_forward_by_torch(wanted, follows, scale, target)
    from mptq.quantize.rounding import kernels

    error = torch.empty_like(wanted)
    _in_parallel(kernels.feed_forward, [wanted, scale.contiguous(), target.contiguous(), error], follows)
    return error


def feed_forward_by_torch(
    wanted: torch.Tensor, follows: torch.Tensor, scale: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The same as `kernels.feed_forward`, with torch's operators, for any device; returns the error."""
    error = torch.empty_like(wanted)
    for column in range(wanted.shape[1]):
        error[:, column] = target[:, column] - nearest(wanted[:, column], scale[:, column])
        wanted[:, column + 1 :].addr_(error[:, column], follows[column, column + 1 :])
    return error


def _second(gradient: torch.Tensor, curvature: torch.Tensor, scale: torch.Tensor, rounded: torch.Tensor) -> None:
    """Moves the values of a block of columns to their best, in order, in place."""
    if gradient.device.type != "cpu":
        descend_by_torch(gradient, curvature, scale, rounded)
        return
    from mptq.quantize.rounding import kernels

    _in_parallel(kernels.descend, [gradient, scale.contiguous(), rounded], curvature)


def descend_by_torch(gradient: torch.Tensor, curvature: torch.Tensor, scale: torch.Tensor, rounded: torch.Tensor) -> None:
    """The same as `kernels.descend`, with torch's operators, for any device."""
    for column in range(gradient.shape[1]):
        before = rounded[:, column].clone()
        rounded[:, column] = nearest(before + gradient[:, column] / curvature[column, column], scale[:, column])
        gradient[:, column + 1 :].addr_(before - rounded[:, column], curvature[column, column + 1 :])


def _in_parallel(kernel: Any, arrays: list[torch.Tensor], shared: torch.Tensor) -> None:
    """Calls a compiled kernel on blocks of rows of `arrays`; `shared` comes second."""
    first, *others = (array.numpy() for array in arrays)
    matrix, parts = shared.numpy(), (slice(start, start + _ROWS) for start in range(0, len(first), _ROWS))
    list(thread_pool().map(lambda part: kernel(first[part], matrix, *(other[part] for other in others)), parts))
