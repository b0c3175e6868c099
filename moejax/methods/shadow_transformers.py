"""Contextual masks in transformers: a reference, by hooks, that computes everything and masks it.

Copied into a predictor's folder as modeling_shadow.py, where it needs torch, transformers and
safetensors and nothing of moejax (https://arxiv.org/abs/2406.16635; Apache-2.0):

    from modeling_shadow import attach
    model = AutoModelForCausalLM.from_pretrained(...)       # the model named in shadow.json
    shadow = attach(model, "predictor", sparsity=0.5)
    shadow.decide(prompt_ids)                               # from the prompt, read densely
    logits = model(ids).logits                              # masked from the prompt's end on
    shadow.detach()

Works where a layer has self_attn.o_proj (or out_proj) and mlp.down_proj (or fc2): Llama and its
kin, OPT. Dense models only. Decoding with a cache masks every step of one token.
"""

import json
import math
from pathlib import Path


class Shadow:
    """A predictor attached to a model of transformers; `mask` holds what it decided."""

    def __init__(self, model, folder, sparsity):
        from safetensors.torch import load_file

        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity {sparsity} lies outside [0, 1)")
        self.info = json.loads((Path(folder) / "shadow.json").read_text())
        self.weights = load_file(str(Path(folder) / "predictor.safetensors"))
        self.model, self.sparsity = model, sparsity
        self.context = self.mask = None  # set by `decide`
        self.num_dense, self.num_rows = 0, 1
        base = getattr(model.model, "decoder", model.model)
        if len(base.layers) != self.info["sizes"]["num_layers"]:
            raise ValueError(
                f"a predictor of {self.info['sizes']['num_layers']} layers for a model of "
                f"{len(base.layers)}"
            )
        fields = self.info["fields"]
        for name, theirs in (("num_heads", "num_attention_heads"), ("d_model", "hidden_size")):
            found = getattr(model.config, theirs)
            if name in fields and found != fields[name]:
                raise ValueError(f"a predictor for {name} {fields[name]}, the model has {found}")
        self.hooks = []
        for index, layer in enumerate(base.layers):
            attention = layer.self_attn
            out = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
            down = layer.mlp.down_proj if hasattr(layer, "mlp") else layer.fc2
            for place, module in (("heads", out), ("neurons", down)):
                self.hooks.append(module.register_forward_pre_hook(self._hook(index, place)))

    def decide(self, prompt_ids):
        """Reads prompts [B, T] without padding densely, then sets the masks of their answers."""
        import torch

        self.mask, self.context = None, None
        with torch.no_grad():
            self.model(prompt_ids)
        assert self.context is not None, "the model did not call its layers' modules"
        low, high = (getattr(self.context, f)(-1, keepdim=True).values for f in ("min", "max"))
        x = (self.context - low) / (high - low).clamp_min(1e-30)
        w, sizes = self.weights, self.info["sizes"]
        hidden = torch.relu(x @ w["w_in"] + w["b_in"])
        kept = {}
        for name in ("heads", "blocks"):
            scores = hidden @ w[f"w_out_{name}"] + w[f"b_out_{name}"]
            scores = scores.reshape(len(x), sizes["num_layers"], sizes[name])
            keep = sizes[name] - math.floor(self.sparsity * sizes[name] + 1e-9)
            best = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
            kept[name] = torch.zeros_like(scores).scatter(-1, best, 1.0)
            kept[name][:, : sizes["first"]] = 1.0
        blocks = kept["blocks"].repeat_interleave(sizes["block"], -1)
        order = w["order_LF"].long().expand_as(blocks)
        neurons = torch.zeros_like(blocks).scatter(-1, order, blocks)  # in the model's own order
        self.mask = {"heads": kept["heads"], "neurons": neurons}
        self.num_dense = prompt_ids.shape[1]

    def detach(self):
        """Takes the hooks off again."""
        for hook in self.hooks:
            hook.remove()

    def _hook(self, index, place):
        def masked(module, args):
            x = args[0]
            flat = x.ndim == 2  # OPT's fc2 sees the tokens of all rows together
            if flat:
                x = x.reshape(self.num_rows, -1, x.shape[-1])
            elif place == "heads":
                self.num_rows = len(x)  # attention comes first in a layer
            if self.mask is None:
                if index == 0 and place == "heads":
                    self.context = x[:, -1].float()
                return None
            factor = self.mask[place][:, index].to(x.dtype)
            if place == "heads":
                factor = factor.repeat_interleave(x.shape[-1] // factor.shape[-1], -1)
            x = x.clone()
            first = 0 if x.shape[1] == 1 else self.num_dense
            x[:, first:] *= factor[:, None]
            return (x.flatten(0, 1) if flat else x, *args[1:])

        return masked


def attach(model, folder, sparsity):
    """Puts a predictor's hooks on a model; nothing changes until `Shadow.decide`."""
    return Shadow(model, folder, sparsity)
