"""Generation by family: windows, learned positions and caps under left padding and a cache."""

import numpy as np
import pytest

import moejax as mj
from moejax.serve.generate import GenerateConfig, generate
from tests.parity.cases import TOKENS, fields_of
from tests.tiny_llama import tensors_of, write_llama

NUM_NEW = 14


@pytest.mark.parametrize(
    "name",
    [
        "qwen2-layer_types_yarn",
        "gemma2-grouped_tied",
        "opt-after_projected",
        "deepseek_v2-lite_yarn",
    ],
)
def test_each_token_is_the_most_likely_one_after_the_text_so_far(name, tmp_path):
    """Prompts of two lengths share a batch; windows of 5 and 6 tokens pass over the padding."""
    fields = fields_of(name)
    model = mj.load(write_llama(tmp_path, fields, tensors_of(fields)))
    prompts = [TOKENS[0, :17].tolist(), TOKENS[1, :4].tolist()]
    answers = generate(
        model.params, model.config, prompts, GenerateConfig(max_new_tokens=NUM_NEW)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.ids) == NUM_NEW
        text = np.array([prompt + answer.ids])
        logits = np.asarray(model.logits(text))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.ids
