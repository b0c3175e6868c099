"""The tiny models and the text on which ShadowLLM's criteria are checked."""

import dataclasses

import numpy as np

from moejax.methods.shadow_measure import Text
from moejax.models.config import ModelConfig

H, C, D, F, L, V = 3, 4, 12, 10, 2, 11
LLAMA = ModelConfig("llama", V, L, D, F, H, H, C, initializer_range=0.4)
OPT = dataclasses.replace(LLAMA, gated=False, activation="relu", mlp_bias=True)
TOKENS = np.array([1, 2, 3, 7, 3, 7, 5, 7, 3, 7, 2, 7, 7, 3, 7, 9, 4, 7, 7, 3])
PROMPT = 4
TEXT = Text(TOKENS, np.arange(len(TOKENS)) >= PROMPT, PROMPT)
