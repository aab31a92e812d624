"""What a layer's next query will probably be, as a tensor or as what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

Project = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class QueryEstimate:
    """An estimate of ``[B, Hq, 1, D]``, after RoPE.

    Args:
        source: the query itself, or where there is a `weight`, ``[B, 1, hidden size]``: what the
            layer projects.
        weight: ``[Hq * D, hidden size]``.
        bias: ``[Hq * D]``, if the projection has one.
        rotation: ``[B or 1, D, D]``, with a `weight`: RoPE of the query's position as a matrix,
            which a projected head is multiplied by from the right.
    """

    source: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The fields, as the library ops take them."""
        return self.source, self.weight, self.bias, self.rotation

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [tensor for tensor in self.arguments if tensor is not None]

    @property
    def size(self) -> tuple[int, ...]:
        """``(B, Hq, 1, D)``."""
        if self.weight is None or self.rotation is None:
            return tuple(self.source.shape)
        head_dim = self.rotation.shape[2]
        return self.source.shape[0], self.weight.shape[0] // head_dim, 1, head_dim

    def query(self, project: Project = linear) -> Tensor:
        """``[B, Hq, 1, D]``.

        Args:
            project: a linear layer, of the source, the weight and the bias.
        """
        if self.weight is None or self.rotation is None:
            return self.source
        batch_size, num_heads, _, head_dim = self.size
        projected = project(self.source, self.weight, self.bias)
        heads = projected.view(batch_size, num_heads, head_dim)
        return (heads @ self.rotation)[:, :, None]
