"""The tiny model again in torch, in float64, with everything kept that criteria are made of."""

import jax
import numpy as np
import torch

from tests.shadow_cases import PROMPT, TOKENS, C, F, H, L

grad_of = torch.autograd.grad


class Reference:
    """The model again in torch, in float64, layer by layer, with everything kept."""

    def __init__(self, config, params):
        self.config = config
        self.w = jax.tree.map(lambda a: torch.tensor(np.asarray(a), dtype=torch.float64), params)
        self.layers = self.w["layers"]["0"]
        for name in ("w_gate", "w_up", "w_down"):
            if name in self.layers["mlp"]:
                self.layers["mlp"][name].requires_grad_()
        self.probes = [
            torch.zeros(len(TOKENS), H, C, dtype=torch.float64, requires_grad=True)
            for _ in range(L)
        ]
        self.spots = [
            torch.zeros(len(TOKENS), F, dtype=torch.float64, requires_grad=True) for _ in range(L)
        ]
        self.x, self.a = [], []
        self.loss = self.run()

    def norm(self, x, scale):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.norm_eps) * scale

    def rope(self, x):
        angle = torch.arange(len(TOKENS))[:, None] * 10000.0 ** (-torch.arange(C // 2) * 2 / C)
        cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        first, second = x[..., : C // 2], x[..., C // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def run(self):
        x = self.w["embed"]["tokens"][TOKENS]
        causal = torch.tril(torch.ones(len(TOKENS), len(TOKENS))).bool()
        for i in range(L):
            at, mlp = self.layers["attn"], self.layers["mlp"]
            n = self.norm(x, self.layers["attn_norm"]["scale"][i])
            q, k, v = (torch.einsum("td,dhc->thc", n, at[f"w_{p}"][i]) for p in "qkv")
            scores = torch.einsum("thc,shc->hts", self.rope(q), self.rope(k)) / C**0.5
            mixed = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
            mixed = torch.einsum("hts,shc->thc", mixed, v)
            self.x.append(mixed.detach())
            x = x + torch.einsum("thc,hcd->td", mixed + self.probes[i], at["w_o"][i])
            n = self.norm(x, self.layers["mlp_norm"]["scale"][i])
            if self.config.gated:
                a = torch.nn.functional.silu(n @ mlp["w_gate"][i]) * (n @ mlp["w_up"][i])
            else:
                a = torch.relu(n @ mlp["w_up"][i] + mlp["b_up"][i])
            self.a.append(a.detach())
            x = x + (a + self.spots[i]) @ mlp["w_down"][i]
            x = x + mlp["b_down"][i] if "b_down" in mlp else x
        logits = self.norm(x, self.w["final_norm"]["scale"]) @ self.w["lm_head"]["w"]
        return torch.nn.functional.cross_entropy(
            logits[PROMPT - 1 : -1], torch.tensor(TOKENS[PROMPT:])
        )
