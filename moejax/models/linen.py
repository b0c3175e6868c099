"""A thin Linen shell around the decoder, for those who compose Linen modules."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params, init_leaf
from moejax.models.transformer import Output, forward


class _Params(nn.Module):
    """Declares one dict of parameters, and those below it."""

    spec: Any
    prefix: str
    scale: float

    @nn.compact
    def __call__(self):
        params = {}
        for name, leaf in self.spec.items():
            path = f"{self.prefix}{name}"
            if isinstance(leaf, jax.ShapeDtypeStruct):
                init = functools.partial(init_leaf, path, leaf=leaf, scale=self.scale)
                params[name] = self.param(name, init)
            else:
                params[name] = _Params(leaf, path + "/", self.scale, name=name)()
        return params


class Transformer(nn.Module):
    """Linen shell: ``Transformer(config).init(key, tokens)["params"]`` has `init_params`' tree.

    ``apply({"params": params}, tokens_BT, **kwargs)`` gives what `forward` gives.
    """

    config: ModelConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, **kwargs) -> Output:
        params = {}
        for name, spec in abstract_params(self.config, self.dtype).items():
            params[name] = _Params(spec, name + "/", self.config.initializer_range, name=name)()
        return forward(params, self.config, tokens_BT, **kwargs)
