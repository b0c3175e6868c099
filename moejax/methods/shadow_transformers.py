"""Contextual masks in transformers: a reference, by hooks, that computes everything and masks it.

Copied into a predictor's folder as modeling_shadow.py, where it needs torch, transformers and
safetensors and nothing of moejax (https://arxiv.org/abs/2406.16635; Apache-2.0):

    from modeling_shadow import attach
    model = AutoModelForCausalLM.from_pretrained(...)       # the model named in shadow.json
    shadow = attach(model, "predictor", sparsity=0.5)
    shadow.decide(prompt_ids)                               # from the prompt, read densely
    logits = model(ids).logits                              # masked from the prompt's end on
    shadow.detach()

Of the variants "token" and "dejavu" every token after the prompt decides for itself: by what layer
0 mixes there, or by what enters each layer. Works where a layer has self_attn.o_proj (or out_proj)
and mlp.down_proj (or fc2): Llama and its kin, OPT. Dense models only. Decoding with a cache masks
every step of one token.
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
        self.per_layer = self.info["variant"] == "dejavu"
        self.per_token = self.info["variant"] in ("token", "dejavu")
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
            if self.per_layer and index >= self.info["sizes"]["first"]:
                into = layer.mlp.up_proj if hasattr(layer, "mlp") else layer.fc1
                for place, module in (("heads", attention.q_proj), ("neurons", into)):
                    self.hooks.append(module.register_forward_pre_hook(self._ask(index, place)))

    def decide(self, prompt_ids):
        """Reads prompts [B, T] without padding densely, then sets the masks of their answers."""
        import torch

        self.mask, self.context, self.num_dense = None, None, prompt_ids.shape[1]
        if self.per_token:
            self.mask = {"heads": {}, "neurons": {}}  # layer -> of the tokens that are read now
            return
        with torch.no_grad():
            self.model(prompt_ids)
        assert self.context is not None, "the model did not call its layers' modules"
        self.mask = self._masks(self.context)

    def _masks(self, context):
        """Place -> layer -> masks of the vectors that layer 0 mixed, [rows, units]."""
        import torch

        low, high = (getattr(context, f)(-1, keepdim=True).values for f in ("min", "max"))
        x = (context - low) / (high - low).clamp_min(1e-30)
        w, sizes = self.weights, self.info["sizes"]
        hidden = torch.relu(x @ w["w_in"] + w["b_in"])
        kept = {}
        for name in ("heads", "blocks"):
            scores = hidden @ w[f"w_out_{name}"] + w[f"b_out_{name}"]
            kept[name] = self._best(scores.reshape(len(x), sizes["num_layers"], sizes[name]))
            kept[name][:, : sizes["first"]] = 1.0
        neurons = self._in_own_order(kept["blocks"], w["order_LF"])
        by_layer = {"heads": kept["heads"].unbind(1), "neurons": neurons.unbind(1)}
        return {place: dict(enumerate(masks)) for place, masks in by_layer.items()}

    def detach(self):
        """Takes the hooks off again."""
        for hook in self.hooks:
            hook.remove()

    def _best(self, scores):
        """1 for what is kept of the last dim, 0 for the rest."""
        keep = scores.shape[-1] - math.floor(self.sparsity * scores.shape[-1] + 1e-9)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
        return scores.new_zeros(scores.shape).scatter(-1, best, 1.0)

    def _in_own_order(self, blocks, order):
        """Blocks' masks as those of neurons, in the order that the model has."""
        whole = blocks.repeat_interleave(self.info["sizes"]["block"], -1)
        return whole.new_zeros(whole.shape).scatter(-1, order.long().expand_as(whole), whole)

    def _ask(self, index, place):
        """Keeps what DejaVu's predictor says of the tokens that are about to be read."""
        w_1, w_2 = (self.weights[f"{place}/{name}"][index] for name in ("w_1", "w_2"))
        order = self.weights["order_LF"][index].long()
        units = self.info["sizes"]["heads" if place == "heads" else "blocks"]

        def ask(module, args):
            if self.mask is None:
                return
            x = args[0].float()
            scores = (x @ w_1 @ w_2).sigmoid()
            scores = scores if place == "heads" else scores[..., order]
            best = self._best(scores.reshape(*x.shape[:-1], units, -1).sum(-1))
            self.mask[place][index] = (
                best if place == "heads" else self._in_own_order(best, order)
            )

        return ask

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
            if self.per_token and not self.per_layer and index == 0 and place == "heads":
                self.mask = self._masks(x.flatten(0, 1).float())
            if index not in self.mask[place]:
                return None
            factor = self.mask[place][index].to(x.dtype)
            # Of every token, or one for all.
            factor = factor.reshape(*x.shape[:2], -1) if self.per_token else factor[:, None]
            if place == "heads":
                factor = factor.repeat_interleave(x.shape[-1] // factor.shape[-1], -1)
            x = x.clone()
            first = 0 if x.shape[1] == 1 else self.num_dense
            x[:, first:] *= factor[:, first:] if self.per_token else factor
            return (x.flatten(0, 1) if flat else x, *args[1:])

        return masked


def attach(model, folder, sparsity):
    """Puts a predictor's hooks on a model; nothing changes until `Shadow.decide`."""
    return Shadow(model, folder, sparsity)
