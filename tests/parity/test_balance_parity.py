"""The balance loss of a family with experts is transformers' aux_loss times its coefficient."""

import jax
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.io.load import load_any
from moejax.models.transformer import forward
from tests.parity.cases import TOKENS, fields_of
from tests.tiny_llama import tensors_of, write_llama

CASES = (
    "mixtral-grouped",
    "olmoe-grouped_clip_biases_sum_to_one",
    "qwen2_moe-mha_tied",
    "qwen3_moe-dense_first_window_biases",
)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_loss_of_all_layers_is_that_of_transformers(name, padded, tmp_path):
    import torch
    import transformers

    coefficient = 0.37
    fields = fields_of(name) | {"router_aux_loss_coef": coefficient}
    loaded = load_any(write_llama(tmp_path, fields, tensors_of(fields)))
    segments = np.ones(TOKENS.shape, np.int32)
    if padded:
        segments[1, 20:] = 0

    def balance(params):
        stats = forward(params, loaded.config, TOKENS, segment_ids_BT=segments).stats
        return stats.balance_loss

    found_L = np.asarray(jax.jit(balance)(loaded.params))
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    given = {"attention_mask": torch.tensor(segments)} if padded else {}
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS).long(), output_router_logits=True, **given).aux_loss
    assert model.router_aux_loss_coef == coefficient
    np.testing.assert_allclose(found_L.sum(), coefficient * theirs, rtol=TOLERANCE["float32"])
